"""Attention over a cache in torch's operators, the operator under torch.compile, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megalm_kernels import dispatch
from megalm_kernels.attention import flash_attention_reference
from megalm_kernels.attention.call import Call
from megalm_kernels.attention.decode import (
    _decode_triton,
    decode,
    decode_attention,
    decode_attention_op,
    decode_attention_reference,
    takes,
)

LENGTHS = torch.tensor([0, 2, 9], dtype=torch.int32)
CALL = Call(left=-1, right=0, scale=0.3)


def cache(queries: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Three samples; room for 9 keys; 4 heads share 2 key heads."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, queries, 4, 8, generator=generator)
    k, v = torch.randn(2, 3, 9, 2, 8, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("backend", ["torch", "operator", "reference"])
def test_each_sample_is_causal_attention_over_its_own_keys(backend: str) -> None:
    """With NaN behind them, and with every feature; also of a call without any, for which torch has a function of its own."""
    q, k, v = cache()
    for sample, length in enumerate(LENGTHS.tolist()):
        k[sample, length:], v[sample, length:] = torch.nan, torch.nan
    slopes, sinks = torch.rand(3, 4), torch.randn(4)
    call = {"torch": decode_attention, "reference": decode_attention_reference, "operator": through_operator}[backend]
    out = call(q, k, v, lengths=LENGTHS, window_left=3, scale=0.4, softcap=2.0, alibi_slopes=slopes, sinks=sinks)
    with dispatch.use("torch"):
        for sample, length in enumerate(LENGTHS.tolist()):
            one = [q[sample : sample + 1], k[sample : sample + 1, :length], v[sample : sample + 1, :length]]
            features = dict(scale=0.4, softcap=2.0, alibi_slopes=slopes[sample], sinks=sinks)
            want = flash_attention_reference(*one, window=(3, 0), **features)
            torch.testing.assert_close(out[sample : sample + 1], want)
        for queries in (1, 3):
            q, k, v = cache(queries)
            torch.testing.assert_close(call(q, k, v), flash_attention_reference(q, k, v))


def through_operator(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, **features) -> Tensor:
    options = dict(window_left=-1, scale=8**-0.5, softcap=0.0, alibi_slopes=None, sinks=None) | features
    return decode_attention_op(q, k, v, lengths, **options)


def test_operator_satisfies_torch() -> None:
    q, k, v = cache()
    torch.library.opcheck(decode_attention_op, (q, k, v, None, -1, 0.3, 0.0, None, None))
    features = (LENGTHS, 4, 0.3, 2.0, torch.rand(4), torch.randn(4))
    apart = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    torch.library.opcheck(decode_attention_op, (apart.bfloat16(), k.bfloat16(), v.bfloat16(), *features))


def test_compiles_into_one_graph() -> None:
    q, k, v = cache()
    for function in (
        lambda q, k, v: through_operator(q * 2.0, k, v, lengths=LENGTHS) + 1.0,
        lambda q, k, v: decode_attention(q * 2.0, k, v, lengths=LENGTHS) + 1.0,
    ):
        with dispatch.use("torch"):
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(q, k, v), function(q, k, v))


def test_takes_calls_that_need_no_more_than_the_result() -> None:
    q, k, v = cache()
    assert takes(q, k, v, CALL)
    torch.testing.assert_close(decode(q, k, v, CALL), flash_attention_reference(q, k, v, scale=0.3))
    assert takes(q, k, v, replace(CALL, left=3, softcap=2.0, alibi_slopes=torch.rand(4), sinks=torch.rand(4)))
    starts = torch.tensor([0, 3], dtype=torch.int32)
    others = dict(right=2, dropout_p=0.1, return_lse=True, cu_seqlens_q=starts, cu_seqlens_k=starts)
    for name, value in others.items():
        if name != "cu_seqlens_k":
            assert not takes(q, k, v, replace(CALL, **{name: value})), name
    many, wide = torch.randn(3, 17, 4, 8), torch.randn(3, 3, 4, 300)
    k_long = torch.randn(3, 30, 2, 8)
    assert not takes(many, k_long, k_long, CALL) and not takes(wide[:, :2], wide, wide, CALL) and not takes(q[:, :0], k, v, CALL)
    assert not takes(q, k[:, :3], v[:, :3], CALL), "a whole sequence, of training maybe"
    assert not takes(q, k.transpose(-1, -2).contiguous().transpose(-1, -2), v, CALL)
    leaf, sinks = v.clone().requires_grad_(), torch.zeros(4, requires_grad=True)
    assert not takes(q, k, leaf, CALL) and not takes(q, k, v, replace(CALL, sinks=sinks))
    with torch.no_grad():
        assert takes(q, k, leaf, replace(CALL, sinks=sinks))


def test_refuses() -> None:
    q, k, v = cache()
    leaf, apart = q.clone().requires_grad_(), k.transpose(-1, -2).contiguous().transpose(-1, -2)
    wide, many = torch.randn(3, 1, 4, 257), torch.randn(3, 17, 4, 8)
    wrong = {
        "q is None, wanted a Tensor": lambda: decode_attention(None, k, v),
        "dtype of q is torch.int64": lambda: decode_attention(q.long(), k, v),
        r"q is \(3, 17, 4, 8\), wanted \(B, Sq, H, D\) with Sq from 1 to 16": lambda: decode_attention(many, k, v),
        r"q is \(3, 0, 4, 8\)": lambda: decode_attention(q[:, :0], k, v),
        r"q is \(3, 4, 8\)": lambda: decode_attention(q[:, 0], k, v),
        "dtype of k is torch.bfloat16, wanted torch.float32": lambda: decode_attention(q, k.bfloat16(), v),
        "device of v is meta": lambda: decode_attention(q, k, v.to("meta")),
        r"shape of k is \(2, 9, 2, 8\), wanted \(3, Smax, Hkv, 8\)": lambda: decode_attention(q, k[:2], v),
        r"shape of v is \(3, 9, 2, 7\)": lambda: decode_attention(q, k, v[..., :7]),
        r"shape of v is \(3, 8, 2, 8\), wanted \(3, 9, 2, 8\)": lambda: decode_attention(q, k, v[:, :8]),
        r"strides of k is \(144, 16, 1, 2\), wanted 1 for the last": lambda: decode_attention(q, apart, v),
        "heads of q is 3, wanted a multiple of k's, 2": lambda: decode_attention(q[:, :, :3], k, v),
        "dtype of lengths is torch.int64": lambda: decode_attention(q, k, v, lengths=LENGTHS.long()),
        r"lengths is \(2,\), wanted \(3,\)": lambda: decode_attention(q, k, v, lengths=LENGTHS[:2]),
        "device of lengths is meta": lambda: decode_attention(q, k, v, lengths=LENGTHS.to("meta")),
        "lengths is 1 to 10, wanted 0 to 9": lambda: decode_attention(q, k, v, lengths=LENGTHS + 1),
        "lengths is -1 to 8": lambda: decode_attention(q, k, v, lengths=LENGTHS - 1),
        "window_left is -2": lambda: decode_attention(q, k, v, window_left=-2),
        "scale is -1.0": lambda: decode_attention(q, k, v, scale=-1.0),
        "softcap is -1.0": lambda: decode_attention(q, k, v, softcap=-1.0),
        "dtype of alibi_slopes is torch.float64": lambda: decode_attention(q, k, v, alibi_slopes=torch.rand(4).double()),
        r"alibi_slopes is \(3,\), wanted \(4,\)": lambda: decode_attention(q, k, v, alibi_slopes=torch.rand(3)),
        r"alibi_slopes is \(2, 4\), wanted \(3, 4\)": lambda: decode_attention(q, k, v, alibi_slopes=torch.rand(2, 4)),
        "device of alibi_slopes is meta": lambda: decode_attention(q, k, v, alibi_slopes=torch.rand(4, device="meta")),
        r"sinks is \(3,\), wanted \(4,\)": lambda: decode_attention(q, k, v, sinks=torch.rand(3)),
        "dtype of sinks is torch.int64": lambda: decode_attention(q, k, v, sinks=torch.ones(4, dtype=torch.int64)),
        "device of sinks is meta": lambda: decode_attention(q, k, v, sinks=torch.rand(4, device="meta")),
        "q is a tensor that requires a gradient, wanted none, or torch.no_grad": lambda: decode_attention(leaf, k, v),
        "sinks is a tensor that requires a gradient": lambda: decode_attention(q, k, v, sinks=torch.rand(4, requires_grad=True)),
        r"with Triton: the dtype of q is torch.float64, wanted .*use\(decode_attention=\"torch\"\)": (
            lambda: _decode_triton(*(x.double() for x in (q, k, v)), None, -1, 0.3, 0.0, None, None)
        ),
        "with Triton: the width of a head is 257, wanted at most 256": (
            lambda: _decode_triton(wide, wide, wide, None, -1, 0.3, 0.0, None, None)
        ),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert str(error.value).startswith(("decode_attention: ", "decode_attention with Triton: ")), message
    with torch.no_grad():
        torch.testing.assert_close(decode_attention(leaf, k, v), decode_attention(q, k, v))
