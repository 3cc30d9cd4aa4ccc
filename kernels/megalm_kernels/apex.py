"""NVIDIA's apex: whether it is there, and its kernels as implementations of fused_adam, rms_norm and layer_norm.

It is never required, and never imported to find out: PyPI's package of that name is an old web toolkit, whose import fails
or, worse, does not. It is looked for by the files that only NVIDIA's has, and by the names of its compiled modules.

What apex does not do itself is done around it in torch, with the passes over memory that this costs: a residual, dropout, a
zero-centred weight, an fp32 master. What cannot be done so raises ValueError: a remainder, rounding by chance, a 16-bit
parameter with an fp32 gradient.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm_kernels.arguments import refuse
from megalm_kernels.dispatch import register

BUILD = (
    "git clone https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
)
_FILES = ("normalization/fused_layer_norm.py", "optimizers/fused_adam.py")
_COMPILED = ("amp_C", "fused_layer_norm_cuda")
_CHUNK = 2048 * 32  # elements that one of apex's blocks works on, as its own callers ask for
_DECOUPLED = 1  # apex's number for AdamW


@dataclass(frozen=True)
class Apex:
    """What is installed under the name apex."""

    state: str  # absent | wrong package | python only | full
    folder: str = ""

    @property
    def words(self) -> str:
        """The state as a sentence's end."""
        if self.state == "wrong package":
            return f"{self.folder} is another package of that name (PyPI's web toolkit), not NVIDIA's"
        if self.state == "python only":
            return f"without its CUDA extensions (python only), at {self.folder}"
        return "not installed" if self.state == "absent" else f"with its CUDA extensions, at {self.folder}"

    @property
    def mend(self) -> str:
        """The command that installs the right one; empty where it is installed."""
        commands = {
            "absent": f"{BUILD}  # if wanted; PyPI's apex is another package",
            "wrong package": f"pip uninstall apex  # NVIDIA's, if wanted: {BUILD}",
            "python only": BUILD,
        }
        return commands.get(self.state, "")


def find_apex() -> Apex:
    """Look, without importing it."""
    spec = importlib.util.find_spec("apex")
    if spec is None or not (spec.submodule_search_locations or spec.origin):
        return Apex("absent")
    if not spec.submodule_search_locations:
        return Apex("wrong package", str(spec.origin))  # a single file
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not all((folder / file).is_file() for file in _FILES):
        return Apex("wrong package", str(folder))
    built = all(importlib.util.find_spec(name) for name in _COMPILED)
    return Apex("full" if built else "python only", str(folder))


@cache
def _found() -> Apex:
    return find_apex()


def apex_obstacle(device_type: str) -> str:
    """Why apex's kernels cannot run on this kind of device, as words after "apex: "; '' if they can."""
    found = _found()
    if found.state != "full":
        return found.words
    return "" if device_type == "cuda" else "runs on a GPU only"


def _fused_adam_apex(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int | Tensor, lr: float | Tensor,
    beta1: float, beta2: float, eps: float, weight_decay: float, master: Tensor | None = None, remainder: Tensor | None = None,
    stochastic_seed: int | None = None, grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    """apex's multi-tensor Adam on lists of one tensor; the one with scalars on the device if any is there."""
    import amp_C

    for name, value in {"remainder": remainder, "stochastic_seed": stochastic_seed}.items():
        if value is not None:
            raise refuse("fused_adam", f"{name} (with kernels.fused_adam=apex)", "given", "none: apex has no such thing")
    target = param if master is None else master
    if target.dtype != torch.float32 and grad.dtype != target.dtype:
        wanted = f"{target.dtype}, that of param: apex has no other"
        raise refuse("fused_adam", "the dtype of grad (with kernels.fused_adam=apex)", grad.dtype, wanted)
    lists = [[grad.to(target.dtype)], [target], [exp_avg], [exp_avg_sq]]
    device = param.device
    skip = torch.zeros(1, dtype=torch.int32, device=device)
    if grad_scale is None and found_inf is None and not isinstance(step, Tensor) and not isinstance(lr, Tensor):
        amp_C.multi_tensor_adam(_CHUNK, skip, lists, lr, beta1, beta2, eps, step, _DECOUPLED, 1, weight_decay)
    else:
        if found_inf is not None:
            skip = (found_inf != 0).to(torch.int32).reshape(1)
        steps = step.to(torch.int32).reshape(1) if isinstance(step, Tensor) else torch.full_like(skip, step)
        rates = torch.as_tensor(lr, dtype=torch.float32, device=device).reshape(1)
        scale = torch.ones(1, device=device) if grad_scale is None else grad_scale.reshape(1)
        amp_C.multi_tensor_adam_capturable(
            _CHUNK, skip, lists, rates, beta1, beta2, eps, steps, _DECOUPLED, 1, weight_decay, scale
        )
    if master is not None:
        param.copy_(master if found_inf is None else torch.where(skip != 0, param.flatten(), master.flatten()).view(param.shape))


def _norm(
    layer: bool, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None, zero_centred: bool,
    dropout: float, seed: int, rows: Tensor | None,
) -> Any:  # fmt: skip
    """Dropout and the residual in torch, then apex's norm on operands of one dtype: it has no bf16 with an fp32 weight."""
    from apex.normalization import fused_layer_norm as norms

    from megalm_kernels.norms import before_norm, operands

    h = before_norm(x, residual, dropout, seed, rows)
    operand, scale, shift = operands(h, weight, bias, zero_centred)
    if layer:
        shift = torch.zeros_like(scale) if shift is None else shift
        y = norms.fused_layer_norm_affine(operand, scale, shift, (x.shape[-1],), eps)
    else:
        y = norms.fused_rms_norm_affine(operand, scale, (x.shape[-1],), eps)
    return y.to(x.dtype) if residual is None else (y.to(x.dtype), h)


def _rms_norm_apex(x: Tensor, weight: Tensor, *rest: Any) -> Any:
    return _norm(False, x, weight, None, *rest)


def _layer_norm_apex(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    return _norm(True, x, weight, bias, *rest)


register("fused_adam", "apex", _fused_adam_apex, apex_obstacle)
register("rms_norm", "apex", _rms_norm_apex, apex_obstacle)
register("layer_norm", "apex", _layer_norm_apex, apex_obstacle)
