"""The norms on a CPU without kernels: torch's implementation, the formulas behind the operators, masks, wrong arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import megalm_kernels as ops
from megalm_kernels import dispatch, norms
from megalm_kernels.norms import keep_mask, norm_backward, norm_forward

FEATURES: list[dict[str, Any]] = [
    {},
    dict(zero_centred=True),
    dict(dropout=0.25, seed=5),
    dict(residual=True),
    dict(residual=True, zero_centred=True, dropout=0.25, seed=5, rows=torch.tensor([3, 1, 2**40, -7, 0, 9])),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
FIXED = (0.25, 5, True, True)  # dropout, seed, centred, zero_centred


@pytest.fixture(autouse=True)
def plain():
    with dispatch.use("torch", "cpu"):
        yield


def tensors(dtype: torch.dtype, width: int = 10, count: int = 4) -> list[Tensor]:
    """x, weight, bias, residual."""
    torch.manual_seed(width)
    return [torch.randn(s).to(dtype) for s in ((2, 3, width), (width,), (width,), (2, 3, width))][:count]


def run(function: Callable[..., Any], inputs: list[Tensor], features: dict[str, Any]) -> list[Tensor]:
    """Outputs and every gradient; the last of `inputs` is the residual if there is one."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    features = dict(features)
    args, residual = (leaves[:-1], leaves[-1]) if features.pop("residual", False) else (leaves, None)
    out = function(*args, residual=residual, **features)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    return [*outputs, *torch.autograd.grad(outputs, leaves, [0.1 * y.detach() for y in outputs])]


@pytest.mark.parametrize("features", FEATURES, ids=lambda f: " ".join(f) or "plain")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [1, 7, 129])
def test_torch_and_operator_against_reference(width, dtype, features):
    x, weight, bias, residual = tensors(dtype, width)
    kept = [residual] * ("residual" in features)
    cases = [(ops.rms_norm, ops.rms_norm_reference, norms._rms_norm_triton, [x, weight, *kept])]
    if width > 1:  # the variance of one number is 0: the gradient there is noise over eps
        cases += [(ops.layer_norm, ops.layer_norm_reference, norms._layer_norm_triton, [x, weight, bias, *kept])]
    for public, reference, triton, inputs in cases:

        def operator(*args: Tensor, triton: Any = triton, residual: Any = None, **rest: Any) -> Any:
            order = ("zero_centred", "dropout", "seed", "rows")
            default = dict(zero_centred=False, dropout=0.0, seed=0, rows=None)
            return triton(*args, 1e-5, residual, *({**default, **rest}[name] for name in order))

        want = run(reference, inputs, features)
        for function in (public, operator):
            for got, wanted in zip(run(function, inputs, features), want, strict=True):
                torch.testing.assert_close(got, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_plain_norms_are_torchs_own():
    x, weight, bias, _ = tensors(torch.bfloat16)
    assert torch.equal(ops.rms_norm(x, weight, 1e-3), F.rms_norm(x, (10,), weight, 1e-3))
    assert torch.equal(ops.layer_norm(x, weight, bias, 1e-3), F.layer_norm(x, (10,), weight, bias, 1e-3))
    assert torch.equal(ops.layer_norm(x, weight), F.layer_norm(x, (10,), weight, None, 1e-5))


@pytest.mark.parametrize("centred", [False, True])
def test_the_backward_formula_is_the_derivative(centred):
    """In fp64 by finite differences, with everything on."""
    x, weight, bias, residual = tensors(torch.float64, 5)
    inputs = [t.requires_grad_() for t in (x, weight, bias, residual)]

    def everything(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Any:
        return norms._norm(norm_forward, centred, x, weight, bias, 1e-3, residual, True, 0.25, 3)

    assert torch.autograd.gradcheck(everything, inputs)


@pytest.mark.parametrize("everything", [False, True])
def test_operators_are_registered_well(everything):
    x, weight, bias, residual = (t.flatten(0, -2) if t.dim() > 1 else t for t in tensors(torch.float32))
    rows = torch.arange(6) if everything else None
    features = FIXED if everything else (0.0, 0, False, False)
    extra = (bias, residual, rows) if everything else (None, None, None)
    leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) and t is not rows else t for t in (x, weight, *extra)]
    torch.library.opcheck(norm_forward, (*leaves, *features, 1e-5))
    y, h, mean, scale = norm_forward(x, weight, *extra, *features, 1e-5)
    h = h if everything else x
    torch.library.opcheck(norm_backward, (y, residual, h, weight, mean, scale, rows, everything, everything, *features))


