"""run_verb: the task gets a typed config; errors become exit codes; a sweep gives each job its folder."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

App = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def app(tmp_path: Path) -> App:
    """Runs `pretrain` with a task of the test's own in a fresh process and an empty folder."""

    def run(task: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess:
        code = "import os, sys\nfrom megalm.errors import *\nfrom megalm.launchers.app import job_arguments, run_verb\n"
        code += f"typed = sys.argv[1:]\ndef task(config):\n{textwrap.indent(textwrap.dedent(task), '    ')}\n"
        code += "run_verb('pretrain', task)\n"
        import os

        command = [sys.executable, "-c", code, *arguments]
        env = {**os.environ, **environ}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False, env=env)

    return run


def test_task_gets_the_typed_config(app: App) -> None:
    run = app(
        "print(type(config).__name__, config.optim.lr, config.cluster.num_processes)",
        "optim.lr=1e-2",
        "parallel=tp2_dp2",
    )
    assert (run.returncode, run.stdout) == (0, "RunConfig 0.01 4\n"), run.stderr


def test_nothing_is_written_beside_the_run(app: App, tmp_path: Path) -> None:
    assert app("pass").returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("error", "code"), [("ConfigError", 2), ("DataError", 2), ("CheckpointError", 2), ("RunError", 1)])
def test_known_errors_have_a_message_and_no_traceback(error: str, code: int, app: App) -> None:
    run = app(f"raise {error}(Problem('a.b', 3, 'must be 4'))")
    assert run.returncode == code
    assert "a.b = 3\n  rule:    must be 4" in run.stderr
    assert "Traceback" not in run.stderr


def test_our_own_mistakes_show_the_whole_traceback(app: App) -> None:
    run = app("raise KeyError('ours')")
    assert run.returncode == 1
    assert "KeyError: 'ours'" in run.stderr
    assert "in task" in run.stderr


def test_interrupt(app: App) -> None:
    run = app("raise KeyboardInterrupt")
    assert (run.returncode, run.stderr) == (130, "interrupted\n")


def test_a_faulty_config_is_printed_by_one_rank(app: App) -> None:
    assert "unknown key" in app("pass", "foo=1", RANK="0", WORLD_SIZE="2").stderr
    run = app("pass", "foo=1", RANK="1", WORLD_SIZE="2")
    assert (run.returncode, run.stderr) == (2, "")


def test_sweep_gives_each_job_its_folder_and_its_arguments(app: App) -> None:
    task = "print(config.optim.lr, os.path.basename(config.train.run_dir), *job_arguments(typed, config)[:-1])"
    run = app(task, "-m", "optim.lr=1e-3,3e-4", "train.steps=5", "hydra/launcher=basic")
    assert run.stdout.splitlines() == ["0.001 0 optim.lr=0.001 train.steps=5", "0.0003 1 optim.lr=0.0003 train.steps=5"], (
        run.stderr
    )


def test_a_worker_composes_the_same_config_again(app: App, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train: {steps: 7}\n")
    task = "print(*job_arguments(typed, config), sep='|', end='')"
    run = app(task, "mine.yaml", "parallel=tp2_dp2", "~train.seed", "data.split='0.9,0.1,0'")
    assert run.returncode == 0, run.stderr
    again = app("print(config.train.steps, config.cluster.num_processes, config.data.split)", *run.stdout.split("|"))
    assert again.stdout == "7 4 0.9,0.1,0\n", again.stderr


def test_hydras_own_options_work(app: App) -> None:
    run = app("print('ran')", "--cfg", "job", "model=tiny_gpt")
    assert "architecture: gpt" in run.stdout
    assert "ran" not in run.stdout


def test_chatter_of_libraries_stays_off(app: App) -> None:
    run = app("import logging; logging.getLogger('library').info('compiling'); print('done')")
    assert (run.stdout, run.stderr) == ("done\n", "")
