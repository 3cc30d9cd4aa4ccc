"""One AdamW step on the CPU: as torch does it, as the formula says, as an operator of torch, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import megalm_kernels as ops
from megalm_kernels import rounding
from megalm_kernels.fused_adam import _fused_adam_op, _fused_adam_triton
from megalm_kernels.rounding import join_fp32, random16, split_fp32, stochastic_round

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
KINDS = [(FP32, FP32, ""), (FP32, BF16, ""), (BF16, BF16, ""), (BF16, FP32, "master"), (FP16, FP16, "master")]
KINDS += [(BF16, BF16, "remainder"), (BF16, FP32, "chance")]
CHANCE: dict[str, Any] = {"param": torch.zeros(33, dtype=BF16)}
SETTINGS: dict[str, Any] = dict(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


def start(dtype: torch.dtype = FP32, grad: torch.dtype = FP32, kind: str = "", size: int = 33) -> dict[str, Any]:
    torch.manual_seed(0)
    master = torch.linspace(-1, 1, size)
    given: dict[str, Any] = {"param": master.to(dtype, copy=True), "grad": torch.randn(size).to(grad)}
    given |= {"exp_avg": torch.zeros(size), "exp_avg_sq": torch.zeros(size)}
    if kind == "master":
        given["master"] = master
    if kind == "remainder":
        given["param"], given["remainder"] = split_fp32(master)
    if kind == "chance":
        given["stochastic_seed"] = 3
    return given


def copied(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in given.items()}


def test_the_fp32_call_is_torchs_fused_adamw_to_the_bit():
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
    ours, m, v = parameter.detach().clone(), torch.zeros(1000), torch.zeros(1000)
    oracle = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(1, 5):
        parameter.grad = torch.randn(1000)
        ops.fused_adam(ours, parameter.grad, m, v, step=step, **SETTINGS)
        oracle.step()
    assert torch.equal(ours, parameter)
    assert torch.equal(v, oracle.state[parameter]["exp_avg_sq"])


@pytest.mark.parametrize(("dtype", "grad", "kind"), KINDS)
def test_equals_the_formula(dtype, grad, kind):
    ours = start(dtype, grad, kind)
    plain = copied(ours)
    scale = torch.tensor(0.5)
    for step in (1, 2, 3):
        for given, function in ((ours, ops.fused_adam), (plain, ops.fused_adam_reference)):
            function(**given, **SETTINGS, step=step, grad_scale=scale, found_inf=torch.zeros(1))
    for name in ("exp_avg", "exp_avg_sq", "master"):
        if name in ours:
            torch.testing.assert_close(ours[name], plain[name], rtol=2e-6, atol=1e-8)
    if kind == "remainder":
        whole = [join_fp32(given["param"], given["remainder"]) for given in (ours, plain)]
        torch.testing.assert_close(*whole, rtol=2e-6, atol=1e-8)
    last_bit = {FP32: 2e-6, BF16: 2**-7, FP16: 2**-10}[dtype]  # what lies between two may go either way
    torch.testing.assert_close(ours["param"], plain["param"], rtol=last_bit, atol=1e-8)


def test_several_steps_equal_the_formula_in_fp64():
    ours = start(size=1000)
    exact = {name: x.double() for name, x in ours.items()}
    for step in range(1, 6):
        grad = torch.randn(1000)
        ops.fused_adam(**{**ours, "grad": grad}, **SETTINGS, step=step)
        ops.fused_adam_reference(**{**exact, "grad": grad.double()}, **SETTINGS, step=step)
    for name in ("param", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("dtype", "grad", "kind"), KINDS)
@pytest.mark.parametrize("function", [ops.fused_adam, ops.fused_adam_reference])
def test_found_inf_leaves_everything(function, dtype, grad, kind):
    ours = start(dtype, grad, kind)
    if kind != "remainder":
        ours["param"].add_(0.1)  # a param that is not its master rounded stays, too
    before = copied(ours)
    ours["grad"][5] = before["grad"][5] = torch.inf
    function(**ours, **SETTINGS, step=1, found_inf=torch.tensor(3.0))
    assert all(torch.equal(ours[name], before[name]) for name in ours if name != "stochastic_seed")


def test_scalars_as_tensors_are_the_scalars():
    one, other = start(), start()
    ops.fused_adam(**one, **SETTINGS, step=2)
    ops.fused_adam(**other, **{**SETTINGS, "lr": torch.tensor(1e-2)}, step=torch.tensor(2.0))
    torch.testing.assert_close(one["param"], other["param"], rtol=1e-7, atol=0)


def test_the_gradient_is_not_written():
    ours = start()
    before = ours["grad"].clone()
    ops.fused_adam(**ours, **SETTINGS, step=1, grad_scale=torch.tensor(0.5))
    assert torch.equal(ours["grad"], before)


def op_arguments(given: dict[str, Any], on_device: bool) -> tuple:
    scalars = [torch.tensor(2.0), torch.tensor(1e-2), torch.tensor(0.5), torch.tensor(0.0)] if on_device else [None] * 4
    tensors = [given[name] for name in ("param", "grad", "exp_avg", "exp_avg_sq")]
    masters = [given.get("master"), given.get("remainder")]
    return *tensors, *masters, *scalars, 2, 1e-2, 0.9, 0.95, 1e-8, 0.1, given.get("stochastic_seed")


@pytest.mark.parametrize(
    ("dtype", "grad", "kind", "on_device"),
    [(FP32, FP32, "", False), (BF16, BF16, "remainder", True), (BF16, FP32, "chance", False)],
)
def test_opcheck(dtype, grad, kind, on_device):
    torch.library.opcheck(_fused_adam_op, op_arguments(start(dtype, grad, kind), on_device))


def test_compiles_in_one_graph():
    def two_steps(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, remainder: Tensor) -> Tensor:
        for step in (1, 2):
            _fused_adam_triton(param, 2 * grad, m, v, step, 1e-2, 0.9, 0.95, 1e-8, 0.1, remainder=remainder)
        return param + 1

    compiled = torch.compile(two_steps, backend="aot_eager", fullgraph=True)
    results = []
    for function in (two_steps, compiled):
        given = start(BF16, BF16, "remainder")
        results.append([function(*given.values()), *given.values()])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(param=torch.zeros(33, dtype=torch.float64)),
            "dtype of param is torch.float64, wanted torch.float32 or torch.bfloat16",
        ),
        (dict(grad=torch.zeros(32)), r"shape of grad is \(32,\), wanted \(33,\)"),
        (dict(grad=torch.zeros(33, dtype=torch.int32)), "dtype of grad is torch.int32"),
        (dict(exp_avg=torch.zeros(33, dtype=BF16)), "dtype of exp_avg is torch.bfloat16, wanted torch.float32"),
        (dict(exp_avg_sq=torch.zeros(66)[::2]), r"exp_avg_sq is a view with strides \(2,\), wanted contiguous"),
        (dict(exp_avg=torch.zeros(33, device="meta")), "device of exp_avg is meta, wanted cpu"),
        (
            dict(master=torch.zeros(33)),
            r"dtype of param \(with master\) is torch.float32, wanted torch.bfloat16 or torch.float16",
        ),
        (dict(remainder=torch.zeros(33, dtype=torch.int16)), r"dtype of param \(with remainder\) is torch.float32"),
        (dict(stochastic_seed=1), r"dtype of param \(with stochastic_seed\) is torch.float32, wanted torch.bfloat16"),
        (dict(master=torch.zeros(33), stochastic_seed=1), "master and stochastic_seed is given, wanted one of them at most"),
        (
            dict(param=torch.zeros(33, dtype=BF16), remainder=torch.zeros(33)),
            "dtype of remainder is torch.float32, wanted torch.int16",
        ),
        (dict(step=0), "step is 0, wanted at least 1"),
        (dict(step=torch.tensor(1)), "dtype of step is torch.int64, wanted torch.float32"),
        (dict(lr=torch.ones(2)), r"shape of lr is \(2,\), wanted one element"),
        (dict(grad_scale=torch.ones((), device="meta")), "device of grad_scale is meta"),
        (dict(found_inf=torch.tensor(False)), "dtype of found_inf is torch.bool"),
        (dict(beta1=1.0), "beta1 is 1.0, wanted at least 0 and less than 1"),
        (dict(beta2=None), "beta2 is None, wanted a number"),
        (dict(lr=-1e-3), "lr is -0.001, wanted at least 0"),
        (dict(lr="1e-3"), "lr is of type str, wanted a number or a Tensor"),
        (dict(eps=-1e-8), "eps is -1e-08, wanted at least 0"),
        (dict(eps=torch.ones(())), "eps is of type Tensor, wanted a number"),
        (dict(weight_decay=-0.1), "weight_decay is -0.1, wanted at least 0"),
        (dict(step=1.5), "step is of type float, wanted an int or a Tensor"),
        (dict(step=None), "step is None, wanted an int or a Tensor"),
        (dict(grad_scale=0.5), "grad_scale is of type float, wanted a Tensor"),
        (dict(found_inf=True), "found_inf is of type bool, wanted a Tensor"),
        (dict(exp_avg=None), "exp_avg is None, wanted a Tensor"),
        (dict(grad=[0.0] * 33), "grad is of type list, wanted a Tensor"),
        (CHANCE | dict(stochastic_seed=-1), r"stochastic_seed is -1, wanted at least 0 and less than 2\*\*64"),
        (CHANCE | dict(stochastic_seed=2**64), "stochastic_seed is 18446744073709551616"),
        (CHANCE | dict(stochastic_seed=0.5), "stochastic_seed is of type float, wanted an int"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=f"fused_adam: .*{message}"):
        ops.fused_adam(**{**start(), **SETTINGS, "step": 1, **change})


def test_every_seed_of_64_bits_goes_through_the_operator():
    """An operator of torch takes int64, so the upper half of the seeds is negative there."""
    for seed in (2**63 - 1, 2**63, 2**64 - 1):
        one, other = start(BF16, BF16, "chance"), start(BF16, BF16, "chance")
        one["stochastic_seed"] = other["stochastic_seed"] = seed
        ops.fused_adam(**one, **SETTINGS, step=1)
        _fused_adam_triton(**other, **SETTINGS, step=1)
        assert torch.equal(one["param"], other["param"])


def test_two_halves_are_the_whole():
    """Every kind of fp32 number, ties and the largest too; the first half is the nearest bf16."""
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=torch.Generator().manual_seed(0))
    edges = [0, 0x8000, 0x7FFF, 0x18000, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, -0x80000000, -0x807FFF]
    x = torch.cat([bits, torch.tensor(edges)]).to(torch.int32).view(FP32)
    x = x[~torch.isnan(x)]
    high, low = split_fp32(x)
    assert torch.equal(join_fp32(high, low).view(torch.int32), x.view(torch.int32))
    finite = high.isfinite()
    assert ((high.double() - x.double()).abs() <= (x.to(BF16).double() - x.double()).abs())[finite].all()
    high, _ = split_fp32(torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(FP32))
    assert torch.isnan(high).all()


def test_rounding_by_chance_is_right_on_average():
    """4 sigma over 20000 draws; each of the two neighbours, and no other number."""
    draws = 20000
    for value in (1.0, 1.0 + 2**-9, -3.3, 1e-20):
        x = torch.full((draws,), value)
        rounded = stochastic_round(x, 5, 1).float()
        gap = (rounded.max() - rounded.min()).item()
        assert rounded.unique().numel() == (1 if value == 1.0 else 2)
        assert abs(rounded.double().mean().item() - x[0].item()) <= 4 * 0.5 * gap / draws**0.5
    for value in (torch.inf, -torch.inf, 0.0, 1.5):
        assert torch.equal(stochastic_round(torch.full((50,), value), 5, 1).float(), torch.full((50,), value))
    nan = torch.full((50,), 0x7FFFFFFF, dtype=torch.int32).view(FP32)
    assert torch.isnan(stochastic_round(nan, 5, 1)).all()


def test_the_chance_is_the_distance(monkeypatch):
    """Of all 2^16 random numbers, as many round up as the low half of the bits says."""
    monkeypatch.setattr(rounding, "random16", lambda count, *_: torch.arange(2**16))
    for low in (0, 1, 0x8000, 0xFFFF):
        x = torch.full((2**16,), 0x3F800000 + low, dtype=torch.int32).view(FP32)
        assert (stochastic_round(x, 5, 1).float() > 1.0).sum().item() == low


def test_the_chance_is_of_seed_step_and_index():
    assert torch.equal(random16(1000, 7, 3)[:101], random16(101, 7, 3))
    assert torch.equal(random16(8, 7, 3), random16(8, 7, torch.tensor(3.0)))
    for seed, step in ((8, 3), (7, 4), (7 + 2**32, 3)):
        assert not torch.equal(random16(1000, 7, 3), random16(1000, seed, step))
    counts = random16(2**16, 1, 1).bincount(minlength=2**16)
    assert counts.max() < 12  # Poisson with mean 1


def test_the_generator_is_philox_4x32_10():
    """The known answers of Random123 (Salmon et al. 2011) for a counter and key of zeros and of ones."""
    from megalm_kernels.rounding import _philox

    ones = 0xFFFFFFFF
    of_zeros = [word.item() for word in _philox([torch.tensor(0)] * 4, 0, 0)]
    of_ones = [word.item() for word in _philox([torch.tensor(ones)] * 4, ones, ones)]
    assert of_zeros == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert of_ones == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
