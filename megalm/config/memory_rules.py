"""The rules about activations: what is computed again, and what waits elsewhere for the backward."""

from __future__ import annotations

from megalm.config.fixes import Rule, needs
from megalm.config.machine import uses_cuda
from megalm.config.train import TrainConfig

_RECOMPUTE, _OFFLOAD = "train.recompute", "train.offload_activations"

RULES: tuple[Rule, ...] = (
    needs(
        "recompute_modules_used",
        "train.recompute_modules",
        TrainConfig().recompute_modules,
        _RECOMPUTE,
        lambda c: c.train.recompute == "modules",
        (_RECOMPUTE, "modules"),
        f"train.recompute_modules has an effect with {_RECOMPUTE}=modules only",
    ),
    Rule(
        "offload_device",
        (_OFFLOAD, "cluster.device"),
        f"{_OFFLOAD}=cpu needs a GPU: without one, activations are in host memory already",
        lambda c: c.train.offload_activations != "cpu" or uses_cuda(c),
        lambda c: [(_OFFLOAD, "none"), (_OFFLOAD, "disk")],
    ),
    needs(
        "offload_path_used",
        "train.offload_path",
        "",
        _OFFLOAD,
        lambda c: c.train.offload_activations == "disk",
        (_OFFLOAD, "disk"),
        f"train.offload_path has an effect with {_OFFLOAD}=disk only",
    ),
)