def test_compiles_whole():
    x, weight, bias, residual = tensors(torch.float32)

    def everything(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Any:
        y, h = norms._layer_norm_triton(2 * x, weight, bias, 1e-5, residual, False, 0.25, 3, None)
        return norms._rms_norm_triton(y, weight, 1e-5, None, False, 0.0, 0, None) + h

    wanted = run(lambda *a, residual: everything(*a), [x, weight, bias, residual], {})
    got = run(
        torch.compile(lambda *a, residual: everything(*a), fullgraph=True, backend="aot_eager"), [x, weight, bias, residual], {}
    )
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_the_mask_is_splitmix_and_murmur():
    """The same in Python's integers."""
    low64, low32 = (1 << 64) - 1, (1 << 32) - 1

    def mix64(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & low64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & low64
        return x ^ (x >> 31)

    def mix32(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x85EBCA6B & low32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 & low32
        return x ^ (x >> 16)

    for seed, row in ((0, 0), (2**62 - 1, 5), (3, -(2**50)), (12, 2**63 - 1)):
        key = (mix64(mix64((row & low64) * 0x9E3779B97F4A7C15 & low64) + seed & low64)) & low64
        bits = [mix32(mix32((c * 0x9E3779B1 + key) & low32) ^ (key >> 32)) for c in range(50)]
        wanted = [b >> 8 >= int(0.3 * 2**24) for b in bits]
        assert keep_mask(seed, torch.tensor([row]), 50, 0.3)[0].tolist() == wanted


def test_masks_look_like_chance():
    rows, width = torch.arange(512), 512
    count = rows.numel() * width
    masks = [keep_mask(seed, rows, width, 0.25).double() - 0.75 for seed in (0, 1)]
    noise = 5 * (0.25 * 0.75 / count) ** 0.5
    assert abs(masks[0].mean()) < noise
    pairs = [(masks[0], masks[1]), (masks[0][1:], masks[0][:-1]), (masks[0][:, 1:], masks[0][:, :-1])]
    for a, b in pairs:  # seeds, rows, columns
        assert abs((a * b).mean()) < noise
    assert masks[0].mean(0).abs().max() < 5 * (0.25 * 0.75 / 512) ** 0.5
    assert masks[0].mean(1).abs().max() < 5 * (0.25 * 0.75 / 512) ** 0.5


def test_modules():
    """eps is that of the functions; a zero-centred weight begins at 0 and so is the identity's."""
    x = tensors(torch.float32, 8)[0]
    for kind, function in ((norms.RMSNorm, F.rms_norm), (norms.LayerNorm, F.layer_norm)):
        plain, centred = kind(8), kind(8, zero_centred=True)
        assert torch.equal(plain(x), function(x, (8,), torch.ones(8), eps=1e-5))
        assert torch.equal(centred.weight, torch.zeros(8)) and torch.equal(plain.weight, torch.ones(8))
        assert torch.equal(centred(x), plain(x)) and plain.state_dict().keys() == centred.state_dict().keys()
        with torch.no_grad():
            centred.weight.fill_(1.0)
        torch.testing.assert_close(centred(x), 2 * plain(x))


def test_compiles_with_its_checks():
    x, weight, _, residual = tensors(torch.float32)
    compiled = torch.compile(ops.rms_norm, fullgraph=True, backend="eager")
    for got, want in zip(*(f(x, weight, 1e-3, residual=residual, seed=3) for f in (compiled, ops.rms_norm)), strict=True):
        assert torch.equal(got, want)


X, W = torch.ones(2, 3, 8), torch.ones(8)
WRONG: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    (r"the shape of x is \(\), wanted", (torch.tensor(1.0), W), {}),
    (r"the shape of x is \(2, 0\), wanted", (torch.ones(2, 0), W), {}),
    ("the dtype of x is torch.int64", (X.long(), W), {}),
    ("the dtype of weight is torch.int64", (X, W.long()), {}),
    (r"the shape of weight is \(7,\), wanted \(8,\)", (X, W[1:]), {}),
    ("the device of weight is meta", (X, W.to("meta")), {}),
    ("the dtype of residual is torch.int64", (X, W), dict(residual=X.long())),
    (r"the shape of residual is \(2, 8\)", (X, W), dict(residual=X[0, :2])),
    ("the device of residual is meta", (X, W), dict(residual=X.to("meta"))),
    ("the dtype of rows is torch.int32", (X, W), dict(rows=torch.arange(6, dtype=torch.int32))),
    (r"the shape of rows is \(5,\), wanted \(6,\)", (X, W), dict(rows=torch.arange(5))),
    ("the device of rows is meta", (X, W), dict(rows=torch.arange(6, device="meta"))),
    ("dropout is 1.0, wanted at least 0 and less than 1", (X, W), dict(dropout=1.0)),
    ("seed is -1, wanted at least 0", (X, W), dict(seed=-1)),
    ("seed is of type float, wanted an int", (X, W), dict(seed=1.5)),
    ("seed is None, wanted an int", (X, W), dict(seed=None)),
    ("dropout is None, wanted a number", (X, W), dict(dropout=None)),
    ("eps is -1.0, wanted at least 0", (X, W), dict(eps=-1.0)),
    ("eps is nan, wanted at least 0", (X, W), dict(eps=float("nan"))),
    ("eps is None, wanted a number", (X, W), dict(eps=None)),
    ("x is of type list, wanted a Tensor", ([1.0], W), {}),
    ("x is None, wanted a Tensor", (None, W), {}),
    ("weight is None, wanted a Tensor", (X, None), {}),
    ("residual is of type int, wanted a Tensor", (X, W), dict(residual=1)),
    ("rows is of type list, wanted a Tensor", (X, W), dict(rows=[0, 1])),
]


@pytest.mark.parametrize(("words", "args", "named"), WRONG)
def test_wrong_arguments(words, args, named):
    for name in ("rms_norm", "layer_norm"):
        with pytest.raises(ValueError, match=f"{name}: {words}"):
            getattr(ops, name)(*args, **named)


@pytest.mark.parametrize(
    ("words", "bias"),
    [("the dtype of bias is torch.bfloat16", W.bfloat16()), ("the shape of bias", W[1:]), ("the device of bias", W.to("meta"))],
)
def test_wrong_bias(words, bias):
    with pytest.raises(ValueError, match=f"layer_norm: {words}"):
        ops.layer_norm(X, W, bias)


@pytest.mark.parametrize("name", ["x", "weight", "residual"])
def test_the_kernels_refuse_fp64(name):
    """With what to do; torch's operators take it."""
    given = {"x": X, "weight": W, "residual": X} | {name: (W if name == "weight" else X).double()}
    ops.rms_norm(**given)
    features = (1e-5, given["residual"], False, 0.0, 0, None)
    remedy = r"wanted .* \(others: kernels.{0}=torch or use\({0}=\"torch\"\)\)"
    with pytest.raises(ValueError, match=f"rms_norm with Triton: the dtype of {name} .* {remedy.format('rms_norm')}"):
        norms._rms_norm_triton(given["x"], given["weight"], *features)
    with pytest.raises(ValueError, match=f"layer_norm with Triton: the dtype of {name} .* {remedy.format('layer_norm')}"):
        norms._layer_norm_triton(given["x"], given["weight"], None, *features)
