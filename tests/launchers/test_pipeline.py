"""megalm pipeline show: draws any schedule, refuses what cannot be, and needs no torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.config.parallel import SCHEDULES, TWO_CHUNKS
from megalm.config.tasks import PipelineRun
from megalm.launchers.check import check
from megalm.launchers.compose import inspect, parse
from megalm.launchers.pipeline import show

Megalm = Callable[..., subprocess.CompletedProcess]


def look(*arguments: str) -> tuple[PipelineRun, list]:
    return inspect(parse("pipeline", list(arguments)))


def test_the_command_of_the_manual(megalm: Megalm, tmp_path: Path) -> None:
    arguments = ["parallel.pipeline_parallel=8", "parallel.schedule=zbv", "num_microbatches=16", "output=zbv.svg", "csv=zbv.csv"]
    run = megalm("pipeline", "show", *arguments)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("zbv: 8 ranks x 2 chunks, 16 microbatches\nrank 0 F")
    assert "bubble      6.8% of the step (3.5 of 51.5); published: 6.8%" in run.stdout
    assert "activations 8 microbatches of a rank's layers at most" in run.stdout
    rows = {line[2:].split()[0]: line for line in run.stdout.splitlines() if line[2:].split()[:1] and line[:2] in ("  ", "* ")}
    assert set(SCHEDULES) - {"csv"} <= set(rows)
    assert rows["zbv"].startswith("*") and "30.4%" in rows["1f1b"]
    assert "\x1b" not in run.stdout  # no terminal
    assert (tmp_path / "zbv.svg").read_text().startswith("<svg")
    mine = ["parallel.schedule=csv", "parallel.chunks=2", "parallel.schedule_file=zbv.csv"]
    again = megalm("pipeline", "parallel=pp8", *mine, "num_microbatches=16")
    assert "bubble      6.8% of the step (3.5 of 51.5)\n" in again.stdout, again.stderr


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "csv"])
def test_every_schedule_is_shown(name: str, capsys: pytest.CaptureFixture) -> None:
    config, problems = look("show", f"parallel=pp3_{name}", "num_microbatches=5", "weight_time=0.5", "width=80")
    assert problems == []
    assert config.parallel.chunks == (2 if name in (*TWO_CHUNKS, "interleaved", "bfs") else 1)
    show(config)
    text = capsys.readouterr().out
    assert f"* {name}" in text
    assert max(map(len, text.split("\nF forward")[0].splitlines())) <= 80


def test_a_note_where_the_drawing_is_too_narrow(capsys: pytest.CaptureFixture) -> None:
    show(look("parallel=pp4", "num_microbatches=100", "width=60", "compare=false")[0])
    text = capsys.readouterr().out
    assert "Several actions share a column" in text
    assert "step time" not in text


@pytest.mark.parametrize(
    ("arguments", "key", "words"),
    [
        (["parallel=pp2", "parallel.chunks=2"], "parallel.chunks", "interleaved, bfs, zbv, dualpipev or csv"),
        (["parallel=pp2_zbv", "parallel.chunks=3"], "parallel.schedule", "zbv and dualpipev need parallel.chunks=2"),
        (["parallel=pp2_csv"], "parallel.schedule", "needs parallel.schedule_file"),
        (["parallel=pp2", "parallel.schedule_file=x.csv"], "parallel.schedule_file", "with parallel.schedule=csv only"),
        (["parallel=pp2_csv", "parallel.schedule_file=absent.csv"], "parallel.schedule_file", "cannot read this file"),
        (["num_microbatches=0"], "pipeline.num_microbatches", "out of bounds"),
        (["output=a.pdf"], "pipeline.output", "must end in .svg or .png"),
        (["shwo"], "shwo", "an argument is key=value"),
        (["model.num_layers=3"], "model.num_layers", "unknown key"),
    ],
)
def test_mistakes(arguments: list[str], key: str, words: str) -> None:
    _, problems = look("show", *arguments)
    assert [problem.key for problem in problems] == [key]
    assert words in problems[0].rule


def test_a_users_schedule_is_checked_before_it_runs(tmp_path: Path) -> None:
    """By `megalm check` and by every verb that reads it, without torch."""
    file = tmp_path / "mine.csv"
    file.write_text("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n")
    arguments = ["parallel=pp2_csv", f"parallel.schedule_file={file}", "train.global_batch_size=8"]
    _, problems = inspect(parse("pretrain", arguments))
    assert [(problem.key, problem.value) for problem in problems] == [("parallel.schedule_file", str(file))]
    assert "can never finish: rank 0 at 0B0, which needs 0F0 and the backward of stage 1; rank 1 at 1F1" in problems[0].rule
    file.write_text("0F0,0B0,0F1,0B1\n1F0,1B0,1F1,1B1\n")
    assert check("pretrain", arguments).startswith("ok: pretrain as pp2_csv on 2 CPU processes")
    assert [p.rule for p in inspect(parse("pretrain", arguments[:2]))[1]] == ["has 2 microbatches, and a step has 4"]
    assert check("pipeline", ["show", *arguments[:2], "num_microbatches=2"]) == "ok: pipeline"
    code = (
        f"import sys; from megalm.launchers.check import check; check('pretrain', {arguments}); "
        "from megalm.launchers.pipeline import show; from megalm.config.tasks import PipelineRun; show(PipelineRun()); "
        "assert not {'torch', 'deepspeed', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
