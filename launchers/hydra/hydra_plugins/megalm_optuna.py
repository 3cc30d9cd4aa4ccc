"""hydra/sweeper=megalm_optuna: a search instead of a grid. Draws points with Optuna, learns from their losses, prunes."""

# No `from __future__ import annotations`, as in megalm_local.py

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper


@dataclass
class OptunaSettings:
    """Below hydra.sweeper."""

    _target_: str = "hydra_plugins.megalm_optuna.OptunaSweeper"
    trials: int = 20  # points in all, those of earlier starts too
    at_once: int = 1  # points that are drawn and run together
    sampler: str = "tpe"  # tpe learns from the points before; random
    pruner: str = "none"  # ends points that are worse than others at the same step: median, hyperband; none
    startup: int = 5  # points before tpe and median begin
    warmup_steps: int = 0  # optimizer steps of a point before median may end it
    seed: int = 0  # of the draws


class OptunaSweeper(Sweeper):
    """Its state is SWEEP_DIR/optuna.journal: started again, also after a kill -9, it goes on from there."""

    def __init__(self, **settings: Any) -> None:
        self.settings = OptunaSettings(**settings)

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.task = task_function
        self.folder = str(config.hydra.sweep.dir)
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from megalm.launchers.sweep.search import search

        return search(arguments, self.settings, self.launcher, self.task.sweep, self.folder)


ConfigStore.instance().store(group="hydra/sweeper", name="megalm_optuna", node=OptunaSettings, provider="megalm")
