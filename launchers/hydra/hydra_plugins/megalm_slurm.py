"""hydra/launcher=megalm_slurm: the points of a sweep as SLURM jobs. A job is described by the keys slurm.*, as everywhere."""

# No `from __future__ import annotations`, as in megalm_local.py

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher


@dataclass
class SlurmSettings:
    """Below hydra.launcher."""

    _target_: str = "hydra_plugins.megalm_slurm.SlurmLauncher"
    wait: str = "auto"  # yes: until all have ended; no: return when they are submitted; auto: only a search waits
    array_from: int = 8  # so many points with the same wishes go as one job array; 0: never
    at_once: int = 0  # elements of an array that may run at the same time; 0: as many as the cluster lets
    poll_seconds: float = 5.0  # between two questions, where it waits


class SlurmLauncher(Launcher):
    """Every point has a script of its own, RUN_DIR/job.sh, which sbatch takes again by hand."""

    def __init__(self, wait: str, array_from: int, at_once: int, poll_seconds: float) -> None:
        self.wait, self.array_from, self.at_once, self.poll_seconds = wait, array_from, at_once, poll_seconds
        self.watch: Callable[[Sequence[Any]], None] | None = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from megalm.launchers.slurm import client
        from megalm.launchers.slurm.plan import examine_in_job
        from megalm.launchers.sweep.cluster import submit_points, wait_for
        from megalm.launchers.sweep.point import plan_points, returns
        from megalm.launchers.sweep.settings import check

        waits = {"wait": self.wait, "poll_seconds": self.poll_seconds}
        check("megalm_slurm", array_from=self.array_from, at_once=self.at_once, **waits)
        client.ask("sbatch", "--version")  # where there is no SLURM, nothing is written
        points = plan_points(self.context, self.config, self.task, job_overrides, examine_in_job)
        submit_points(points, self.array_from, self.at_once)
        search = "BasicSweeper" not in str(self.config.hydra.sweeper._target_)
        if self.wait == "yes" or (self.wait == "auto" and search):
            wait_for(points, self.poll_seconds, self.watch)
        return returns(points, self.task)


ConfigStore.instance().store(group="hydra/launcher", name="megalm_slurm", node=SlurmSettings, provider="megalm")
