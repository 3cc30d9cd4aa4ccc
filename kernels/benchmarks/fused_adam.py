"""One step of AdamW over one flat buffer, in the four ways to keep the parameters.

Bytes per parameter: fp32 28 (read p, g, m, v, write p, m, v); bf16 with an fp32 master 28 (p is only written); with a 16-bit
remainder 26; rounded by chance, with nothing beside p, 22. Moments are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megalm_kernels.benchmarks.harness import Absent, Case, Function, Provider, Work, find, standard
from megalm_kernels.fused_adam import fused_adam, fused_adam_reference
from megalm_kernels.rounding import join_fp32, split_fp32

_SIZES = {"tiny": [4096], "quick": [2**28], "full": [2**24, 2**28, 2**30]}
_BYTES = {"fp32": 28, "master": 28, "remainder": 26, "chance": 22}
_STEP = dict(step=3, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


def cases(sizes: str) -> Iterator[Case]:
    """fp32 in every size, the others in the last but one."""
    for numel in _SIZES[sizes]:
        yield _case("fp32", numel)
    for kept in ("master", "remainder", "chance"):
        yield _case(kept, _SIZES[sizes][len(_SIZES[sizes]) // 2])


def _case(kept: str, numel: int) -> Case:
    """Inputs: param, grad, exp_avg, exp_avg_sq, and the master or the remainder."""

    def make(device: torch.device) -> list[Tensor]:
        exact, grad, first = (torch.randn(numel, device=device) for _ in range(3))
        param, *beside = {
            "fp32": lambda: (exact,),
            "master": lambda: (exact.bfloat16(), exact),
            "remainder": lambda: split_fp32(exact),
            "chance": lambda: (exact.bfloat16(),),
        }[kept]()
        return [param, grad.to(param.dtype), first, torch.rand(numel, device=device), *beside]

    def call(function: Function) -> Function:
        def update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, beside: Tensor | None = None) -> None:
            features: dict[str, Any] = {kept: beside} if beside is not None else {}
            function(p, g, m, v, **_STEP, **features, **({"stochastic_seed": 1} if kept == "chance" else {}))

        return update

    def changed(inputs: list[Tensor]) -> list[Tensor]:
        return [_parameters(kept, inputs), *inputs[2:4]]

    def exact(p: Tensor, g: Tensor, m: Tensor, v: Tensor, beside: Tensor | None = None) -> list[Tensor]:
        p = _parameters(kept, [p, g, m, v] if beside is None else [p, g, m, v, beside]).double()
        fused_adam_reference(p, g, m, v, **_STEP)  # type: ignore[arg-type]
        return [p, m, v]

    dtype = torch.float32 if kept == "fp32" else torch.bfloat16
    reference = call(fused_adam_reference)
    providers = standard("fused_adam", call(fused_adam), reference, *(_peers() if kept == "fp32" else []))
    if kept == "chance":  # its random numbers are made on the host's side: not one graph
        providers = [provider for provider in providers if provider.name != "torch.compile"]
    return Case(
        "fused_adam", f"{numel:,} {kept}", dtype, make, exact, providers, Work(_BYTES[kept] * numel), changed=changed
    )  # fmt: skip


def _parameters(kept: str, inputs: list[Tensor]) -> Tensor:
    """What the steps accumulate in."""
    if kept == "remainder":
        return join_fp32(inputs[0].bfloat16(), inputs[4])
    return inputs[4] if kept == "master" else inputs[0]


def _peers() -> list[Provider]:
    """Of fp32 parameters; none takes bf16 parameters with fp32 moments as they are."""
    torch_fused = Provider("torch fused", lambda: _torch(fused=True))
    torch_foreach = Provider("torch foreach", lambda: _torch(foreach=True))
    return [torch_fused, torch_foreach, Provider("deepspeed", _deepspeed)]


def _torch(**how: bool) -> Function:
    """torch.optim.AdamW's own step, without its Python around it."""
    rest = {name: value for name, value in _STEP.items() if name != "step"}

    def update(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
        steps_done = torch.full((), _STEP["step"] - 1.0, device=p.device if "fused" in how else "cpu")
        adamw([p], [g], [m], [v], [], [steps_done], amsgrad=False, maximize=False, **rest, **how)  # type: ignore[arg-type]

    return update


def _deepspeed() -> Function:
    """Its kernel, where it was built when DeepSpeed was installed: building it now takes a compiler and minutes."""
    if not find("deepspeed.git_version_info", "installed_ops").get("fused_adam"):
        raise Absent("deepspeed is installed without its fused_adam")
    kernel = find("deepspeed.ops.op_builder", "FusedAdamBuilder")().load().multi_tensor_adam
    apply = find("deepspeed.ops.adam.multi_tensor_apply", "MultiTensorApply")(2048 * 32)

    def update(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
        s = _STEP
        overflow = torch.zeros(1, dtype=torch.int32, device=p.device)
        rates = (s["lr"], s["beta1"], s["beta2"], s["eps"])
        apply(kernel, overflow, [[g], [p], [m], [v]], *rates, s["step"], 1, 1, s["weight_decay"])  # decoupled, bias corrected

    return update
