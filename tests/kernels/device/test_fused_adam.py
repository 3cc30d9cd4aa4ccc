"""The AdamW kernel: every kind of master against fp64, bit by bit where two must agree, and what must not happen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import megalm_kernels as ops
from megalm_kernels import dispatch
from megalm_kernels.rounding import join_fp32, split_fp32, stochastic_round
from tests.kernels.device import far_memory

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
KINDS = [(FP32, FP32, ""), (FP32, BF16, ""), (BF16, BF16, ""), (BF16, FP32, "master"), (FP16, FP16, "master")]
KINDS += [(BF16, BF16, "remainder"), (BF16, FP32, "chance")]
SETTINGS: dict[str, Any] = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)


@pytest.fixture(autouse=True)
def triton(device):
    with dispatch.use("triton", device.type, fused_adam="triton"):
        yield


def start(kind: str, dtype: torch.dtype, grad: torch.dtype, size: int, device: torch.device) -> dict[str, Tensor]:
    """Arguments of a step: param, grad, moments as after some steps, and the master."""
    generator = torch.Generator().manual_seed(size)
    numbers = [torch.randn(size, generator=generator) for _ in range(4)]
    master, g, m, v = numbers[0], 1e-3 * numbers[1], 1e-3 * numbers[2], 1e-6 * numbers[3].square()
    tensors = {"param": master.to(dtype), "grad": g.to(grad), "exp_avg": m, "exp_avg_sq": v}
    if kind == "master":
        tensors["master"] = master
    if kind == "remainder":
        tensors["param"], tensors["remainder"] = split_fp32(master)
    return {name: x.to(device) for name, x in tensors.items()}


def clone(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {name: x.to(dtype, copy=True) for name, x in tensors.items()}


def exact_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in fp64, with the master in the place of param."""
    whole = tensors["param"]
    if "remainder" in tensors:
        whole = join_fp32(whole, tensors["remainder"])
    exact = clone({**tensors, "param": tensors.get("master", whole)}, torch.float64)
    return {name: exact[name] for name in ("param", "grad", "exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize(("dtype", "grad", "kind"), KINDS)
@pytest.mark.parametrize("size", [1, 1300])
def test_steps_against_fp64(size, dtype, grad, kind, device):
    ours = start(kind, dtype, grad, size, device)
    again, exact = clone(ours), exact_of(ours)
    rough = clone(exact, FP32)
    chance = {"stochastic_seed": 5} if kind == "chance" else {}
    for step in (3, 4):
        settings = dict(step=step, lr=1e-2, **SETTINGS)
        ops.fused_adam(**ours, **settings, **chance)
        ops.fused_adam(**again, **settings, **chance)
        for reference in (exact, rough):
            ops.fused_adam_reference(**reference, **settings)
            if kind in ("", "chance"):  # what is kept in 16 bits is all there is
                reference["param"].copy_(ours["param"])
    for name in ours:
        assert torch.equal(ours[name], again[name]), f"{name}: a second run gave other bits"
    for name, want in exact.items():
        if kind in ("", "chance") and name == "param":
            continue  # test_rounding_of_param
        got = ours.get("master", ours[name]) if name == "param" else ours[name]
        if name == "param" and kind == "remainder":
            got = join_fp32(got, ours["remainder"])
        error, allowed = ((x.double() - want).abs().max().item() for x in (got, rough[name]))
        assert error <= 2 * allowed + 3e-7 * want.abs().max().item(), f"{name}: off by {error:.3g}, torch by {allowed:.3g}"
    if kind == "master":
        assert torch.equal(ours["param"], ours["master"].to(dtype))


@pytest.mark.parametrize(("dtype", "grad", "kind"), [kind for kind in KINDS if kind[2] in ("", "chance")])
def test_rounding_of_param(dtype, grad, kind, device):
    """Without a master: the fp32 result, which the fp32 kernel gives and fp64 confirms, rounded as it should be."""
    ours = start(kind, dtype, grad, 1300, device)
    wide, exact = {**clone(ours), "param": ours["param"].to(FP32, copy=True)}, exact_of(ours)
    settings = dict(step=7, lr=1e-2, **SETTINGS)
    ops.fused_adam(**ours, **settings, stochastic_seed=2**40 + 5 if kind == "chance" else None)
    ops.fused_adam(**wide, **settings)
    ops.fused_adam_reference(**exact, **settings)
    torch.testing.assert_close(wide["param"].double(), exact["param"], rtol=3e-7, atol=1e-7)
    rounded = stochastic_round(wide["param"], 2**40 + 5, 7) if kind == "chance" else wide["param"].to(dtype)
    assert torch.equal(ours["param"], rounded)
    assert kind != "chance" or not torch.equal(rounded, wide["param"].to(dtype))


def test_a_remainder_is_an_fp32_master(device):
    """Bit by bit over several steps, gradients large and small, and the moments too."""
    one, other = (start(kind, BF16, BF16, 1100, device) for kind in ("master", "remainder"))
    for step in range(1, 6):
        grad = (torch.randn(1100, generator=torch.Generator().manual_seed(step)) * 10.0 ** (step - 3)).to(device, BF16)
        for tensors in (one, other):
            ops.fused_adam(**{**tensors, "grad": grad}, step=step, lr=1e-3, **SETTINGS)
    assert torch.equal(join_fp32(other["param"], other["remainder"]), one["master"])
    assert torch.equal(other["exp_avg_sq"], one["exp_avg_sq"])
    error = (other["param"].float() - one["master"]).abs()
    assert (error <= (one["param"].float() - one["master"]).abs()).all()  # as near as rounding to even


@pytest.mark.parametrize("step", [1, 2, 40, 5000])
def test_scalars_of_the_device(step, device):
    """Step, learning rate and gradient scale from memory; 1 - beta^step to the last digits also in the first steps."""
    ours = start("", FP32, FP32, 300, device)
    exact = exact_of(ours)
    number = lambda x: torch.tensor(float(x), device=device)  # noqa: E731
    settings = dict(lr=number(1e-2), step=number(step), grad_scale=number(0.25), **SETTINGS)
    before = ours["param"].double()
    ops.fused_adam(**ours, **settings, found_inf=number(0))
    ops.fused_adam_reference(**exact, **{**settings, "lr": 1e-2, "step": step})
    moved, wanted = ours["param"].double() - before, exact["param"] - before
    torch.testing.assert_close(moved, wanted, rtol=2e-6, atol=3e-7)
    torch.testing.assert_close(ours["exp_avg_sq"].double(), exact["exp_avg_sq"], rtol=1e-6, atol=0)


def test_corrections_in_the_first_steps(device):
    """The step itself, with lr 1 and a param of 0, where rounding of param hides nothing."""
    for step in (1, 2, 3, 100, 600):
        for beta in (0.0, 0.9, 0.999, 0.99999):
            x = {name: torch.zeros(16, device=device) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
            x["exp_avg"] += 1.0
            x["exp_avg_sq"] += 1.0
            x["grad"] += 1.0
            settings: dict[str, Any] = dict(lr=1.0, beta1=beta, beta2=beta, eps=1e-8, weight_decay=0.0)
            ops.fused_adam(**x, step=torch.tensor(float(step), device=device), **settings)
            wanted = -1 / (1 - beta**step) * (1 - beta**step) ** 0.5
            assert x["param"].double().div(wanted).sub(1).abs().max() < 1e-6, (step, beta)


@pytest.mark.parametrize(("dtype", "grad", "kind"), KINDS)
def test_found_inf_leaves_everything(dtype, grad, kind, device):
    ours = start(kind, dtype, grad, 40, device)
    ours["grad"][3] = torch.inf
    before = clone(ours)
    chance = {"stochastic_seed": 5} if kind == "chance" else {}
    for flag in (1.0, 2.0, torch.nan):
        ops.fused_adam(**ours, step=3, lr=1e-2, **SETTINGS, **chance, found_inf=torch.tensor([flag], device=device))
        assert all(torch.equal(ours[name], before[name]) for name in ours), flag
    ops.fused_adam(**ours, step=3, lr=1e-2, **SETTINGS, **chance, found_inf=torch.zeros(1, device=device))
    assert not torch.equal(ours["param"], before["param"])


@pytest.mark.parametrize(("dtype", "grad", "kind"), KINDS)
def test_a_nan_is_seen_in_the_param(dtype, grad, kind, device):
    """Of the NaN that a GPU makes, 0x7FFFFFFF, the upper half rounded up would be -0."""
    ours = start(kind, dtype, grad, 40, device)
    ours["exp_avg"].view(torch.int32)[3] = 0x7FFFFFFF
    chance = {"stochastic_seed": 5} if kind == "chance" else {}
    ops.fused_adam(**ours, step=3, lr=1e-2, **SETTINGS, **chance)
    assert torch.isnan(ours["param"]).nonzero().tolist() == [[3]]


def test_the_chance_does_not_depend_on_the_block_size(device, monkeypatch):
    results = []
    for block in (1024, 64):
        from megalm_kernels.device import fused_adam as on_device

        monkeypatch.setattr(on_device, "lookup", lambda *a, block=block: dict(BLOCK=block, num_warps=4))
        ours = start("chance", BF16, BF16, 1100, device)
        ops.fused_adam(**ours, step=3, lr=1e-2, **SETTINGS, stochastic_seed=9)
        results.append(ours["param"])
    assert torch.equal(*results)


def test_nothing_to_do(device):
    ours = start("", FP32, FP32, 0, device)
    ops.fused_adam(**ours, step=1, lr=1e-2, **SETTINGS)


def beyond_int32(device: torch.device) -> None:
    """All arguments are one buffer; the last program must reach its last elements."""
    from megalm_kernels.device import fused_adam as on_device

    x = far_memory.zeros(far_memory.COUNT, FP32, device)
    x[-1024:] = 1.0
    far_memory.run_last_programs(on_device, device)
    on_device.fused_adam(x, x, x, x, None, None, None, None, None, None, 1, 0.5, 0.9, 0.9, 0.0, 0.0, None)
    assert not (x[-1024:] == 1.0).any()


def test_addresses_beyond_int32(device):
    far_memory.run_far(__name__, "beyond_int32", device)
