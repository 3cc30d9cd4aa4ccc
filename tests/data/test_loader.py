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
