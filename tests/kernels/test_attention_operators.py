"""The operators of the attention kernels, by the plain bodies that a CPU runs: under torch.compile, autocast, and alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megalm_kernels import dispatch, flash_attention
from megalm_kernels.attention.call import Call
from megalm_kernels.attention.operators import HEAD_DIMS, attention_backward_op, attention_forward_op, attention_triton
from megalm_kernels.attention.reference import attention_reference

SLOPES = torch.tensor([0.5, 0.25, 1.0, 0.125])
STARTS_Q, STARTS_K = (torch.tensor(starts, dtype=torch.int32) for starts in ([0, 2, 2, 6], [0, 3, 4, 6]))
CALLS = {
    "causal": Call(-1, 0, 0.2),
    "all features": Call(3, 1, 0.3, 2.0, SLOPES, torch.ones(4), 0.25, 2**40 + 3, (1, 2, 3, 4)),
    "packed": Call(-1, 0, 0.2, cu_seqlens_q=STARTS_Q, cu_seqlens_k=STARTS_K, sinks=torch.zeros(4)),
}


def tensors(packed: bool = False, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 4, 32), (6, 2, 32), (6, 2, 32)] if packed else [(2, 5, 4, 32), (2, 6, 2, 32), (2, 6, 2, 32)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def arguments(call: Call) -> tuple[Any, ...]:
    """After q, k and v, of the forward operator."""
    numbers = (call.left, call.right, call.scale, call.softcap, call.dropout_p, call.seed, list(call.origin), call.deterministic)
    return call.alibi_slopes, call.sinks, call.cu_seqlens_q, call.cu_seqlens_k, *numbers


def gradients(function: Any, inputs: list[Tensor], call: Call) -> list[Tensor]:
    """Result, lse, and the gradients of what requires one, by both of them."""
    out, lse = function(*inputs, call)
    weights = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(x) for x in (out, lse)]
    wanted = [x for x in (*inputs, call.sinks) if x is not None and x.requires_grad]
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], wanted, weights)]


@pytest.mark.parametrize("name", CALLS)
def test_operators_satisfy_torch(name: str) -> None:
    call = CALLS[name]
    q, k, v = tensors(call.packed)
    torch.library.opcheck(attention_forward_op, (q, k, v, *arguments(call)))
    out, lse = attention_forward_op(q, k, v, *arguments(call))
    slopes, _, *rest = arguments(call)
    saved = [x.detach() for x in (q, k, v, out, lse)]
    for dlse in (None, torch.ones_like(saved[-1])):
        torch.library.opcheck(attention_backward_op, (torch.ones_like(saved[3]), dlse, *saved, slopes, *rest))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_and_gradients_are_those_of_the_formula(name: str, dtype: torch.dtype) -> None:
    """By a backward of its own, which starts from the result and lse; autograd goes through the formula."""
    call = CALLS[name]
    if call.sinks is not None:
        call.sinks.requires_grad_()
    inputs = tensors(call.packed, dtype)
    error = 1e-5 if dtype == torch.float32 else 3e-2
    for got, want in zip(gradients(attention_triton, inputs, call), gradients(attention_reference, inputs, call), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=error, atol=error)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), ()], ids=str)
def test_only_some_gradients(wanted: tuple[int, ...]) -> None:
    call = CALLS["causal"]
    everything = gradients(attention_triton, tensors(), call)
    inputs = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(tensors())]
    assert attention_triton(*inputs, call)[0].requires_grad == bool(wanted)
    if wanted:
        found = gradients(attention_triton, inputs, call)
        for i, got in zip(wanted, found[2:], strict=True):
            assert torch.equal(got, everything[2 + i])


def test_rows_that_see_nothing_have_no_gradient() -> None:
    """Whatever comes to them, through the result and through the lse."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, rows, 2, 32, generator=generator).requires_grad_() for rows in (5, 2, 2))
    found = attention_triton(q, k, v, CALLS["causal"])
    assert (found[1][..., :3] == -torch.inf).all() and torch.isfinite(found[1][..., 3:]).all()
    weights, grads = [torch.ones_like(x) for x in found], []
    for value in (1.0, 1e30):
        weights[0][:, :3], weights[1][..., :3] = value, value
        grads.append(torch.autograd.grad(found, [q, k, v], weights, retain_graph=True))
    assert (grads[0][0][:, :3] == 0).all() and (grads[0][1] != 0).any()
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_inputs_of_any_strides() -> None:
    call, (q, k, v) = CALLS["all features"], tensors()
    odd = [x.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_() for x in (q, k, v)]
    assert not odd[0].is_contiguous()
    for got, want in zip(gradients(attention_triton, odd, call), gradients(attention_triton, [q, k, v], call), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_shapes_without_data(name: str) -> None:
    """What a compiler believes is what comes out: shapes, dtypes, strides."""
    call = CALLS[name]
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.detach() for x in tensors(call.packed, dtype)]
        real = attention_forward_op(*inputs, *arguments(call))
        fake = attention_forward_op(*(x.to("meta") for x in inputs), *_on_meta(arguments(call)))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()) and b.device.type == "meta"


