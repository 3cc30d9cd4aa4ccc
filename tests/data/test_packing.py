"""Packing: the samples are the stream's windows, once per epoch, in an order of (seed, number) only."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.indexed import IndexedDataset, IndexedWriter
from megalm.data.packing import GPTDataset, fold_documents, parse_split, permutation, split_documents
from megalm.errors import DataError


def corpus(folder: Path, lengths: list[int]) -> IndexedDataset:
    """Documents of these lengths; token k of the whole file is k, so that a sample shows where it was cut."""
    first = np.cumsum([0, *lengths])
    with IndexedWriter(folder / "corpus", 1 << 24) as writer:
        for start, length in zip(first[:-1], lengths, strict=True):
            writer.add_document(np.arange(start, start + length))
    return IndexedDataset(folder / "corpus")


def stream_of(dataset: GPTDataset, epoch: int) -> np.ndarray:
    """The epoch's documents joined, the slow and plain way."""
    ends = dataset.epoch(epoch).file_ends
    indexed = dataset.indexed
    by_end = {int(indexed.document(i)[-1]) + 1: indexed.document(i) for i in range(indexed.num_documents)}
    return np.concatenate([by_end[int(end)] for end in ends])


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_every_window_of_the_stream_once(tmp_path_factory, lengths, seq_length, seed):
    if sum(lengths) <= seq_length:
        lengths = [*lengths, seq_length]
    indexed = corpus(tmp_path_factory.mktemp("c"), lengths)
    dataset = GPTDataset(indexed, seq_length, np.arange(len(lengths)), seed)
    size = len(dataset)
    assert size == (sum(lengths) - 1) // seq_length
    for epoch in range(3):
        stream = stream_of(dataset, epoch)
        assert sorted(stream) == list(range(sum(lengths)))
        windows = [stream[i * seq_length : i * seq_length + seq_length + 1].tolist() for i in range(size)]
        samples = [dataset.sample(epoch * size + i).tolist() for i in range(size)]
        assert sorted(samples) == sorted(windows)


def test_golden_order(tmp_path):
    """Frozen: a change here changes what every resumed run reads next."""
    dataset = GPTDataset(corpus(tmp_path, [4, 3, 6, 2, 5]), 3, np.arange(5), seed=7)
    got = [dataset.sample(n).tolist() for n in (0, 1, 2, 5, 6, 6_000_000)]
    expected = [[8, 9, 10, 11], [5, 6, 7, 8], [13, 14, 4, 5], [1, 2, 3, 13], [18, 19, 13, 14], [9, 10, 11, 12]]
    assert got == expected


def test_permutation_stream_is_frozen():
    assert permutation(8, 1234, 0).tolist() == [1, 6, 4, 0, 3, 5, 2, 7]


def test_order_depends_on_seed_and_epoch_only(tmp_path):
    indexed = corpus(tmp_path, [40] * 20)
    one, same, other = (GPTDataset(indexed, 8, np.arange(20), seed) for seed in (1, 1, 2))
    size = len(one)
    forward = [one.sample(n).tolist() for n in range(3 * size)]
    backward = [same.sample(n).tolist() for n in reversed(range(3 * size))][::-1]
    assert forward == backward
    assert forward[:size] != forward[size : 2 * size]
    assert forward[:size] != [other.sample(n).tolist() for n in range(size)]


def test_samples_are_rows_of_sample(tmp_path):
    dataset = GPTDataset(corpus(tmp_path, [40, 7, 90]), 8, np.arange(3), 0)
    numbers = np.array([3, 0, 40])
    rows = dataset.samples(numbers)
    assert rows.dtype == np.int64 and rows.shape == (3, 9)
    assert rows.tolist() == [dataset.sample(int(n)).tolist() for n in numbers]


