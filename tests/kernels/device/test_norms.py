"""The norm kernels: every feature against fp64, dropout masks bit by bit, and blocks of columns in rows of any width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megalm_kernels import dispatch, layer_norm, rms_norm, tables
from megalm_kernels.norms import keep_mask, norm_forward

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "residual": dict(residual=True),
    "everything": dict(residual=True, zero_centred=True, dropout=0.3, seed=2**61 + 7, rows=True),
    "dropout": dict(dropout=0.5, zero_centred=True),
}


def tensors(norm: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, residual: bool = False) -> list[Tensor]:
    """x, weight, for layer_norm bias, and the residual."""
    generator = torch.Generator().manual_seed(sum(shape))
    count = {"rms_norm": 1, "layer_norm": 2}[norm]
    shapes = [shape, *[shape[-1:]] * count, *[shape] * residual]
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def call(norm: str, backend: str, features: dict[str, Any], inputs: tuple[Tensor, ...]) -> Any:
    """The public function on `tensors`; rows=True: ids beyond 2^32, and below 0."""
    features = dict(features)
    inputs, residual = (inputs[:-1], inputs[-1]) if features.pop("residual", False) else (inputs, None)
    if features.pop("rows", False):
        ids = torch.arange(inputs[0].shape[:-1].numel(), device=inputs[0].device)
        features["rows"] = (ids - 2) * 1_000_000_007 * 31
    with dispatch.use("auto", inputs[0].device.type, **{norm: backend}):
        return {"rms_norm": rms_norm, "layer_norm": layer_norm}[norm](*inputs, residual=residual, **features)


def check(judge, norm: str, shape: tuple[int, ...], features: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    inputs = tensors(norm, shape, dtype, device, "residual" in features)
    floor = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2  # of few numbers torch may round each by luck
    judge(lambda *x: call(norm, "triton", features, x), lambda *x: call(norm, "torch", features, x), inputs, floor)


@pytest.fixture
def in_blocks(monkeypatch):
    """Rows in blocks of 32 columns: the kernels for wide rows, without the wide rows."""
    row = dict(BLOCK=32, STAGES=2, num_warps=1)
    for name in [name for name in tables.TABLES if name.startswith("norm_")]:
        more = dict(PROGRAMS=4) if "backward" in name else {}
        for arch in tables.ARCHS:
            monkeypatch.setitem(tables.TABLES[name], arch, [tables.Row(0, dict(ROWS=2, **row, **more))])
    tables._find.cache_clear()
    yield
    tables._find.cache_clear()


@pytest.mark.parametrize("features", ["plain", "everything"])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_against_fp64(judge, norm, features, dtype, device):
    for shape in ((1, 7), (3, 130, 40), (13, 640)):  # one row; several tiles of 64 rows per program; tiles that are not full
        check(judge, norm, shape, FEATURES[features], dtype, device)


@pytest.mark.parametrize("features", ["residual", "dropout"])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_features_alone(judge, norm, features, device):
    check(judge, norm, (9, 300), FEATURES[features], torch.bfloat16, device)


@pytest.mark.parametrize("features", ["plain", "everything"])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_rows_in_blocks_of_columns(judge, norm, features, in_blocks, dtype, device):
    for shape in ((1, 33), (13, 90)):
        check(judge, norm, shape, FEATURES[features], dtype, device)


@pytest.mark.parametrize("width", [5000, 16400])  # one pass; forward and backward in blocks
def test_wide_rows(judge, width, device):
    check(judge, "layer_norm", (4, width), FEATURES["everything"], torch.bfloat16, device)


def test_one_column(judge, dtype, device):
    check(judge, "rms_norm", (70, 1), FEATURES["residual"], dtype, device)


def test_a_variance_that_cancels(judge, in_blocks, device):
    """Far from 0 the mean of squares minus the square of the mean has no digit left in fp32."""
    x, *rest = tensors("layer_norm", (3, 100), torch.float32, device)
    judge(lambda *x: call("layer_norm", "triton", {}, x), lambda *x: call("layer_norm", "torch", {}, x), [x + 1000, *rest], 1e-5)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_dtypes_may_differ(stream, device):
    """x bf16 or fp32 with a residual of the other and an fp32 weight: each gradient has its tensor's dtype."""
    low = torch.bfloat16 if stream == torch.float32 else torch.float32
    x, weight, bias, residual = tensors("layer_norm", (5, 40), torch.float32, device, True)
    found = {}
    for backend in ("triton", "torch"):
        leaves = [t.detach().requires_grad_() for t in (x.to(low), weight, bias, residual.to(stream))]
        y, h = call("layer_norm", backend, FEATURES["everything"], tuple(leaves))
        grads = torch.autograd.grad([y, h], leaves, [y.detach(), h.detach()])
        found[backend] = [y, h, *grads]
        assert [t.dtype for t in found[backend]] == [low, stream, low, torch.float32, torch.float32, stream]
    for got, want in zip(found["triton"], found["torch"], strict=True):
        error = 2e-6 if want.dtype == torch.float32 and stream == torch.float32 else 2e-2
        torch.testing.assert_close(got, want, rtol=error, atol=error * want.abs().max().item())


