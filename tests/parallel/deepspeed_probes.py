"""Looking at DeepSpeed itself: probes that two processes run in one start, and what they build on."""

from __future__ import annotations

import copy
import importlib
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megalm.config.parallel import ParallelConfig
from megalm.parallel.topology import Topology, build_topology
from megalm.parallel.zero import ZeroEngine
from megalm.parallel.zero_config import ModelParallelUnit, deepspeed_config, import_deepspeed
from megalm.testing import run_distributed
from tests.parallel.tiny import LR, Toy, adamw, toy_groups, toy_losses

FP32, BF16 = torch.float32, torch.bfloat16
PROBES: dict[str, dict[str, Callable[[Topology], Any]]] = {}  # module -> name -> probe


def probe(look: Callable[[Topology], Any]) -> Callable[[Topology], Any]:
    PROBES.setdefault(look.__module__, {})[look.__name__] = look
    return look


def look_at_everything(rank: int, world_size: int, module: str) -> dict[str, Any]:
    """What the probes of a test file leave, by name."""
    importlib.import_module(module)
    topology = build_topology(ParallelConfig(), torch.device("cpu"))
    seen = {}
    for name, look in PROBES[module].items():
        try:
            seen[name] = look(topology)
        except Exception:
            seen[name] = "the probe failed: " + traceback.format_exc()
    return seen


def look(module: str) -> Callable[[str], list]:
    """Run a test file's probes on two ranks; what each of them saw is had by the probe's name."""
    by_rank = run_distributed(look_at_everything, 2, module)
    return lambda name: [rank[name] for rank in by_rank]


def initialize(topology: Topology, stage: int, dtype: torch.dtype = FP32, model: nn.Module | None = None, **changes: Any) -> Any:
    """DeepSpeed itself with our configuration and some changes to it; a value None takes the key away."""
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = (model or Toy()).to(dtype)
    config = copy.deepcopy(deepspeed_config(ParallelConfig(zero=stage), dtype, 0.0))
    config["zero_optimization"] |= changes.pop("zero", {})
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    groups = [{"params": list(g.parameters.values()), "weight_decay": g.weight_decay} for g in toy_groups(model)]
    return deepspeed.initialize(model=model, optimizer=adamw(groups), config=config, mpu=ModelParallelUnit(topology))[0]


def raised(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return type(error).__name__
    return "nothing"


def build(topology: Topology, stage: int, dtype: torch.dtype = FP32, kind: type = ZeroEngine, **names: Any) -> Any:
    model = Toy().to(dtype)
    engine = kind(nn.ModuleList([model]), toy_groups(model), adamw, topology, 0.0, ParallelConfig(zero=stage), **names)
    engine.toy = model
    return engine


def norm_of(engine: Any) -> float:
    with engine.accumulate():
        for loss in toy_losses(engine.toy, 0, FP32):
            engine.scale_loss(loss).backward()
    return engine.step(LR).item()
