"""Attention on the CPU: torch's own against the formula, what is refused and how, partial results, and the dropout's bits."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalm_kernels import flash_attention, flash_attention_reference, merge_attention, use
from megalm_kernels.attention.call import FEATURES, SUPPORT, Call, alibi_bias, check_support, has, visible
from megalm_kernels.attention.philox import keep_mask
from megalm_kernels.attention.sdpa import AttentionWithLse

TOLERANCE = {
    torch.float64: dict(rtol=1e-10, atol=1e-10),
    torch.float32: dict(rtol=2e-5, atol=2e-5),
    torch.bfloat16: dict(rtol=4e-2, atol=4e-2),
}
SLOPES = torch.tensor([0.5, 0.25, 1.0, 0.125])
# (B, Sq, Sk, H, Hkv, D) and options
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "causal": ((2, 7, 7, 4, 4, 8), {}),
    "every key": ((2, 5, 9, 4, 2, 8), {"causal": False}),
    "more keys": ((1, 3, 8, 4, 1, 16), {}),
    "one query": ((2, 1, 9, 6, 1, 8), {}),
    "more queries": ((2, 9, 4, 4, 2, 8), {}),
    "no keys": ((1, 3, 0, 2, 1, 8), {}),
    "no queries": ((1, 0, 3, 2, 1, 8), {}),
    "no sequences": ((0, 3, 3, 2, 1, 8), {"causal": False}),
    "window": ((2, 13, 13, 2, 2, 8), {"window": (3, -1)}),
    "window both ways": ((1, 11, 6, 2, 1, 8), {"causal": False, "window": (2, 1)}),
    "window behind": ((1, 5, 7, 2, 1, 8), {"causal": False, "window": (2, -1)}),
    "window ahead": ((1, 4, 9, 2, 1, 8), {"causal": False, "window": (-1, 2)}),
    "own place only": ((1, 5, 5, 2, 1, 8), {"window": (0, 0)}),
    "alibi": ((2, 7, 7, 4, 2, 8), {"alibi_slopes": SLOPES}),
    "alibi by sequence": ((2, 7, 3, 4, 4, 8), {"causal": False, "alibi_slopes": torch.stack((SLOPES, SLOPES.flip(0)))}),
    "scale": ((1, 6, 6, 2, 2, 8), {"scale": 0.1}),
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    B, Sq, Sk, H, Hkv, D = shape
    return [torch.randn(B, S, heads, D).to(dtype) for S, heads in ((Sq, H), (Sk, Hkv), (Sk, Hkv))]


def results(function: Any, tensors: list[Tensor], by_lse: bool, **options: Any) -> list[Tensor]:
    """Result, lse if wanted, and gradients that depend on every element of both."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    found = function(*leaves, return_lse=by_lse, **options)
    out, lse = found if by_lse else (found, None)
    loss = (out.double() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()
    if lse is not None:
        loss = loss + (lse.double() * torch.linspace(1, 2, lse.numel()).view(lse.shape))[lse > -torch.inf].sum()
    loss.backward()
    return [out, *([] if lse is None else [lse]), *(x.grad for x in leaves if x.grad is not None)]


def compare(got: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    assert len(got) == len(wanted) >= 4
    for a, b in zip(got, wanted, strict=True):
        assert not a.isnan().any()
        torch.testing.assert_close(a, b.to(a.dtype), **TOLERANCE[dtype])


@pytest.mark.parametrize("by_lse", [False, True], ids=["", "lse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_sdpa_is_the_formula(name: str, dtype: torch.dtype, by_lse: bool) -> None:
    shape, options = CASES[name]
    tensors = inputs(shape, dtype)
    with use(attention="sdpa"):
        got = results(flash_attention, tensors, by_lse, **options)
    compare(got, results(flash_attention_reference, [x.double() for x in tensors], by_lse, **options), dtype)


def test_sdpa_in_fp64() -> None:
    tensors = inputs((2, 7, 5, 4, 2, 8), torch.float64)
    for options in ({}, {"alibi_slopes": SLOPES}):
        with use(attention="sdpa"):
            got = results(flash_attention, tensors, False, **options)
        compare(got, results(flash_attention_reference, tensors, False, **options), torch.float64)


PACKED = [0, 5, 5, 6, 13], [0, 3, 7, 13, 13]  # more queries than keys, no query, one query, no key


@pytest.mark.parametrize("by_lse", [False, True], ids=["", "lse"])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": (2, 0)}, {"alibi_slopes": SLOPES.expand(4, 4)}])
def test_packed_sequences_are_sequences(options: dict[str, Any], by_lse: bool) -> None:
    """Each by itself, by torch's operator on a batch of one."""
    starts = [torch.tensor(x, dtype=torch.int32) for x in PACKED]
    packed = [x[0] for x in inputs((1, 13, 13, 4, 2, 8))]

    def one_by_one(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        parts = []
        for a, b, c, d in zip(PACKED[0], PACKED[0][1:], PACKED[1], PACKED[1][1:], strict=False):
            parts.append(flash_attention_reference(q[None, a:b], k[None, c:d], v[None, c:d], **options))
        if not by_lse:
            return torch.cat([part[0] for part in parts])
        return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], -1)

    given = {name: SLOPES if name == "alibi_slopes" else value for name, value in options.items()}
    wanted = results(one_by_one, packed, by_lse, **given)
    for implementation in ("sdpa", "reference"):
        with use(attention=implementation):
            got = results(flash_attention, packed, by_lse, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], **options)
        compare(got, wanted, torch.float32)


def test_no_packed_sequences_at_all() -> None:
    none = torch.zeros(1, dtype=torch.int32)
    for implementation in ("sdpa", "reference"):
        with use(attention=implementation):
            out, lse = flash_attention(*(torch.empty(0, 2, 8),) * 3, cu_seqlens_q=none, cu_seqlens_k=none, return_lse=True)
        assert (tuple(out.shape), tuple(lse.shape)) == ((0, 2, 8), (2, 0))


def test_the_call_of_the_models_is_torch_s_to_the_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for causal in (True, False):
            tensors = inputs((2, 33, 33, 4, 2, 24), dtype)

            def plain(q: Tensor, k: Tensor, v: Tensor, return_lse: bool, causal: bool = causal) -> Tensor:
                heads = [x.transpose(1, 2) for x in (q, k, v)]
                return F.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=True).transpose(1, 2)

            with use("torch"):
                got = results(flash_attention, tensors, False, causal=causal)
            for a, b in zip(got, results(plain, tensors, False), strict=True):
                assert torch.equal(a, b)


def test_a_query_that_sees_no_key() -> None:
    """Result 0, lse -inf, no gradient, and no NaN though scores are infinite."""
    q, k, v = inputs((1, 6, 2, 2, 1, 8))
    q[:, 0] = 1e30
    for implementation in ("sdpa", "reference"):
        with use(attention=implementation):
            out, lse, dq, dk, dv = results(flash_attention, [q, k, v], True)
        assert not out[:, :4].any() and not dq[:, :4].any() and (lse[..., :4] == -torch.inf).all(), implementation
        assert out[:, 4:].all() and dk.isfinite().all() and dv.isfinite().all() and lse[..., 4:].isfinite().all()


def test_gradients_of_the_logarithms_alone() -> None:
    leaves = [x.double().requires_grad_() for x in inputs((1, 4, 5, 2, 1, 3))]
    heads = [x.detach().transpose(1, 2).requires_grad_() for x in leaves]
    mask = torch.zeros(4, 5, dtype=torch.float64).masked_fill(~visible(4, 5, Call(-1, 0, 1.0), leaves[0].device), -torch.inf)
    assert torch.autograd.gradcheck(lambda *x: AttentionWithLse.apply(*x, mask, False, 0.7), heads)
    with use(attention="sdpa"):
        flash_attention(*leaves, return_lse=True)[1].sum().backward()
    assert leaves[0].grad.any() and leaves[1].grad.any() and not leaves[2].grad.any()


def test_compiled_as_not() -> None:
    tensors = inputs((2, 9, 4, 4, 2, 8))

    def attend(q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Any:
        return flash_attention(q, k, v, window=(2, 0), return_lse=return_lse)

    for by_lse in (False, True):
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
        with use(attention="sdpa"):
            compare(results(compiled, tensors, by_lse), results(attend, tensors, by_lse), torch.float32)


@pytest.mark.parametrize("implementation", ["triton", "sdpa", "reference"])
def test_autocast_decides_the_dtype(implementation: str, pretend_kernels: Any) -> None:
    """Of inputs in fp32, and of mixed ones, as a rotary in fp32 leaves them. Gradients have the dtypes of what they are of."""
    tensors = inputs((2, 5, 7, 4, 2, 32))
    mixed = [*tensors[:2], tensors[2].bfloat16()]
    pretend_kernels()
    with use(attention=implementation) if implementation != "triton" else use(rotary="torch"):
        want = results(flash_attention, [x.bfloat16() for x in tensors], True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for given in (tensors, mixed):
                out, lse, *grads = results(flash_attention, given, True)
                assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
                assert [x.dtype for x in grads] == [x.dtype for x in given]
                torch.testing.assert_close(lse, want[1], **TOLERANCE[torch.float32])
                for got, expected in zip((out, *grads), (want[0], *want[2:]), strict=True):
                    torch.testing.assert_close(got, expected.to(got.dtype), **TOLERANCE[torch.bfloat16])
            with torch.autocast("cpu", enabled=False):
                assert flash_attention(*tensors).dtype == torch.float32
        with pytest.raises(ValueError, match=r"the dtype of v is torch\.bfloat16, wanted torch\.float32"):
            flash_attention(*mixed)


# --- the mask and the bias, place by place ------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (2, 5), (5, 2)])
def test_who_sees_whom(queries: int, keys: int) -> None:
    for left in (-1, 0, 2):
        for right in (-1, 0, 1):
            seen = visible(queries, keys, Call(left, right, 1.0), torch.device("cpu"))
            for i in range(queries):
                for j in range(keys):
                    place = keys - (queries - i)  # the last query stands at the last key
                    near = (left < 0 or place - j <= left) and (right < 0 or j - place <= right)
                    assert seen[i, j] == near
    bias = alibi_bias(queries, keys, SLOPES)
    assert bias.shape == (4, queries, keys)
    assert bias[1, queries - 1].tolist() == [-0.25 * (keys - 1 - j) for j in range(keys)]
    assert bias[1, 0, 0] == -0.25 * abs(keys - queries)


# --- what is refused ----------------------------------------------------------------------------------------------------

X, K = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 2, 8)
T, STARTS = torch.zeros(6, 4, 8), torch.tensor([0, 2, 6], dtype=torch.int32)
PACK = {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS}
WRONG: list[tuple[list[Any], dict[str, Any], str]] = [
    (["q", K, K], {}, "q is of type str, wanted a Tensor"),
    ([X.int(), K, K], {}, "the dtype of q is torch.int32"),
    ([X, K.half(), K], {}, "the dtype of k is torch.float16, wanted torch.float32"),
    ([X, K, K.double()], {}, "the dtype of v is torch.float64"),
    ([X, K.to("meta"), K], {}, "the device of k is meta"),
    ([X[0], K, K], {}, "the shape of q is (3, 4, 8), wanted (B, S, H, D); or (T, H, D) with cu_seqlens_q"),
    ([X, K[0], K[0]], {}, "the shape of k is (3, 2, 8)"),
    ([X[..., :0], K[..., :0], K[..., :0]], {}, "the shape of q is (2, 3, 4, 0), wanted at least one channel per head"),
    ([X, K, K[:, 1:]], {}, "the shape of v is (2, 2, 2, 8), wanted (2, 3, 2, 8)"),
    ([X, K[:1], K[:1]], {}, "the shape of k is (1, 3, 2, 8), wanted q's sequences and channels, (2, 3, 4, 8)"),
    ([X, K[..., :4], K[..., :4]], {}, "the shape of k is (2, 3, 2, 4)"),
    ([K[:, :, :1], K, K], {}, "the number of heads of q is 1, wanted a multiple of k's, 2"),
    ([X, K[:, :, :0], K[:, :, :0]], {}, "wanted a multiple of k's, 0"),
    ([X, K, K], {"window": (1,)}, "window is (1,), wanted (left, right)"),
    ([X, K, K], {"window": (-2, 0)}, "window is -2, wanted at least -1"),
    ([X, K, K], {"window": (0.5, 0)}, "window is of type float, wanted an int"),
    ([X, K, K], {"window": (2, 1)}, "window is (2, 1), wanted (left, 0) or (left, -1) with causal=True"),
    ([X, K, K], {"scale": -1.0}, "scale is -1.0, wanted at least 0"),
    ([X, K, K], {"scale": 0.0}, "scale is 0.0, wanted more than 0"),
    ([X, K, K], {"scale": "1"}, "scale is of type str, wanted a number"),
    ([X, K, K], {"softcap": -1.0}, "softcap is -1.0, wanted at least 0"),
    ([X, K, K], {"dropout_p": 1.0}, "dropout_p is 1.0, wanted at least 0 and less than 1"),
    ([X, K, K], {"seed": -1}, "seed is -1, wanted at least 0"),
    ([X, K, K], {"origin": (0, 0)}, "origin is (0, 0), wanted (sequence, head, query, key)"),
    ([X, K, K], {"origin": (0, 0, 0, 2**31)}, "origin is 2147483648, wanted at least 0 and less than 2**31"),
    ([X, K, K], {"alibi_slopes": SLOPES.double()}, "the dtype of alibi_slopes is torch.float64"),
    ([X, K, K], {"alibi_slopes": SLOPES[:2]}, "the shape of alibi_slopes is (2,), wanted (4,)"),
    ([X, K, K], {"alibi_slopes": SLOPES.expand(3, 4)}, "the shape of alibi_slopes is (3, 4), wanted (2, 4)"),
    ([X, K, K], {"alibi_slopes": SLOPES.clone().requires_grad_()}, "a tensor that requires a gradient, wanted fixed slopes"),
    ([X, K, K], {"sinks": torch.zeros(2)}, "the shape of sinks is (2,), wanted (4,)"),
    ([X, K, K], {"sinks": 1.0}, "sinks is of type float, wanted a Tensor"),
    ([X, K, K], {"cu_seqlens_q": STARTS}, "the shape of q is (2, 3, 4, 8), wanted (T, H, D), packed"),
    ([T, T, T], {"cu_seqlens_q": STARTS}, "cu_seqlens_k is None, wanted given, where the other one is"),
    ([T, T, T], {**PACK, "cu_seqlens_k": STARTS.long()}, "the dtype of cu_seqlens_k is torch.int64, wanted torch.int32"),
    ([T, T, T], {**PACK, "cu_seqlens_k": STARTS[1:]}, "the shape of cu_seqlens_k is (2,), wanted (3,)"),
    ([T, T, T], {**PACK, "cu_seqlens_q": STARTS[None]}, "the shape of cu_seqlens_q is (1, 3), wanted (N + 1,) for N sequences"),
    ([T, T, T], {**PACK, "cu_seqlens_q": STARTS.to("meta")}, "the device of cu_seqlens_q is meta"),
    ([T, T, T], {**PACK, "cu_seqlens_q": STARTS + 1}, "cu_seqlens_q is [1, 3, 7], wanted 0 and where each sequence ends"),
    ([T, T, T], {**PACK, "cu_seqlens_k": STARTS + STARTS // 6}, "cu_seqlens_k is [0, 2, 7], wanted 0"),
    ([T, T, T], {**PACK, "cu_seqlens_k": STARTS[[0, 2, 1, 2]], "cu_seqlens_q": STARTS[[0, 1, 1, 2]]}, "in rising order, 6 at"),
    ([T, T, T], {**PACK, "alibi_slopes": SLOPES.expand(3, 4)}, "the shape of alibi_slopes is (3, 4), wanted (2, 4)"),
]


@pytest.mark.parametrize(("tensors", "options", "words"), WRONG, ids=[words[:40] for *_, words in WRONG])
def test_wrong_arguments(tensors: list[Any], options: dict[str, Any], words: str) -> None:
    for function in (flash_attention, flash_attention_reference):
        with pytest.raises(ValueError, match="flash_attention: .*" + re.escape(words)):
            function(*tensors, **options)


ASKING = {
    "causal": {},
    "packed sequences": PACK,
    "a sliding window": {"window": (1, 0)},
    "ALiBi": {"alibi_slopes": SLOPES},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": torch.zeros(4)},
    "dropout": {"dropout_p": 0.5},
    "return_lse": {"return_lse": True},
    "deterministic gradients": {"deterministic": True},
}


@pytest.mark.parametrize("implementation", ["triton", "sdpa", "reference"])
def test_each_has_what_the_table_says(implementation: str, pretend_kernels: Any) -> None:
    """triton by the plain bodies of its operators."""
    assert set(ASKING) == set(FEATURES)
    pretend_kernels()
    for feature, options in ASKING.items():
        tensors = [torch.randn(6, 4, 32)] * 3 if feature == "packed sequences" else [torch.randn(2, 3, 4, 32)] * 3
        with use(attention=implementation) if implementation != "triton" else use(rotary="torch"):
            if has(implementation, feature, "cpu"):
                flash_attention(*tensors, **options)
                continue
            words = f"attention with {implementation}: {feature} is not there, wanted a call without it (triton and reference "
            fix = "have it: kernels.attention=reference or use(attention='reference'))"
            with pytest.raises(ValueError, match=re.escape(words + fix)):
                flash_attention(*tensors, **options)


def test_the_table_of_what_is_there() -> None:
    for implementation, features in SUPPORT.items():
        assert features <= {*FEATURES, "gradients"}, implementation
    plain, lse = Call(-1, 0, 1.0), Call(-1, 0, 1.0, return_lse=True)
    check_support("cudnn", X.half(), plain)
    with pytest.raises(ValueError, match=r"attention with cudnn: the dtype of q is torch.float32, wanted .* \(others: kern"):
        check_support("cudnn", X, plain)
    with pytest.raises(ValueError, match="attention with sdpa: return_lse is not there"):
        check_support("sdpa", X.to("meta"), lse)  # the CPU alone has it
    check_support("sdpa", X, lse)


# --- partial results ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "reference"])
@pytest.mark.parametrize("packed", [False, True])
def test_parts_give_the_whole(implementation: str, packed: bool) -> None:
    """Causal, keys in three parts: the first 4, the next 4, the last; early queries see nothing of the later ones."""

    def whole(q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Any:
        return flash_attention(q, k, v, return_lse=True)

    def parts(q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Any:
        found = []
        for begin, end in ((0, 4), (4, 8), (8, 9)):
            some, mask = (q, k[:, begin:end], v[:, begin:end]), {"causal": False, "window": (-1, 9 - end)}
            if packed:
                starts = {f"cu_seqlens_{x}": torch.tensor([0, n], dtype=torch.int32) for x, n in (("q", 9), ("k", end - begin))}
                found.append(flash_attention(*(x[0] for x in some), **mask, **starts, return_lse=True))
            else:
                found.append(flash_attention(*some, **mask, return_lse=True))
        assert (found[-1][1][..., :8] == -torch.inf).all()
        out, lse = merge_attention(found)
        return (out[None], lse[None]) if packed else (out, lse)

    tensors = inputs((1 if packed else 2, 9, 9, 4, 2, 8))
    with use(attention=implementation):
        compare(results(parts, tensors, True), results(whole, tensors, True), torch.float32)


def test_merging_what_saw_nothing() -> None:
    out, lse = torch.zeros(1, 2, 3, 4, requires_grad=True), torch.full((1, 3, 2), -torch.inf, requires_grad=True)
    merged, total = merge_attention([(out, lse), (out, lse)])
    assert not merged.any() and (total == -torch.inf).all()
    merged.sum().backward()
    assert out.grad.isfinite().all() and lse.grad.isfinite().all()
    alone, same = merge_attention([(torch.ones(1, 2, 3, 4), torch.full((1, 3, 2), 2.0)), (out.detach(), lse.detach())])
    assert torch.equal(alone, torch.ones(1, 2, 3, 4)) and (same == 2.0).all()


def test_merging_refuses_what_does_not_fit() -> None:
    out, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 2)
    with pytest.raises(ValueError, match="merge_attention: parts is empty, wanted at least one pair"):
        merge_attention([])
    with pytest.raises(ValueError, match=re.escape("a part is (1, 2, 3, 4) with lse (1, 2, 3), wanted lse (1, 3, 2)")):
        merge_attention([(out, lse), (out, lse.transpose(1, 2))])
    with pytest.raises(ValueError, match="merge_attention: a part is"):
        merge_attention([(out, lse), (out[:, :1], lse[..., :1])])


# --- dropout ------------------------------------------------------------------------------------------------------------


def philox(counter: list[int], key: list[int], rounds: int) -> list[int]:
    """Philox4x32 in plain integers, after figure 2 of Salmon et al. 2011."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_philox_is_the_published_one() -> None:
    """Known answers of its authors for ten rounds, so seven of the same are right; then our bits, by them."""
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    assert philox([0] * 4, [0] * 2, 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(pi[:4], pi[4:], 10) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    places = [(0, 0, 0, 0), (1, 2, 3, 4), (2**31 - 1, 2**31 - 1, 2**31 - 1, 2**31 - 1), (5, 0, 70_000, 3)]
    for seed in (0, 1, 2**32 - 1, 2**32, 2**63 - 1):
        for sequence, head, query, key in places:
            word = philox([query, key, head, sequence], [seed % 2**32, seed >> 32], 7)[0]
            for probability, kept in ((word / 2**32, True), ((word + 1) / 2**32, False)):
                mask = keep_mask(probability, seed, (sequence, head, query, key), (1, 1, 1, 1), torch.device("cpu"))
                assert mask.item() == kept


def test_a_part_drops_what_the_whole_drops() -> None:
    whole = keep_mask(0.3, 7, (0, 0, 0, 0), (3, 4, 20, 30), torch.device("cpu"))
    part = keep_mask(0.3, 7, (1, 2, 5, 10), (2, 2, 8, 9), torch.device("cpu"))
    assert torch.equal(part, whole[1:3, 2:4, 5:13, 10:19])
    assert abs(whole.float().mean() - 0.7) < 4 * math.sqrt(0.21 / whole.numel())
    q, k, v = inputs((2, 6, 6, 4, 2, 8))
    options = {"dropout_p": 0.4, "seed": 3}
    with use(attention="reference"):
        out = flash_attention(q, k, v, **options)
        half = flash_attention(q[1:, :, 2:], k[1:, :, 1:], v[1:, :, 1:], **options, origin=(1, 2, 0, 0))
        starts = torch.tensor([0, 6, 12], dtype=torch.int32)
        packed = flash_attention(*(x.flatten(0, 1) for x in (q, k, v)), **options, cu_seqlens_q=starts, cu_seqlens_k=starts)
    torch.testing.assert_close(half, out[1:, :, 2:])
    torch.testing.assert_close(packed, out.flatten(0, 1))
    with use(attention="sdpa"):
        assert not torch.allclose(out, flash_attention(q, k, v)), "nothing was dropped"
