"""Faults in the words of a sweep that are Hydra's: each is named with its rule and a fix that holds, before anything starts."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.errors import ConfigError
from megalm.launchers.compose import parse
from megalm.launchers.sweep.command_line import inspect_sweep, with_launcher
from megalm.launchers.sweep.settings import check

LR, DRAWN = "optim.lr=1e-3,3e-4", "optim.lr=interval(1e-4,1e-3)"
OPTUNA, SLURM = "hydra/sweeper=megalm_optuna", "hydra/launcher=megalm_slurm"
HUGE, LARGE = "range(0,1000000000)", "range(0,200)"
# what is at fault, what stands beside it, the rule; then the fix takes the place of the first
FAULTS = (
    ("optim.lrr=1e-3,3e-4", "", "unknown key; did you mean optim.lr?"),
    ("train.seed=range(5,5)", "", "holds no value"),
    ("train.seed=range(5,2)", "", "holds no value"),
    ("train.seed=range(2,5,-1)", "", "holds no value"),
    (f"train.seed={HUGE}", "", "more than 10,000 points"),
    (f"train.seed={LARGE} data.seed={LARGE}", "", "more than 10,000 points"),
    (f"train.seed={HUGE}", OPTUNA, "an interval may hold any number"),
    ("train.seed=range(5,5)", OPTUNA, "holds no value"),
    ("optim.lr=interval(1e-4,1e-3)", "", "a grid has no values to take from an interval"),
    ("hydra.sweeper.trails=3", f"{OPTUNA} {DRAWN}", "did you mean hydra.sweeper.trials?"),
    ("hydra.sweeper.trials=x", f"{OPTUNA} {DRAWN}", "cannot be"),
    ("hydra.sweeper.trials=true", f"{OPTUNA} {DRAWN}", "cannot be"),
    ("hydra.sweeper.trials=2.5", f"{OPTUNA} {DRAWN}", "cannot be"),
    ("hydra.sweeper.pruner=mean", f"{OPTUNA} {DRAWN}", "no such one"),
    ("hydra/sweeper=megalm_optun", LR, "no such sweeper; did you mean hydra/sweeper=megalm_optuna?"),
    ("hydra/launcher=megalm_slrm", LR, "no such launcher; did you mean hydra/launcher=megalm_slurm?"),
    ("hydra.sweeper.trials=3", LR, "a setting of megalm_optuna, and this is hydra/sweeper=basic"),
    ("hydra.launcher.wait=yes", LR, "a setting of megalm_slurm, and this is hydra/launcher=megalm_local"),
    ("hydra.launcher.jobs=-1", LR, "cannot be"),
    ("hydra.launcher.table=x", LR, "no such one"),
    ("hydra.launcher.poll_seconds=0", f"{SLURM} {LR}", "cannot be"),
    ("hydra.launcher.wait=maybe", f"{SLURM} {LR}", "no such one"),
)


def faults_of(words: list[str]) -> list[tuple[str, str]]:
    """(rule, fix) of every problem."""
    typed = with_launcher(["-m", "model=tiny", "cluster.device=cpu", *words], slurm=False)
    _, problems = inspect_sweep(parse("pretrain", typed), typed)
    return [(problem.rule, problem.fix) for problem in problems]


@pytest.mark.parametrize(("faulty", "beside", "rule"), FAULTS)
def test_a_fault_is_named_once_and_its_fix_holds(faulty: str, beside: str, rule: str) -> None:
    ((said, fix),) = faults_of([*faulty.split(), *beside.split()])
    assert rule in said
    assert faults_of([*shlex.split(fix), *beside.split()]) == []


def test_what_may_be() -> None:
    for words in (
        [LR, "hydra.launcher.jobs=2", "hydra.launcher.table=lines"],
        [LR, SLURM, "hydra.launcher.wait=yes", "hydra.launcher.poll_seconds=1", "hydra.launcher.at_once=2"],
        [LR, "hydra/launcher=basic"],
        [OPTUNA, "hydra.sweeper.trials=3", "optim.lr=interval(1e-4,1e-3)", "train.seed=range(0,9000)", "data.seed=range(0,9000)"],
        [OPTUNA, "train.seed=interval(1,9)", "optim.clip=interval(1,2)"],  # whole ends of a setting that takes whole numbers
        ["train.seed=range(3)"],
    ):
        assert faults_of(words) == [], words


def test_settings_of_a_yaml_file_are_looked_at_too() -> None:
    check("megalm_local", jobs=0, table="auto")
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.jobs") as caught:
        check("megalm_local", jobs=-1, table="x")
    assert len(caught.value.problems) == 2


def test_it_ends_with_2_and_writes_nothing(megalm: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    done = megalm("pretrain", "-m", "model=tiny", "train.seed=range(5,5)", "hydra.sweep.dir=sweep")
    assert done.returncode == 2 and "fix:     'train.seed=range(5,6)'" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "sweep").exists()
