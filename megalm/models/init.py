"""Initial weights as a function of (seed, parameter name): the same on every layout, whichever rank draws them.

Every parameter has its own generator, seeded by a hash of the run's seed and the parameter's full name; a rank draws
the whole tensor and keeps its slice. Nothing depends on the order of construction, the stage or the rank.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megalm.config.model import ModelConfig

_RESIDUAL = ("attention.out.weight", "mlp.down.weight", "mlp.shared.down.weight")  # each adds to the residual stream: 2 per layer
_RESIDUAL_EXPERT = ".experts.down."


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """The whole initial tensor of one parameter, fp32 on the CPU.

    Norm scales are 1, biases 0, matrices normal with `init_std`, residual projections with init_std / sqrt(2 layers)
    (Radford et al. 2019). Stacked matrices of experts are drawn one by one, expert i's under the name `name.i`.
    """
    if len(shape) == 3:
        return torch.stack([initial_value(f"{name}.{expert}", shape[1:], config, seed) for expert in range(shape[0])])
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    residual = name.endswith(_RESIDUAL) or _RESIDUAL_EXPERT in name
    std = config.init_std / math.sqrt(2 * config.num_layers) if residual else config.init_std
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))
    return torch.randn(shape, generator=generator).mul_(std)


class NoInitialisation(TorchFunctionMode):
    """Modules are made without torch's own initial values: here they are drawn by name, later.

    On the meta device torch's `normal_` would import its compiler, 860 modules and 1.5 s of every rank's start.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))
