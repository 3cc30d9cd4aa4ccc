"""The loader: the same global batches on every layout, from any sample on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megalm.data.indexed import IndexedDataset, IndexedWriter
from megalm.data.loader import Loader
from megalm.data.packing import GPTDataset


@pytest.fixture
def dataset(tmp_path):
    with IndexedWriter(tmp_path / "corpus", 1000) as writer:
        for i in range(10):
            writer.add_document(np.arange(i * 50, i * 50 + 37))
    return GPTDataset(IndexedDataset(tmp_path / "corpus"), 8, np.arange(10), 0)


def global_batch(dataset, micro_batch_size: int, data_size: int, consumed: int):
    """Tokens, labels and sample numbers of one step, ranks in order."""
    loaders = [Loader(dataset, 12, micro_batch_size, rank, data_size) for rank in range(data_size)]
    batches = [batch for loader in loaders for batch in loader.step(consumed)]
    for loader in loaders:
        loader.close()
    numbers = torch.cat([batch.samples for batch in batches]).tolist()
    return torch.cat([batch.tokens for batch in batches]), torch.cat([batch.labels for batch in batches]), numbers


@pytest.mark.parametrize(("micro_batch_size", "data_size"), [(12, 1), (4, 1), (1, 1), (3, 2), (2, 3), (1, 12)])
@pytest.mark.parametrize("consumed", [0, 36, 36_000])
def test_every_layout_sees_the_same_global_batch(dataset, micro_batch_size, data_size, consumed):
    tokens, labels, numbers = global_batch(dataset, micro_batch_size, data_size, consumed)
    expected = torch.from_numpy(np.stack([dataset.sample(n) for n in range(consumed, consumed + 12)]))
    assert numbers == list(range(consumed, consumed + 12))
    assert torch.equal(tokens, expected[:, :-1])
    assert torch.equal(labels, expected[:, 1:])


def test_shapes_and_types(dataset):
    loader = Loader(dataset, 12, 3, 1, 2)
    batches = loader.step(0)
    loader.close()
    assert len(batches) == 2
    for batch in batches:
        assert batch.tokens.shape == batch.labels.shape == (3, 8)
        assert batch.tokens.is_contiguous() and batch.labels.is_contiguous()
        assert {batch.tokens.dtype, batch.labels.dtype, batch.samples.dtype} == {torch.int64}


def test_steps_read_ahead_equal_steps_read_afresh(dataset):
    loader = Loader(dataset, 4, 2, 0, 1)
    order = [0, 4, 8, 100, 104, 0, 4]  # in turn, a jump, in turn, back
    ahead = [torch.cat([batch.tokens for batch in loader.step(consumed)]) for consumed in order]
    loader.close()
    for consumed, tokens in zip(order, ahead, strict=True):
        fresh = Loader(dataset, 4, 2, 0, 1)
        assert torch.equal(tokens, torch.cat([batch.tokens for batch in fresh.step(consumed)]))
        fresh.close()


def test_the_next_step_is_read_in_the_background(dataset):
    loader = Loader(dataset, 4, 2, 0, 1)
    loader.step(0)
    consumed, future = loader._next
    assert consumed == 4
    expected = future.result()
    assert loader.step(4) is expected
    loader.close()


def test_a_rank_that_does_not_read_knows_the_samples(dataset):
    loader = Loader(dataset, 12, 3, 1, 2, reads=False)
    batches = loader.step(24)
    assert [batch.samples.tolist() for batch in batches] == [[30, 31, 32], [33, 34, 35]]
    assert all(batch.tokens is None and batch.labels is None for batch in batches)
    assert loader._next is None
    loader.close()


@pytest.mark.parametrize(("size", "micro", "rank", "ranks"), [(10, 4, 0, 1), (12, 4, 0, 2), (12, 3, 2, 2)])
def test_layout_that_does_not_divide_is_a_bug(dataset, size, micro, rank, ranks):
    with pytest.raises(AssertionError):
        Loader(dataset, size, micro, rank, ranks)


def test_an_error_in_the_background_arrives(dataset, monkeypatch):
    loader = Loader(dataset, 4, 2, 0, 1)
    monkeypatch.setattr(dataset, "samples", lambda numbers: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loader.step(0)
    loader.close()


def test_a_rank_of_the_context_gets_its_tokens_of_every_sample(dataset):
    whole, part = Loader(dataset, 12, 3, 0, 2), Loader(dataset, 12, 3, 0, 2, places=np.array([0, 1, 6, 7]))
    for all_of, some in zip(whole.step(0), part.step(0), strict=True):
        assert torch.equal(some.tokens, all_of.tokens[:, [0, 1, 6, 7]]) and some.tokens.is_contiguous()
        assert torch.equal(some.labels, all_of.labels[:, [0, 1, 6, 7]]) and torch.equal(some.samples, all_of.samples)
    whole.close(), part.close()


@pytest.mark.parametrize("places", [None, np.array([1, 5, 6])])
@pytest.mark.parametrize("reads", [True, False])
def test_documents_of_a_batch(dataset, places, reads):
    """A document is 37 numbers from a multiple of 50 on: a token's remainder is its place in the document."""
    loader = Loader(dataset, 24, 12, 0, 1, reads, places=places, document_mask=True)
    seen = 0
    for batch in loader.step(0):
        rows = torch.from_numpy(dataset.samples(batch.samples.numpy()))
        starts = [[0, *((row[1:8] % 50 == 0).nonzero()[:, 0] + 1).tolist()] for row in rows]
        assert batch.documents.starts == tuple(map(tuple, starts))
        assert batch.documents.cu_seqlens.tolist() == [8 * i + s for i, row in enumerate(starts) for s in row] + [96]
        here = slice(None) if places is None else places
        first = rows[:, :1] % 50 * (rows[:, :8] // 50 == rows[:, :1] // 50)  # what the sample's first document lacks
        assert torch.equal(batch.documents.positions, (rows[:, :8] % 50 - first)[:, here])
        seen += sum(len(row) > 1 for row in starts)
        if reads:
            last = (rows[:, 1:] % 50 == 0)[:, here]
            assert torch.equal(batch.labels == -100, last) and torch.equal(batch.labels[~last], rows[:, 1:][:, here][~last])
    loader.close()
    assert seen > 3