def _on_meta(arguments: tuple[Any, ...]) -> list[Any]:
    return [x.detach().to("meta") if isinstance(x, Tensor) else x for x in arguments]


@pytest.mark.parametrize("name", CALLS)
def test_compiles_into_one_graph(name: str) -> None:
    call = CALLS[name]
    inputs = tensors(call.packed)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = attention_triton(q * 2.0, k, v, call)
        return out.square().sum() + lse.exp().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), run(*inputs))
    for got, want in zip(*(torch.autograd.grad(f(*inputs), inputs) for f in (compiled, run)), strict=True):
        torch.testing.assert_close(got, want)


def test_the_public_function_compiles_into_one_graph(pretend_kernels: Any) -> None:
    inputs = tensors()
    with dispatch.use(attention="reference"):
        want = flash_attention(*inputs, window=(2, -1), return_lse=True)
    pretend_kernels()
    assert dispatch.implementation("attention") is attention_triton
    run = torch.compile(lambda *x: flash_attention(*x, window=(2, -1), return_lse=True), fullgraph=True, backend="aot_eager")
    for got, expected in zip(run(*inputs), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_autocast() -> None:
    """It does not touch what the operator is given, nor the lse, which stays fp32."""
    inputs, call = tensors(dtype=torch.bfloat16), CALLS["causal"]
    plain = gradients(attention_triton, inputs, call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(attention_triton, inputs, call)
    for got, want in zip(found, plain, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_gradient_of_parts_of_a_ring() -> None:
    """The backward on parts of the keys, given result and lse of all: the parts of dq add up, those of dk and dv join."""
    call = Call(-1, -1, 0.2)
    q, k, v = tensors()
    slopes, _, *rest = arguments(call)
    out, lse = attention_forward_op(q, k, v, *arguments(call))
    dout = torch.linspace(-1, 1, out.numel()).view(out.shape)
    want = torch.autograd.grad(out, [q, k, v], dout)
    q, k, v, out, lse = (x.detach() for x in (q, k, v, out, lse))
    parts = [attention_backward_op(dout, None, q, k[:, at], v[:, at], out, lse, slopes, *rest) for at in (slice(2), slice(2, 6))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], want[0], rtol=1e-5, atol=1e-6)
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([part[i] for part in parts], dim=1), want[i], rtol=1e-5, atol=1e-6)


def test_refuses() -> None:
    call = CALLS["causal"]
    for dim in (12, 20, 33, 264):
        with pytest.raises(ValueError, match=rf'head dimension is {dim}, wanted a multiple of 8 up to 256 .*attention="sdpa"'):
            attention_triton(*(torch.ones(1, 2, 1, dim),) * 3, call)
        with pytest.raises(ValueError, match=f"head dimension is {dim}, wanted a multiple of 8"), torch.no_grad():
            attention_triton(torch.ones(1, 1, 1, dim), *(torch.ones(1, 2, 1, dim),) * 2, call)  # short, as in decoding
    for dim in HEAD_DIMS:
        assert attention_triton(*(torch.ones(1, 2, 1, dim),) * 3, call)[0].shape[-1] == dim
    q, k, v = (x.double() for x in tensors())
    with pytest.raises(ValueError, match=r"dtype of q is torch\.float64"):
        attention_triton(q, k, v, call)
