"""Features of the attention kernels, each alone and in combinations; packed sequences; parts that are put together."""

from __future__ import annotations

from itertools import combinations, pairwise, product
from typing import Any

import pytest
import torch

from megalm_kernels import dispatch, flash_attention, flash_attention_reference, merge_attention
from megalm_kernels.attention.call import has
from megalm_kernels.attention.philox import keep_mask
from tests.kernels.device.attention_formula import covering, formula, same_as_formula, starts, tensors
from tests.kernels.device.attention_tiles import small_tiles
from tests.kernels.device.conftest import check_close, run


@pytest.fixture(autouse=True)
def kernels(device, monkeypatch):
    """In small tiles, so that every kind of tile occurs in short sequences."""
    small_tiles(monkeypatch, (16, 32))
    with dispatch.use("auto", device.type, attention="triton"):
        yield


def slopes(device, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(7)).to(device)


# window, causal. Of (36, 66) the first query stands at key 30; of (66, 36) the first 30 stand before the first key. So chosen
# that for each bound the first or the last key that is seen, or the first query that sees it, is alone in a tile.
WINDOWS = [
    ((0, 0), False),
    ((15, 9), False),
    ((-1, 19), False),
    ((12, -1), False),
    ((2**30 - 1, 2**30 - 1), False),
    ((19, -1), True),
    ((50, 0), True),
]


@pytest.mark.parametrize("lengths", [(36, 66), (66, 36)], ids=str)
@pytest.mark.parametrize(("window", "causal"), WINDOWS, ids=str)
def test_windows(window, causal, lengths, judge, device, monkeypatch):
    small_tiles(monkeypatch, (16, 32) if lengths[0] < lengths[1] else (32, 16))
    same_as_formula(judge, tensors(lengths, (1, 1), 32, torch.float32, device, batch=1), window=window, causal=causal)


def test_a_window_wider_than_the_sequence_is_none(device):
    inputs = tensors((40, 40), (1, 1), 32, torch.float32, device, batch=1)
    for wide, none in ((dict(window=(40, 40), causal=False), dict(causal=False)), (dict(window=(39, -1)), {})):
        found = [run(lambda *x, f=f: flash_attention(*x, **f), [x.clone() for x in inputs]) for f in (wide, none)]
        for name in found[0]:
            torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-6, atol=1e-6)


def alone(device) -> dict[str, dict[str, Any]]:
    return {
        "slopes of heads": dict(alibi_slopes=slopes(device, 4)),
        "slopes of samples": dict(alibi_slopes=slopes(device, 2, 4), causal=False),
        "softcap": dict(softcap=1.5),
        "hardly anything kept": dict(dropout_p=0.999, seed=3),
        "dropout": dict(dropout_p=0.4, seed=2**61 + 11, origin=(3, 5, 70, 2**31 - 100)),
        "scale": dict(scale=0.7),
        "hardly any scale": dict(scale=1e-30),
    }


@pytest.mark.parametrize("feature", alone(torch.device("cpu")))
def test_features_alone(feature, judge, device):
    inputs = tensors((34, 34), (4, 2), 32, torch.float32, device)
    same_as_formula(judge, inputs, **alone(device)[feature])


@pytest.mark.parametrize("lengths", [(20, 33), (33, 9)], ids=str)
def test_sinks(lengths, judge, device, dtype):
    """With rows that see nothing but the sink."""
    same_as_formula(judge, tensors(lengths, (2, 1), 32, dtype, device, batch=1, sinks=True))


def test_sinks_have_a_dtype_of_their_own(device):
    q, k, v, sinks = tensors((20, 20), (2, 1), 32, torch.float32, device, sinks=True)
    leaf = sinks.requires_grad_()
    out = flash_attention(*(x.bfloat16() for x in (q, k, v)), sinks=leaf)
    (got,) = torch.autograd.grad(out.float().square().sum(), leaf)
    (want,) = torch.autograd.grad(formula(q, k, v, leaf)[0].square().sum(), leaf)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_a_sink_of_nothing(implementation, device):
    """Of -inf: its head is as without one, it has no gradient, and no NaN comes of rows that see nothing else."""
    *inputs, sinks = tensors((33, 9), (2, 1), 32, torch.float32, device, batch=1, sinks=True)
    sinks[0] = -torch.inf
    with dispatch.use(attention=implementation):
        got = run(lambda q, k, v, s: flash_attention(q, k, v, sinks=s, return_lse=True), [*inputs, sinks])
        plain = run(lambda q, k, v: flash_attention(q, k, v, return_lse=True), [x.detach() for x in inputs])
    assert not any(x.isnan().any() for x in got.values())
    assert got["gradient 3"][0] == 0 and got["gradient 3"][1] != 0
    assert (got["output 1"][:, 0, :24] == -torch.inf).all()
    torch.testing.assert_close(got["output 1"][:, 0], plain["output 1"][:, 0])
    for name in ("output 0", "gradient 0"):
        torch.testing.assert_close(got[name][:, :, 0], plain[name][:, :, 0], msg=name)


