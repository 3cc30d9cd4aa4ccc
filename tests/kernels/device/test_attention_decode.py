"""The decoding kernels: samples of different lengths in one cache, ranges of keys put together, every feature of the scores."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from megalm_kernels import dispatch
from megalm_kernels.attention.call import Call
from megalm_kernels.attention.decode import decode, decode_attention, decode_attention_reference, takes
from megalm_kernels.attention.reference import attention_reference
from tests.kernels.device import far_memory
from tests.kernels.device.conftest import check_close
from tests.kernels.device.test_int64 import far_rows

EVERYTHING = dict(window_left=60, softcap=4.0, alibi_slopes=True, sinks=True)


@pytest.fixture(autouse=True)
def kernels(device):
    with dispatch.use("triton", device.type), torch.no_grad():
        yield


def cached(lengths, queries, heads, key_heads, width, dtype, device, keys=0) -> tuple[list[Tensor], Tensor]:
    """q, k, v, and lengths: the cache is a view of a larger one, and what lies past each sample's length is NaN."""
    generator = torch.Generator().manual_seed(2)
    keys = keys or max(lengths)

    def fill(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q, whole = fill(len(lengths), queries, heads, width), fill(2, len(lengths), keys + 3, key_heads + 1, width)
    for sample, length in enumerate(lengths):
        whole[:, sample, length:] = torch.nan
    k, v = whole[:, :, :keys, 1:]
    return [q, k, v], torch.tensor(lengths, dtype=torch.int32, device=device)


def check(inputs: list[Tensor], lengths: Tensor | None, **features) -> Tensor:
    """Against the formula in fp64, by the error of the formula in the inputs' dtype; a second run gives the same bits."""
    heads, device = inputs[0].shape[2], inputs[0].device
    if features.get("alibi_slopes"):
        features["alibi_slopes"] = torch.linspace(0.01, 0.5, heads, device=device).expand(len(inputs[0]), heads).clone()
        features["alibi_slopes"][0] *= 2.0
    if features.get("sinks"):
        features["sinks"] = torch.linspace(-3, 3, heads, device=device)
    ours = decode_attention(*inputs, lengths=lengths, **features)
    assert torch.equal(ours, decode_attention(*inputs, lengths=lengths, **features)), "a second run gave other bits"
    exact = decode_attention_reference(*(x.double() for x in inputs), lengths=lengths, **features)
    rough = decode_attention_reference(*inputs, lengths=lengths, **features)
    assert not exact.isnan().any()
    check_close("decode_attention", ours, rough, exact, 2e-6)
    return ours


# lengths: none, fewer than queries, one, of a block; in the first two cases there are ranges, in the last tiles of rows
@pytest.mark.parametrize(
    ("lengths", "queries", "heads", "key_heads", "width"),
    [((0, 2, 260), 3, 8, 1, 32), ((1, 128, 300), 1, 2, 2, 80), ((9, 70), 16, 8, 1, 128)],
)
def test_samples_of_different_lengths(lengths, queries, heads, key_heads, width, dtype, device):
    inputs, length = cached(lengths, queries, heads, key_heads, width, dtype, device)
    out = check(inputs, length)
    for sample, keys in enumerate(lengths):
        assert (out[sample, : max(0, queries - keys)] == 0).all(), "of a query before the first key"


@pytest.mark.parametrize("feature", EVERYTHING)
def test_features(feature, device):
    inputs, length = cached((2, 290), 3, 4, 2, 16, torch.float32, device)
    check(inputs, length, **{feature: EVERYTHING[feature]})


@pytest.mark.parametrize("keys", [90, 400], ids=["one range", "several"])
def test_everything_together(keys, dtype, device):
    inputs, length = cached((5, keys - 1), 5, 6, 2, 40, dtype, device, keys)
    check(inputs, length, **EVERYTHING)


def test_ranges_change_nothing_but_rounding(device, monkeypatch):
    """One to many of them, also more than there are blocks of keys: then some are empty."""
    module = importlib.import_module("megalm_kernels.device.attention_decode")
    inputs, length = cached((33, 200), 2, 2, 1, 16, torch.float32, device)
    outs = []
    for splits in (1, 2, 3, 9):
        monkeypatch.setattr(module, "_splits", lambda *shape, splits=splits: splits)
        outs.append(check(inputs, length, sinks=True))
        torch.testing.assert_close(outs[-1], outs[0], rtol=0, atol=1e-6)
    assert not torch.equal(outs[2], outs[0]), "the same bits: were there ranges at all?"


def test_how_many_ranges(monkeypatch):
    """For every multiprocessor (3, if this is no GPU) some, if there are keys for them; never too many to merge."""
    module = importlib.import_module("megalm_kernels.device.attention_decode")
    splits, cpu = module._splits, torch.device("cpu")
    assert [splits(1, keys, cpu) for keys in (0, 1, 255, 256, 10**6)] == [1, 1, 1, 2, 12]
    assert [splits(programs, 10**6, cpu) for programs in (5, 12, 1000)] == [3, 1, 1]
    monkeypatch.setattr(module, "multiprocessors", lambda device: 1000)
    assert splits(1, 10**6, cpu) == module.MOST_SPLITS


def test_large_scores_and_equal_ones(device):
    """Scores of thousands, of which a single one counts; and scores all equal, which give the mean of the values."""
    (q, k, v), _ = cached((600,), 1, 2, 1, 32, torch.float32, device)
    check([300.0 * q, k, v], None)
    out = decode_attention(torch.zeros_like(q), k, v)
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out), rtol=0, atol=1e-6)
    sinks = torch.tensor([1e4, -1e4], device=device)  # all of the softmax; none of it
    out = decode_attention(q, k, v, sinks=sinks)
    assert (out[:, :, 0] == 0).all() and torch.equal(out[:, :, 1], decode_attention(q, k, v)[:, :, 1])


