"""hydra/launcher=megalm_local: the points of a sweep as processes on this machine, a few at a time."""

# No `from __future__ import annotations` in plugins: Hydra loads them before they are in sys.modules, where dataclasses
# looks texts of annotations up.
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher


@dataclass
class LocalSettings:
    """Below hydra.launcher."""

    _target_: str = "hydra_plugins.megalm_local.LocalLauncher"
    jobs: int = 0  # points at a time; 0: as many as the GPUs, or without any the cores, have room for
    table: str = "auto"  # a live table, or else a line per change; auto: on a terminal


class LocalLauncher(Launcher):
    """Every point is a `megalm pretrain` of its own. `watch`: of a search, called twice a second with the points at work."""

    def __init__(self, jobs: int, table: str) -> None:
        self.jobs, self.table = jobs, table
        self.watch: Callable[[Sequence[Any]], None] | None = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from megalm.launchers.sweep.local import run_points
        from megalm.launchers.sweep.point import plan_points, returns
        from megalm.launchers.sweep.settings import check

        check("megalm_local", jobs=self.jobs, table=self.table)
        points = plan_points(self.context, self.config, self.task, job_overrides)
        run_points(points, self.jobs, self.table, self.watch)
        return returns(points, self.task)


ConfigStore.instance().store(group="hydra/launcher", name="megalm_local", node=LocalSettings, provider="megalm")