# Lengths of the documents' queries and keys; rows of q and of k and v, of which the last are padding
PADDED = {
    "in the last tile and beyond": ((16, 5), (20, 3), 60, 58),
    "only beyond whole tiles": ((16, 16), (32, 32), 40, 90),
    "no keys": ((4,), (0,), 6, 0),
    "no documents": ((), (), 6, 5),
}


@pytest.mark.parametrize("implementation", ["triton", "sdpa", "reference"])
@pytest.mark.parametrize("case", PADDED)
def test_rows_behind_the_last_document(case, implementation, device):
    """Padding, which may hold anything: 0, lse -inf, no gradients, and all else as without it."""
    lengths_q, lengths_k, rows, columns = PADDED[case]
    used, seen = sum(lengths_q), sum(lengths_k)
    features: dict[str, Any] = dict(cu_seqlens_q=starts(lengths_q, device), cu_seqlens_k=starts(lengths_k, device))
    features["return_lse"] = has(implementation, "return_lse", device.type)
    with_sinks = has(implementation, "sinks", device.type)
    inputs = tensors((rows, columns), (2, 1), 32, torch.float32, device, batch=0, sinks=with_sinks)
    q, k, v, *sinks = inputs
    q[used:], k[seen:], v[seen:] = torch.nan, torch.nan, torch.nan
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(2, rows, *more, generator=generator).to(device) for more in ((32,), ())]

    def results(q, k, v, *sinks):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, *sinks)]
        with dispatch.use(attention=implementation):
            found = flash_attention(*leaves[:3], sinks=leaves[3] if sinks else None, **features)
        out, *lse = found if features["return_lse"] else (found,)
        given = weights[0][:, : len(q)].transpose(0, 1), weights[1][:, : len(q)]
        pairs = [(y, dy) for y, dy in zip((out, *lse), given, strict=False) if y.requires_grad]
        ours, theirs = zip(*pairs, strict=True) if pairs else ((), ())
        grads = torch.autograd.grad(ours, leaves, theirs) if pairs else ()
        return out.detach(), *(x.detach() for x in lse), *grads

    got, want = results(*inputs), results(q[:used], k[:seen], v[:seen], *sinks)
    out, *rest = got
    assert out.shape == q.shape and (out[used:] == 0).all()
    if features["return_lse"]:
        lse = rest.pop(0)
        assert lse.shape == (2, rows) and (lse[:, used:] == -torch.inf).all()
    for dx, x, inside in zip(rest, inputs, (used, seen, seen, 2), strict=False):
        assert dx.shape == x.shape and (dx[inside:] == 0).all()
    for x, expected in zip(got, want, strict=True):
        inside = x[tuple(slice(size) for size in expected.shape)]
        torch.testing.assert_close(inside, expected, rtol=1e-6, atol=1e-6)


# lengths of the packed documents' queries and keys: nothing, a part of a tile, a tile, more; at the begin and at the end
DOCUMENTS = ((0, 5, 1, 16, 0, 19, 3, 0), (0, 5, 1, 16, 3, 33, 0, 0))
FACTORS: dict[str, list[Any]] = {
    "dtype": [torch.float32, torch.float16, torch.bfloat16],
    "mask": [dict(causal=True), dict(causal=False), dict(causal=False, window=(14, 4))],
    "heads": [(2, 2), (4, 2), (2, 1)],
    "lengths": [(20, 45), (36, 20), "packed"],
    "slopes": ["", "of heads", "of samples"],
    "width": [32, 64, 80],
    "softcap": [0.0, 2.0],
    "sinks": [False, True],
    "dropout_p": [0.0, 0.25],
    "deterministic": [True, False],
}
COMBINATIONS = covering(FACTORS)


def test_the_combinations_have_all_pairs():
    for a, b in combinations(FACTORS, 2):
        for pair in product(FACTORS[a], FACTORS[b]):
            assert any((row[a], row[b]) == pair for row in COMBINATIONS), (a, b, pair)