def test_layouts_of_memory(dtype, device):
    """Queries with channels apart, a cache with heads first: the same bits as of contiguous copies."""
    (q, k, v), length = cached((300, 40), 2, 4, 2, 24, dtype, device)
    want = decode_attention(q, k.contiguous(), v.contiguous(), lengths=length)
    apart = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    assert torch.equal(decode_attention(apart, *heads_first, lengths=length), want)


def test_of_nothing(dtype, device):
    for batch, keys in ((0, 5), (2, 0)):
        q, k = (torch.ones(batch, *shape, 16, device=device, dtype=dtype) for shape in ((2, 4), (keys, 2)))
        out = decode_attention(q, k, k)
        assert out.shape == q.shape and (out == 0).all()


def test_a_length_that_the_cache_does_not_have_gives_nan_and_reads_nothing(device):
    """What a GPU does, which cannot refuse without waiting for it. The operator, because the function refuses on a CPU."""
    module = importlib.import_module("megalm_kernels.attention.decode")
    for keys in (40, 260):
        (q, k, v), _ = cached((keys,) * 3, 1, 2, 2, 16, torch.float32, device)
        lengths = torch.tensor([-1, keys, 10**9], dtype=torch.int32, device=device)
        out = module.decode_attention_op(q, k, v, lengths, -1, 0.2, 0.0, None, None)
        assert [x.isnan().all().item() for x in out] == [True, False, True] and not out[1].isnan().any()


def test_a_call_of_attention_that_is_one(device):
    """By the last rows of the whole: causal, with a window and sinks."""
    (q, k, v), _ = cached((300, 300), 2, 4, 2, 32, torch.float32, device)
    call = Call(left=200, right=0, scale=0.2, sinks=torch.zeros(4, device=device))
    assert takes(q, k, v, call)
    whole = torch.cat((torch.zeros_like(k).repeat_interleave(2, 2)[:, :298], q), 1)
    torch.testing.assert_close(decode(q, k, v, call), attention_reference(whole, k, v, call)[0][:, 298:], rtol=0, atol=1e-5)


def far_cache(device: torch.device) -> None:
    """Samples, keys and heads that lie 2^30 elements apart, 3 * 2^30 from the first to the last."""
    rows = far_rows(device).unflatten(1, (3, 16))
    with dispatch.use("triton", device.type), torch.no_grad():
        for x in (rows[:, :, None], rows[None], rows.transpose(0, 1)[None]):
            near = x.clone(memory_format=torch.contiguous_format)
            assert torch.equal(decode_attention(x, x, x), decode_attention(near, near, near)), tuple(x.shape)


def test_addresses_are_int64(device):
    far_memory.run_far(__name__, "far_cache", device)