@given(st.lists(st.integers(1, 9), min_size=3, max_size=12), st.integers(1, 7), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_where_documents_begin(tmp_path_factory, lengths, seq_length, seed):
    """Every document is of one token of its own, so that the stream tells where each begins."""
    if sum(lengths) < seq_length + 1:
        return
    prefix = tmp_path_factory.mktemp("data") / "corpus"
    with IndexedWriter(prefix, 1000) as writer:
        for number, length in enumerate(lengths):
            writer.add_document(np.full(length, number))
    dataset = GPTDataset(IndexedDataset(prefix), seq_length, np.arange(len(lengths)), seed)
    for number in range(2 * len(dataset)):
        inputs = dataset.sample(number)[:-1]
        changes = [place for place in range(1, seq_length) if inputs[place] != inputs[place - 1]]
        assert dataset.document_starts(number) == [0, *changes]


def test_two_epochs_are_kept_at_most(tmp_path):
    dataset = GPTDataset(corpus(tmp_path, [40, 7, 90]), 8, np.arange(3), 0)
    for epoch in range(5):
        dataset.sample(epoch * len(dataset))
    assert dataset.epoch.cache_info().currsize == 2


@pytest.mark.parametrize(("documents", "name"), [([0], "train"), ([], "valid")])
def test_too_few_tokens_for_one_sample(tmp_path, documents, name):
    indexed = corpus(tmp_path, [8, 100])
    assert len(GPTDataset(indexed, 7, np.array([0]), 0)) == 1
    with pytest.raises(DataError, match=f"the {name} split has {8 * len(documents)} tokens") as caught:
        GPTDataset(indexed, 8, np.array(documents, np.int64), 0, name)
    assert caught.value.problems[0].fix


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.lists(st.integers(0, 9), min_size=3, max_size=3))
@settings(max_examples=100, deadline=None)
def test_splits_share_out_all_documents(tmp_path_factory, lengths, shares):
    shares = shares if sum(shares) else [1, 1, 1]
    indexed = corpus(tmp_path_factory.mktemp("c"), lengths)
    splits = split_documents(indexed, ",".join(map(str, shares)), 3)
    assert sorted(np.concatenate(list(splits.values()))) == list(range(len(lengths)))
    for share, documents in zip(shares, splits.values(), strict=True):
        tokens = int(indexed.document_lengths[documents].sum())
        assert abs(tokens - share / sum(shares) * indexed.num_tokens) <= 100
        assert (len(documents) > 0) == (share > 0) or len(lengths) < 3


def test_split_is_seeded_and_close_to_the_shares(tmp_path):
    indexed = corpus(tmp_path, [10] * 1000)
    splits = split_documents(indexed, "0.9,0.08,0.02", 5)
    assert [len(splits[name]) for name in ("train", "valid", "test")] == [900, 80, 20]
    again, other = split_documents(indexed, "90,8,2", 5), split_documents(indexed, "90,8,2", 6)
    assert splits["valid"].tolist() == again["valid"].tolist() != other["valid"].tolist()
    assert splits["valid"].tolist() != sorted(splits["valid"].tolist())


@given(st.lists(st.integers(1, 50), min_size=5, max_size=60), st.integers(2, 5))
@settings(max_examples=50, deadline=None)
def test_every_document_validates_in_one_fold_and_trains_in_the_others(tmp_path_factory, lengths, num_folds):
    indexed = corpus(tmp_path_factory.mktemp("c"), lengths)
    folds = [fold_documents(indexed, "0.7,0.1,0.2", 3, fold, num_folds) for fold in range(num_folds)]
    test = split_documents(indexed, "0.7,0.1,0.2", 3)["test"].tolist()
    left = sorted(set(range(len(lengths))) - set(test))
    assert sorted(np.concatenate([fold["valid"] for fold in folds])) == left
    share = int(indexed.document_lengths[left].sum()) / num_folds
    for fold in folds:
        assert fold["test"].tolist() == test
        assert sorted([*fold["train"], *fold["valid"]]) == left
        assert abs(int(indexed.document_lengths[fold["valid"]].sum()) - share) <= 50


def test_a_small_share_gets_a_document(tmp_path):
    splits = split_documents(corpus(tmp_path, [50, 50, 50]), "0.98,0.01,0.01", 0)
    assert [len(documents) for documents in splits.values()] == [1, 1, 1]
    splits = split_documents(corpus(tmp_path, [50, 50, 50]), "0.98,0.02,0", 0)
    assert [len(documents) for documents in splits.values()] == [2, 1, 0]


def test_one_document_goes_to_training(tmp_path):
    splits = split_documents(corpus(tmp_path, [50]), "0.98,0.02,0", 0)
    assert [len(documents) for documents in splits.values()] == [1, 0, 0]


@pytest.mark.parametrize("split", ["", "1", "1,0", "1,0,0,0", "a,b,c", "-1,1,1", "0,0,0", "nan,1,1", "inf,1,1"])
def test_a_split_that_is_none(split):
    with pytest.raises(DataError, match=r"data\.split"):
        parse_split(split)


def test_speed(tmp_path):
    """The anchor is 100,000 samples a second; a loaded machine gets a quarter of it for the median of five."""
    lengths = np.random.RandomState(0).randint(100, 4000, 500).tolist()
    dataset = GPTDataset(corpus(tmp_path, lengths), 256, np.arange(500), 0)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for number in range(2000):
            dataset.sample(number)
        times.append(time.perf_counter() - start)
    assert 2000 / sorted(times)[2] > 25_000
