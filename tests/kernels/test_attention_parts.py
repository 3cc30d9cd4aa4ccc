"""Attention by parts: result, lse and gradients without autograd, for every implementation, and what merging them gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megalm_kernels import attention_part, attention_part_backward, flash_attention_reference, merge_into, use
from megalm_kernels.attention import parts

EXACT = dict(rtol=2e-5, atol=2e-5)
LOOSE = dict(rtol=4e-2, atol=4e-2)
STARTS = [torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 5, 6, 13], [0, 3, 7, 13, 13])]
PACKED: dict[str, Any] = {"cu_seqlens_q": STARTS[0], "cu_seqlens_k": STARTS[1]}
# (B, Sq, Sk, H, Hkv, D) and options; packed where B is 0
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "causal": ((2, 7, 7, 4, 2, 32), {}),
    "every key": ((2, 5, 9, 4, 1, 32), {"causal": False}),
    "more keys": ((1, 3, 8, 4, 4, 32), {"scale": 0.3}),
    "more queries": ((2, 9, 4, 4, 2, 32), {}),
    "window": ((2, 13, 13, 2, 2, 32), {"window": (3, -1)}),
    "window of a slice": ((1, 11, 6, 2, 1, 32), {"causal": False, "window": (2, -1)}),
    "window both ways": ((1, 11, 6, 2, 1, 32), {"causal": False, "window": (2, 1)}),
    "window behind": ((1, 5, 12, 2, 1, 32), {"window": (2, 0)}),
    "no keys": ((1, 3, 0, 2, 1, 32), {}),
    "no queries": ((1, 0, 3, 2, 1, 32), {}),
    "packed": ((0, 13, 13, 4, 2, 32), PACKED),
    "packed window": ((0, 14, 13, 4, 2, 32), {**PACKED, "window": (1, -1)}),
    "packed, nothing": ((0, 3, 3, 2, 1, 32), dict.fromkeys(PACKED, torch.zeros(1, dtype=torch.int32))),
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v and dout; not contiguous, as slices of a sequence are not."""
    generator = torch.Generator().manual_seed(0)
    B, Sq, Sk, H, Hkv, D = shape
    sizes = ((Sq, H), (Sk, Hkv), (Sk, Hkv), (Sq, H))
    made = [torch.randn(max(B, 1), S + 2, heads, D, generator=generator).to(dtype)[:, 1:-1] for S, heads in sizes]
    return made if B else [x[0] for x in made]


def wanted(tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """By autograd through the formula, in fp64."""
    *leaves, dout = (x.double().requires_grad_() for x in tensors)
    out, lse = flash_attention_reference(*leaves, return_lse=True, **options)
    grads = torch.autograd.grad(out, leaves, dout, materialize_grads=True) if out.requires_grad else map(torch.zeros_like, leaves)
    return [out, lse, *grads]


@pytest.mark.parametrize("implementation", ["sdpa", "torch", "reference", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_a_part_is_attention(name: str, implementation: str, pretend_kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option, in fp32 and bf16; on a CPU with masks of few rows, as a long sequence has many of."""
    shape, options = CASES[name]
    monkeypatch.setattr(parts, "_ROWS", 4)
    pretend_kernels()
    with use(attention=implementation) if implementation != "triton" else use(rotary="torch"):
        for dtype, tolerance in ((torch.float32, EXACT), (torch.bfloat16, LOOSE)):
            q, k, v, dout = inputs(shape, dtype)
            out, lse = attention_part(q, k, v, **options)
            found = [out, lse, *attention_part_backward(dout, q, k, v, out, lse, **options)]
            for got, want in zip(found, wanted([q, k, v, dout], options), strict=True):
                assert got.dtype == (torch.float32 if got is lse else dtype) and not got.requires_grad
                torch.testing.assert_close(got, want.to(got.dtype), **tolerance)


@pytest.mark.parametrize("implementation", ["sdpa", "reference", "triton"])
def test_parts_make_the_whole(implementation: str, pretend_kernels: Any) -> None:
    """Keys in three parts of which the second is invisible to some queries: merged in place, and differentiated by the whole."""
    q, k, v, dout = inputs((2, 12, 12, 4, 2, 32))
    want = wanted([q, k, v, dout], {})
    early, late = slice(0, 4), slice(4, 12)
    blocks = [(early, early, True), (late, late, True), (late, early, False)]  # queries, keys, causal
    pretend_kernels()
    with use(attention=implementation) if implementation != "triton" else use(rotary="torch"):
        out, lse = torch.zeros_like(q).contiguous(), q.new_full((2, 4, 12), -torch.inf)
        for rows, keys, causal in blocks:
            merge_into(out[:, rows], lse[..., rows], *attention_part(q[:, rows], k[:, keys], v[:, keys], causal=causal))
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        for rows, keys, causal in blocks:
            given = (dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[..., rows])
            for grad, at, part in zip(grads, (rows, keys, keys), attention_part_backward(*given, causal=causal), strict=True):
                grad[:, at] += part
    for got, expected in zip([out, lse, *grads], want, strict=True):
        torch.testing.assert_close(got, expected.to(got.dtype), **EXACT)


def test_merging_parts_that_saw_nothing() -> None:
    """Nobody: -inf and what was there; one side: the other to the bit."""
    nothing, something = torch.full((1, 1, 2), -torch.inf), torch.tensor([[[1.5, -2.0]]])
    some = torch.randn(1, 2, 1, 3)
    out, lse = torch.zeros(1, 2, 1, 3), nothing.clone()
    merge_into(out, lse, torch.zeros_like(out), nothing)
    assert not out.any() and torch.equal(lse, nothing)
    merge_into(out, lse, some, something)
    assert torch.equal(out, some) and torch.equal(lse, something)
    merge_into(out, lse, torch.zeros_like(out), nothing)
    assert torch.equal(out, some) and torch.equal(lse, something)


def test_no_matrix_of_all_queries_and_keys() -> None:
    """A window on a CPU: masks of some rows, wherever they lie."""
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            for x in found if isinstance(found, (tuple, list)) else (found,):
                largest = max(largest, x.numel() if isinstance(x, Tensor) else 0)
            return found

    q, k, v, dout = inputs((1, 2048, 2048, 1, 1, 8))
    with use(attention="sdpa"), Sizes():
        out, lse = attention_part(q, k, v, window=(100, -1))
        attention_part_backward(dout, q, k, v, out, lse, window=(100, -1))
    assert 0 < largest <= 256 * (256 + 100), largest


def test_refuses_as_attention_does() -> None:
    q, k, v, _ = inputs((1, 4, 4, 4, 3, 8))
    with pytest.raises(ValueError, match="number of heads of q is 4, wanted a multiple of k's, 3"):
        attention_part(q, k, v)
