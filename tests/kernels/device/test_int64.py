"""Kernels that read rows with strides, at addresses that int32 cannot count. Each case ends a process of its own if it fails.

A product of a row and its stride that is computed in int32 becomes negative: the read is outside of the tensor, which kills
the process, or elsewhere in it, which the comparison sees. The flat buffers' kernels have the like in their own files.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm_kernels import (
    bias_gelu,
    bias_gelu_reference,
    dispatch,
    flash_attention,
    flash_attention_reference,
    geglu,
    layer_norm,
    rms_norm,
    rotary,
    rotary_reference,
    swiglu,
    swiglu_reference,
    tables,
)
from tests.kernels.device import far_memory

STRIDE, ROWS, WIDTH = 2**30, 4, 48  # the last row begins at 3 * 2^30; in bf16, 6 GB of address space


def far_rows(device: torch.device, seed: int = 0, width: int = WIDTH) -> Tensor:
    """(ROWS, width) bf16, random, whose rows are STRIDE elements apart."""
    x = far_memory.zeros((ROWS - 1) * STRIDE + width, torch.bfloat16, device).as_strided((ROWS, width), (STRIDE, 1))
    return x.copy_(torch.randn(ROWS, width, generator=torch.Generator().manual_seed(seed)))


def same_near(function: Callable[..., Tensor], *far: Tensor) -> None:
    """Outputs and gradients, with a gradient of the output that is far apart too, equal those of contiguous copies."""
    results = []
    for inputs in (far, [x.clone(memory_format=torch.contiguous_format) for x in far]):
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = function(*leaves)
        grads = torch.autograd.grad(y, leaves, inputs[0].view(y.shape))
        results.append([y.detach(), *grads])
    assert all(torch.equal(got, want) for got, want in zip(*results, strict=True)), "other numbers than those of near rows"


def gated_rows(device: torch.device) -> None:
    with dispatch.use("triton", device.type):
        for function in (swiglu, geglu):
            same_near(function, far_rows(device), far_rows(device, 1))


def bias_gelu_rows(device: torch.device) -> None:
    bias = torch.randn(WIDTH, device=device).bfloat16()
    with dispatch.use("triton", device.type):
        same_near(lambda x: bias_gelu(x, bias), far_rows(device))


def rotary_rows(device: torch.device) -> None:
    """With the samples, the tokens and the heads far apart; and in place, which writes there."""
    angle = torch.rand(ROWS, 8)
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    with dispatch.use("triton", device.type):
        for shape in ((ROWS, 1, 3, 16), (1, ROWS, 3, 16), (1, 3, ROWS, 16)):
            x = far_rows(device).unflatten(1, (3, 16))
            x = {0: x.unsqueeze(1), 1: x.unsqueeze(0), 2: x.transpose(0, 1).unsqueeze(0)}[shape.index(ROWS)]
            assert x.shape == shape
            same_near(lambda x: rotary(x, cos, sin), x)
            want = rotary(x, cos, sin)
            torch.testing.assert_close(want, rotary_reference(x, cos, sin), rtol=1e-2, atol=1e-2)
            assert torch.equal(rotary(x, cos, sin, inplace=True), want)


def attention_rows(device: torch.device) -> None:
    """With the tokens, packed and not, the samples, or the heads far apart."""
    q, k, v = (far_rows(device, seed, 32 * heads).unflatten(1, (heads, 32)) for seed, heads in enumerate((4, 2, 2)))
    starts = torch.tensor([0, 3, 4], dtype=torch.int32, device=device)
    with dispatch.use("auto", device.type, attention="triton"):
        same_near(flash_attention, *(x[None] for x in (q, k, v)))
        same_near(lambda *x: flash_attention(*x, deterministic=False), *(x[:, None] for x in (q, k, v)))
        same_near(lambda *x: flash_attention(*x, cu_seqlens_q=starts, cu_seqlens_k=starts), q, k, v)
        same_near(flash_attention, *(x.transpose(0, 1)[None] for x in (k, v, v)))


def attention_whole(device: torch.device) -> None:
    """More than 2^31 elements of q and of the result: the last head of the last sample is looked at."""
    from megalm_kernels.device import attention_backward, attention_forward

    for module in (attention_forward, attention_backward):
        far_memory.run_last_programs(module, device)
    samples, tokens, heads, dim = 2**14 + 1, 16, 64, 128
    q, dout = (far_memory.zeros(samples * tokens * heads * dim, torch.bfloat16, device) for _ in range(2))
    q, dout = (x.view(samples, tokens, heads, dim) for x in (q, dout))
    k, v = (far_memory.zeros(samples * tokens * dim, torch.bfloat16, device).view(samples, tokens, 1, dim) for _ in range(2))
    for x in (q, k, v, dout):
        x[-1, :, -1] = torch.randn(tokens, dim)
    near = [x[-1:, :, -1:].clone().requires_grad_() for x in (q, k, v)]
    with dispatch.use("auto", device.type, attention="triton"):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = flash_attention(*leaves)
        found = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    want = flash_attention_reference(*near)
    for got, expected in zip(found, [want, *torch.autograd.grad(want, near, dout[-1:, :, -1:])], strict=True):
        torch.testing.assert_close(got[-1:, :, -1:], expected.detach(), rtol=2e-2, atol=2e-2)


def norm_rows(device: torch.device) -> None:
    """In one pass; then in blocks of columns, which are other kernels."""
    weight, rows = torch.randn(WIDTH, device=device).bfloat16(), dict(ROWS=1, BLOCK=16, STAGES=2, num_warps=1)
    with dispatch.use("triton", device.type):
        for _ in range(2):
            same_near(lambda x: layer_norm(x, weight), far_rows(device))
            same_near(lambda x, r: sum(rms_norm(x, weight, residual=r)), far_rows(device), far_rows(device, 1))
            for name in ("norm_forward_16", "norm_backward_16", "norm_row_means"):
                more = dict(PROGRAMS=2) if "backward" in name else {}
                tables.TABLES[name] = {arch: [tables.Row(0, {**rows, **more})] for arch in tables.ARCHS}
            tables._find.cache_clear()


def gated_whole(device: torch.device) -> None:
    """One tensor of more than 2^31 elements, and halves of one: the results have as many. The last row is looked at."""
    from megalm_kernels.device import activations

    far_memory.run_last_programs(activations, device)
    rows = far_memory.COUNT // 2**14
    whole = far_memory.zeros(rows * 2**15, torch.bfloat16, device).view(rows, 2**15)
    whole[-1] = torch.randn(2**15)
    with dispatch.use("triton", device.type):
        for gate, up in (whole.chunk(2, dim=1), (whole.view(2 * rows, -1)[rows:],) * 2):
            gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
            y = swiglu(gate, up)
            found = [y.detach(), *torch.autograd.grad(y, [gate, up], gate.detach())]
            last = [x.detach()[-1].clone().requires_grad_() for x in (gate, up)]
            y = swiglu_reference(*last)
            for got, want in zip(found, [y, *torch.autograd.grad(y, last, last[0].detach())], strict=True):
                torch.testing.assert_close(got[-1, -1000:], want[-1000:].detach(), rtol=1e-2, atol=1e-2)


def bias_gelu_whole(device: torch.device) -> None:
    from megalm_kernels.device import activations

    far_memory.run_last_programs(activations, device)
    x = far_memory.zeros(far_memory.COUNT, torch.bfloat16, device).view(-1, 2**14)
    x[-1], bias = torch.randn(2**14), torch.randn(2**14, device=device)
    with dispatch.use("triton", device.type):
        y, want = bias_gelu(x, bias), bias_gelu_reference(x[-1], bias)
    torch.testing.assert_close(y[-1, -1000:], want[-1000:], rtol=1e-2, atol=1e-2)


@triton.jit
def _copy_rows_in_int32(X, Y, stride, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    tl.store(Y + tl.program_id(0) * WIDTH + column, tl.load(X + tl.program_id(0) * stride + column))


def planted(device: torch.device) -> None:
    x = far_rows(device)[:, :16]
    y = torch.zeros(ROWS, 16, dtype=x.dtype, device=device)
    _copy_rows_in_int32[(ROWS,)](x, y, STRIDE, WIDTH=16)
    assert torch.equal(x, y)


CASES = [norm_rows, gated_rows, bias_gelu_rows, rotary_rows, attention_rows, gated_whole, bias_gelu_whole, attention_whole]


def run(case: Callable[[torch.device], None], device: torch.device) -> None:
    try:
        far_memory.run_far(__name__, case.__name__, device)
    except AssertionError as error:
        raise AssertionError(
            f"{case.__name__}: died or erred beyond 2^31 elements: is an address computed in int32?\n{error}"
        ) from None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_addresses_are_int64(case: Callable[[torch.device], None], device: torch.device) -> None:
    run(case, device)


def test_an_address_in_int32_is_seen(device: torch.device) -> None:
    ends = r"(exit -11|illegal memory access|assert torch.equal\(x, y\))"  # the process killed; wrong numbers
    with pytest.raises(AssertionError, match=r"planted: died or erred beyond 2\^31 elements[\s\S]*" + ends):
        run(planted, device)
