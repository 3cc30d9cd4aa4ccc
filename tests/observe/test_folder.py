"""A run's folder, whole, in pieces and spoilt."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.errors import ConfigError
from megalm.observe.folder import find_run, read_run

MakeRun = Callable[..., Path]


def test_everything_is_read(make_run: MakeRun) -> None:
    run = read_run(make_run(experts=True))
    assert (run.step, run.steps, run.finished, run.checkpoints) == (1000, 1000, True, [900, 1000])
    assert len(run.column("loss")) == 1000 and run.column("loss")[0][0] == 1
    assert len(run.column("valid_loss")) == 10
    assert run.config["parallel.tensor_parallel"] == 2
    assert len(run.loads) == 6 and len(run.loads["0"]) == 16
    assert len(run.events) == 18 and run.notes == []


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "events.jsonl", "progress.json", "memory.json", "finished"])
def test_any_file_may_be_missing(missing: str, make_run: MakeRun) -> None:
    folder = make_run()
    (folder / missing).unlink()
    run = read_run(folder)
    assert run.step == 1000
    assert (run.steps > 0) or missing == "config.yaml"


def test_no_file_at_all(tmp_path: Path) -> None:
    run = read_run(tmp_path)
    assert (run.step, run.steps, run.events, run.columns) == (0, 0, [], {})


def test_spoilt_files(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: &a {b: 1}\nc: [*a, *a]\nd: {e: {f: {g: {h: {i: 1}}}}}\n1: 2\n")
    (tmp_path / "progress.json").write_text('{"step": "<b>", "steps": NaN, "time": 1e999, "loss": 2.5, "attempt": [1]}')
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": NaN}\n{"step": 2, "loss": 3}\n{"loss": 1}\n{"step": 1, "loss": "x"}\n'
    )
    (tmp_path / "events.jsonl").write_text('{"kind": "started"}\n{"kind": 3, "time": 1}\n{"kind": "saved", "time": 5}\n')
    run = read_run(tmp_path)
    assert run.config["1"] == 2 and run.config["c"] == [{"b": 1}, {"b": 1}]
    assert run.progress == {"loss": 2.5, "attempt": "[1]"}
    assert run.columns == {"loss": [(2.0, 3.0)]}
    assert [event["kind"] for event in run.events] == ["saved"]


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "!!python/object/apply:os.system [id]", "a: 2000-13-99", "\x00"])
def test_a_config_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert read_run(tmp_path).config == {}


def test_a_config_that_unfolds(tmp_path: Path) -> None:
    """Nine lines that are ten to the ninth values."""
    lines = ["a0: &a0 {x: 1, y: 2}"] + [
        f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(10))}}}" for i in range(1, 9)
    ]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    assert 0 < len(read_run(tmp_path).config) <= 2000


def test_a_config_that_holds_itself(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: &a {b: *a}")
    assert list(read_run(tmp_path).config) == ["a.b.b.b.b"]


def test_a_config_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").mkdir()
    run = read_run(tmp_path)
    assert run.config == {} and run.notes == ["metrics.jsonl is not there: no curves"]


def test_reports_of_failures_newest_first(make_run: MakeRun) -> None:
    folder = make_run()
    for age, name in enumerate(("logs/77.0/report-0.0.txt", "logs/report-0.txt")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("rank 3\nhung\n")
        os.utime(folder / name, (1000 - age, 1000 - age))
    assert read_run(folder).failures == [(name, ["rank 3", "hung"]) for name in ("logs/77.0/report-0.0.txt", "logs/report-0.txt")]


@pytest.mark.parametrize(
    "name", ["config.yaml", "events.jsonl", "memory.json", "progress.json", "metrics.jsonl", "logs/report-1.txt"]
)
def test_a_link_out_of_the_folder_is_not_followed(name: str, make_run: MakeRun, tmp_path: Path) -> None:
    folder, secret = make_run(), tmp_path / "secret"
    secret.write_text('{"kind": "secret", "time": 1, "step": 4000, "key": "x"}')
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    run = read_run(folder)
    assert f"{name} leads out of the run's folder, and was not read" in run.notes
    assert "secret" not in str((run.config, run.events, run.memory, run.failures)) and run.step < 4000 and not run.failures
    (tmp_path / "link").symlink_to(make_run("other"))
    assert read_run(tmp_path / "link").notes == []


def test_where_no_run_is(make_run: MakeRun, tmp_path: Path) -> None:
    assert find_run(make_run("a"), "status.run_dir") == tmp_path / "a"
    with pytest.raises(ConfigError, match=r"no run has written there(.|\n)*fix: +status.run_dir=.*a"):
        find_run(tmp_path, "status.run_dir")
    with pytest.raises(ConfigError, match="no such folder"):
        find_run(tmp_path / "b", "status.run_dir")