def combined(row: dict[str, Any], device: torch.device) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Inputs and features."""
    features = {name: row[name] for name in ("softcap", "dropout_p", "deterministic")} | row["mask"]
    packed = row["lengths"] == "packed"
    lengths = (sum(DOCUMENTS[0]), sum(DOCUMENTS[1])) if packed else row["lengths"]
    count = len(DOCUMENTS[0]) if packed else 2
    if packed:
        features |= dict(cu_seqlens_q=starts(DOCUMENTS[0], device), cu_seqlens_k=starts(DOCUMENTS[1], device))
    if row["slopes"]:
        features["alibi_slopes"] = slopes(device, *(count,) * (row["slopes"] == "of samples"), row["heads"][0])
    batch = 0 if packed else 2
    inputs = tensors(lengths, row["heads"], row["width"], row["dtype"], device, batch=batch, sinks=row["sinks"])
    return inputs, features | dict(seed=12345678901, origin=(1, 2, 0, 40))


@pytest.mark.parametrize("row", COMBINATIONS, ids=lambda row: "-".join(str(value) for value in row.values()))
def test_combinations(row, judge, device):
    inputs, features = combined(row, device)
    if features["deterministic"]:
        same_as_formula(judge, inputs, **features)
    else:
        same_as_formula(judge_values, inputs, **features)


def judge_values(ours, plain, inputs, floor) -> None:
    """`judge` without the bits of a second run."""
    exact = run(plain, [x.double() for x in inputs])
    rough, got = run(plain, [x.clone() for x in inputs]), run(ours, [x.clone() for x in inputs])
    for name, want in exact.items():
        check_close(name, got[name], rough[name], want, floor)


@pytest.mark.parametrize("row", COMBINATIONS, ids=lambda row: "-".join(str(value) for value in row.values()))
def test_the_reference_is_the_formula(row, device):
    """Two writings of the same, in fp64: values and gradients."""
    inputs, features = combined(row, device)
    if features["dropout_p"]:
        features["origin"] = (2**31 - 10, 2**31 - 5, 0, 2**31 - 70)

    def reference(q, k, v, sinks=None):
        out, lse = flash_attention_reference(q, k, v, sinks=sinks, return_lse=True, **features)
        return out, lse.exp()

    def plain(*inputs):
        out, lse = formula(*inputs, **features)
        return out, lse.exp()

    found = [run(f, [x.double() for x in inputs]) for f in (reference, plain)]
    assert found[0].keys() == found[1].keys()
    for name, got in found[0].items():
        torch.testing.assert_close(got, found[1][name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(("seed", "p"), [(0, 0.5), (2**32 + 2**31 + 5, 0.1), (2**62 - 1, 0.9)])
def test_dropout_is_that_of_the_plain_formula(seed, p, device):
    """Bit by bit: values that are unit vectors show the shares, and a gradient that is shows them again, of both heads."""
    batch, heads, queries, keys = 2, 2, 32, 64
    q, k, _ = tensors((queries, keys), (heads, 1), 64, torch.float32, device)
    features = dict(causal=False, dropout_p=p, seed=seed, origin=(3, 2**31 - 9, 11, 2**31 - 70))
    keep = keep_mask(p, seed, features["origin"], (batch, heads, queries, keys), device)
    v = torch.eye(keys, device=device)[:, None].repeat(batch, 1, 1, 1).requires_grad_()
    out = flash_attention(q, k, v, **features)
    assert torch.equal(out.transpose(1, 2) != 0, keep)
    dout = torch.eye(heads * queries, device=device).view(heads, queries, keys).transpose(0, 1).repeat(batch, 1, 1, 1)
    (dv,) = torch.autograd.grad(out, v, dout)
    shares = dv[:, :, 0].view(batch, keys, heads, queries).permute(0, 2, 3, 1)
    words = "the backward drops other shares"
    torch.testing.assert_close(shares, out.transpose(1, 2).detach(), rtol=1e-5, atol=0, msg=lambda rest: f"{words}\n{rest}")


def test_a_part_drops_what_the_whole_drops(device):
    """Some of the batch, of the heads (with theirs of k and v), of the queries, of the keys."""
    q, k, v = tensors((32, 48), (4, 2), 32, torch.float32, device)
    features = dict(causal=False, dropout_p=0.3, seed=9, return_lse=True)
    whole, _ = flash_attention(q, k, v, **features)
    parts = {
        "sequence": (flash_attention(q[1:], k[1:], v[1:], origin=(1, 0, 0, 0), **features)[0], whole[1:]),
        "heads": (
            flash_attention(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:], origin=(0, 2, 0, 0), **features)[0],
            whole[:, :, 2:],
        ),
        "queries": (flash_attention(q[:, 16:], k, v, origin=(0, 0, 16, 0), **features)[0], whole[:, 16:]),
    }
    for name, (got, want) in parts.items():
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, msg=name)
    places = (slice(0, 23), slice(23, 48))
    keys = [flash_attention(q, k[:, at], v[:, at], origin=(0, 0, 0, at.start), **features) for at in places]
    torch.testing.assert_close(merge_attention(keys)[0], whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("features", [{}, dict(causal=False, window=(10, 3), dropout_p=0.2, seed=3)], ids=["causal", "more"])
def test_packed_documents_are_as_if_alone(features, device):
    """To the bit: a document's tiles begin where it begins. Also with another document full of NaN."""
    lengths = (sum(DOCUMENTS[0]), sum(DOCUMENTS[1]))
    inputs = [x.requires_grad_() for x in tensors(lengths, (2, 1), 32, torch.bfloat16, device, batch=0)]
    of_q, of_k = (starts(lengths, device) for lengths in DOCUMENTS)
    packed = dict(cu_seqlens_q=of_q, cu_seqlens_k=of_k, return_lse=True, **features)
    bad = [x.detach().clone() for x in inputs]
    for x, places in zip(bad, (of_q, of_k, of_k), strict=True):
        x[places[3] : places[4]] = torch.nan
    bad = [x.requires_grad_() for x in bad]
    results = flash_attention(*inputs, **packed), flash_attention(*bad, **packed)
    generator = torch.Generator().manual_seed(4)
    dout, dlse = (torch.randn(x.shape, generator=generator).to(x) for x in results[0])
    grads = [torch.autograd.grad(result, leaves, [dout, dlse]) for result, leaves in zip(results, (inputs, bad), strict=True)]
    for n in range(len(DOCUMENTS[0])):
        rows, columns = slice(of_q[n], of_q[n + 1]), slice(of_k[n], of_k[n + 1])
        alone = [x.detach()[None, at].clone().requires_grad_() for x, at in zip(inputs, (rows, columns, columns), strict=True)]
        out, lse = flash_attention(*alone, origin=(n, 0, 0, 0), return_lse=True, **features)
        want = torch.autograd.grad([out, lse], alone, [dout[None, rows], dlse[None, :, rows]])
        for i, ((whole, whole_lse), of_all) in enumerate(zip(results, grads, strict=True)):
            if i == 1 and n == 3:
                continue
            words = f"document {n}" + " beside one of NaN" * i
            assert torch.equal(whole[rows], out[0]) and torch.equal(whole_lse[:, rows], lse[0]), words
            for got, expected, at in zip(of_all, want, (rows, columns, columns), strict=True):
                assert torch.equal(got[at], expected[0]), f"{words}: a gradient"