def test_statistics_are_those_of_the_stored_residual(device):
    x, weight, residual = tensors("rms_norm", (6, 200), torch.bfloat16, device, True)
    y, h = call("rms_norm", "triton", {"residual": True}, (x, weight, residual))
    assert torch.equal(h, residual + x)
    assert torch.equal(y, call("rms_norm", "triton", {}, (h, weight)))


SEEDS = [0, 1, 2**31, 2**40 + 5, 2**62 - 1]


def check_mask(rows: Tensor, width: int, seed: int) -> None:
    """Forward and backward drop what `keep_mask` says, and multiply the rest."""
    x = torch.ones(len(rows), width, device=rows.device, requires_grad=True)
    residual, weight = torch.zeros_like(x), torch.ones(width, device=rows.device)
    features = dict(residual=residual, dropout=0.25, seed=seed, rows=rows)
    with dispatch.use("auto", rows.device.type, rms_norm="triton"):
        _, h = rms_norm(x, weight, **features)
    want = keep_mask(seed, rows, width, 0.25).float() / 0.75
    assert torch.equal(h, want)
    assert torch.equal(*torch.autograd.grad(h, x, torch.ones_like(h)), want)


@pytest.mark.parametrize("seed", SEEDS)
def test_masks_are_those_of_the_plain_formula(seed, device):
    rows = torch.tensor([0, 1, 2, 5, 2**31, 2**32, 2**62 + 3, -1, 2], device=device)
    for width in (16, 100, 2500):
        check_mask(rows, width, seed)


def test_masks_in_blocks_are_the_same(in_blocks, device):
    check_mask(torch.arange(7, device=device).flip(0), 100, 3)


def test_rows_default_to_their_order(device):
    x, weight = tensors("rms_norm", (2, 5, 48), torch.float32, device)
    features = dict(dropout=0.5, seed=3)
    with dispatch.use("auto", device.type, rms_norm="triton"):
        whole = rms_norm(x, weight, **features)
        part = rms_norm(x[1], weight, rows=torch.arange(5, 10, device=device), **features)
    assert torch.equal(whole[1], part)


def test_strided_inputs_and_gradients(device):
    """Rows of a slice (read in place), columns that are not neighbours (copied), a gradient that is one number."""
    x, weight, bias, residual = tensors("layer_norm", (6, 40), torch.float32, device, True)
    wide, turned = torch.zeros(6, 100, device=device), residual.t().contiguous().t()
    wide[:, 30:70] = x
    results = []
    for x_like, residual_like, w in ((x, residual, weight), (wide[:, 30:70], turned, torch.stack([weight, bias], 1)[:, 0])):
        leaves = [t.detach().requires_grad_() for t in (x_like, w, bias, residual_like)]
        y, h = call("layer_norm", "triton", {"residual": True, "dropout": 0.1}, tuple(leaves))
        results.append([y, h, *torch.autograd.grad(y.sum() + h.sum(), leaves)])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_only_one_output_used(device):
    x, weight, residual = tensors("rms_norm", (5, 24), torch.float32, device, True)
    for used in (0, 1):
        found = []
        for backend in ("triton", "torch"):
            leaves = [t.detach().requires_grad_() for t in (x, weight, residual)]
            out = call("rms_norm", backend, {"residual": True}, tuple(leaves))[used]
            grads = torch.autograd.grad(out, leaves, out.detach(), allow_unused=True)
            found.append([torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_no_rows(norm, device):
    leaves = [x.requires_grad_() for x in tensors(norm, (0, 16), torch.bfloat16, device, True)]
    y, h = call(norm, "triton", {"residual": True, "dropout": 0.1}, tuple(leaves))
    assert y.shape == h.shape == (0, 16)
    grads = torch.autograd.grad(y.sum() + h.sum(), leaves)
    assert [g.shape for g in grads] == [x.shape for x in leaves]
    assert all((g == 0).all() for g in grads)


def test_fp64_is_refused(device):
    with pytest.raises(ValueError, match=r"rms_norm with Triton: the dtype of x is torch.float64, wanted torch.float32"):
        call("rms_norm", "triton", {}, (torch.ones(2, 4, device=device).double(), torch.ones(4, device=device)))


def test_the_operator_runs_the_kernel(device, monkeypatch):
    """Else all of the above would compare torch with itself."""
    from megalm_kernels.device import norms

    launched = []
    monkeypatch.setattr(norms, "launch", lambda kernel, *args, **meta: launched.append(kernel))
    x = torch.ones(2, 4, device=device)
    norm_forward(x, x[0], None, None, None, 0.0, 0, False, False, 1e-5)
    assert launched == [norms._norm_forward]