def test_a_long_document_among_short_ones(judge, device):
    """Of many tiles; and so many short ones that a tile has several."""
    lengths = [3] * 4 + [49] + [2] * 3
    features = dict(cu_seqlens_q=starts(lengths, device), cu_seqlens_k=starts(lengths, device))
    same_as_formula(judge, tensors((sum(lengths),) * 2, (2, 1), 32, torch.float32, device, batch=0), **features)


@pytest.mark.parametrize("times", [1.0, 60.0], ids=["", "large scores"])
def test_parts_over_the_keys_are_put_together(times, judge, device):
    """As a ring of ranks does, with its gradients through the lse: keys in three parts, which some of the queries do not see."""
    q, k, v = tensors((40, 40), (1, 1), 32, torch.float32, device, batch=1)
    edges = [0, 10, 30, 40]

    def ours(q, k, v):
        parts = []
        for begin, end in pairwise(edges):
            out, lse = flash_attention(q[:, begin:end], k[:, begin:end], v[:, begin:end], return_lse=True)
            after, lse_after = flash_attention(q[:, end:], k[:, begin:end], v[:, begin:end], causal=False, return_lse=True)
            before = (q.new_zeros(1, begin, 1, 32), lse.new_full((1, 1, begin), -torch.inf))  # these see none of it
            parts.append((torch.cat((before[0], out, after), 1), torch.cat((before[1], lse, lse_after), 2)))
        return merge_attention(parts)

    judge(ours, lambda q, k, v: formula(q, k, v), [q * times, k, v], 2e-6 if times == 1.0 else 2e-5)
