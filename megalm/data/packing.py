"""Fixed-length samples cut from packed documents, in an order that depends on the seed and the sample number only.

The documents of a split, in a seeded order, form one stream of tokens. Window i of the stream is

    stream[i * S : i * S + S + 1]        S inputs and, one place later, S labels; neighbours share one token

and one epoch visits every window once, in a second seeded order (windows that follow each other come from the same
document; a batch of them would be a poor estimate of the gradient). Each epoch has orders of its own. Nothing depends
on ranks or on the batch size, so a run may resume at any sample, on any layout.

An epoch costs three numbers per document and one per sample in memory, a sample one binary search over the documents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megalm.data.indexed import IndexedDataset
from megalm.errors import DataError, Problem

SPLITS = ("train", "valid", "test")
_SPLIT, _DOCUMENTS, _WINDOWS = range(3)  # what a permutation is for: each purpose has a random stream of its own


def permutation(size: int, *key: int) -> np.ndarray:
    """A random order of range(size) that depends on `key` only.

    RandomState and not Generator: numpy promises never to change its streams.
    """
    order = np.arange(size, dtype=np.uint32 if size < 2**32 else np.int64)
    np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key))).shuffle(order)
    return order


def parse_split(split: str) -> list[float]:
    """Shares of train, valid and test, adding up to 1, from a text such as `98,2,0`; DataError for another form."""
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        shares = []
    usable = len(shares) == 3 and all(math.isfinite(share) and share >= 0 for share in shares) and sum(shares) > 0
    if not usable:
        rule = "not the three shares of training, validation and test"
        raise DataError(Problem("data.split", split, rule, "three numbers >= 0, not all 0", "data.split='0.98,0.02,0'"))
    return [share / sum(shares) for share in shares]


def fold_documents(indexed: IndexedDataset, split: str, seed: int, fold: int, num_folds: int) -> dict[str, np.ndarray]:
    """Document numbers of `train`, `valid` and `test`, (n,), in cross-validation: part `fold` of `num_folds` validates.

    The parts are consecutive in the seeded order and hold about as many tokens each; the test share is that of `split`, so
    every fold has the same test documents, and each other document validates in one fold exactly.
    """
    dealt = split_documents(indexed, split, seed)
    order = np.concatenate((dealt["train"], dealt["valid"]))
    ends = np.cumsum(indexed.document_lengths[order])
    total = int(ends[-1]) if len(ends) else 0
    first, last = (_nearest_border(ends, total * part / num_folds) for part in (fold, fold + 1))
    valid, rest = order[first:last], np.concatenate((order[:first], order[last:]))
    return {"train": rest, "valid": valid, "test": dealt["test"]}


def split_documents(indexed: IndexedDataset, split: str, seed: int) -> dict[str, np.ndarray]:
    """Deal the documents out to `train`, `valid` and `test`: document numbers of each, (n,).

    A seeded permutation is cut at the document borders that are nearest to the wanted shares of the tokens. A split
    with a share gets at least one document, as long as there are enough.
    """
    order = permutation(indexed.num_documents, seed, _SPLIT)
    ends = np.cumsum(indexed.document_lengths[order])
    shares = parse_split(split)
    first, second = (_nearest_border(ends, tokens) for tokens in np.cumsum(shares)[:2] * indexed.num_tokens)
    train, valid, test = (int(share > 0) for share in shares)  # documents that each split needs
    first = max(min(first, len(order) - valid - test), train)
    second = min(max(second, first + valid), max(len(order) - test, first + valid), len(order))
    cuts = (0, first, second, len(order))
    return {name: order[cuts[i] : cuts[i + 1]] for i, name in enumerate(SPLITS)}


def _nearest_border(ends: np.ndarray, tokens: float) -> int:
    """How many documents hold about `tokens` tokens; ends (n,) is the running sum of their lengths."""
    borders = np.concatenate(([0], ends))
    after = min(int(borders.searchsorted(tokens)), len(ends))
    before = max(after - 1, 0)
    return after if borders[after] - tokens <= tokens - borders[before] else before


@dataclass(frozen=True)
class Epoch:
    """The order of one pass: where each document ends in the stream and in the file, and the window of each sample."""

    ends: np.ndarray  # (documents,) int64, tokens
    file_ends: np.ndarray  # (documents,) int64, tokens
    windows: np.ndarray  # (samples,)


class GPTDataset:
    """Samples of `seq_length` + 1 tokens, without end: `len()` of them are one epoch.

    documents: (n,) numbers of the documents to use, from `split_documents`. Raises DataError if they hold less than one
    sample; `name` is the split that the error speaks of, `remedy` its fix.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        seq_length: int,
        documents: np.ndarray,
        seed: int,
        name: str = "train",
        remedy: str = "",
    ):
        self.indexed = indexed
        self.seq_length = seq_length
        self.documents = documents
        self.seed = seed
        self.num_tokens = int(indexed.document_lengths[documents].sum())
        self._num_samples = (self.num_tokens - 1) // seq_length
        if self._num_samples < 1:
            raise _too_small(name, self.num_tokens, seq_length, remedy)
        self.epoch = lru_cache(maxsize=2)(self._build_epoch)  # two, for a batch that lies across an epoch's end

    def __len__(self) -> int:
        return self._num_samples

    def _build_epoch(self, number: int) -> Epoch:
        order = self.documents[permutation(len(self.documents), self.seed, _DOCUMENTS, number)]
        lengths = self.indexed.document_lengths[order]
        windows = permutation(self._num_samples, self.seed, _WINDOWS, number)
        return Epoch(np.cumsum(lengths), self.indexed.document_starts[order] + lengths, windows)

    def sample(self, number: int) -> np.ndarray:
        """Sample `number` >= 0, counted over all epochs: (S+1,) int64."""
        tokens = np.empty(self.seq_length + 1, np.int64)
        self.fill(number, tokens)
        return tokens

    def samples(self, numbers: np.ndarray) -> np.ndarray:
        """Several samples, (n, S+1) int64."""
        rows = np.empty((len(numbers), self.seq_length + 1), np.int64)
        for row, number in zip(rows, numbers.tolist(), strict=True):
            self.fill(number, row)
        return rows

    def fill(self, number: int, row: np.ndarray) -> None:
        """Write sample `number` into row (S+1,): the rest of the document that it begins in, then the next ones."""
        assert number >= 0, "samples are counted from 0"
        epoch_number, index = divmod(number, self._num_samples)
        epoch, tokens = self.epoch(epoch_number), self.indexed.tokens
        place = int(epoch.windows[index]) * self.seq_length
        document = int(epoch.ends.searchsorted(place, "right"))
        done, wanted = 0, len(row)
        while done < wanted:
            left = int(epoch.ends[document]) - place  # tokens of this document from `place` on
            count = min(left, wanted - done)
            source = int(epoch.file_ends[document]) - left
            row[done : done + count] = tokens[source : source + count]
            done, place, document = done + count, place + count, document + 1


    def document_starts(self, number: int) -> list[int]:
        """Where the documents of sample `number` begin among its S inputs; the first, which may be cut, at 0."""
        epoch_number, index = divmod(number, self._num_samples)
        epoch = self.epoch(epoch_number)
        place = int(epoch.windows[index]) * self.seq_length
        first, last = epoch.ends.searchsorted((place, place + self.seq_length - 1), "right")
        return [0, *(epoch.ends[first:last] - place).tolist()]


def _too_small(name: str, tokens: int, seq_length: int, remedy: str) -> DataError:
    rule = f"the {name} split has {tokens} tokens, less than one sample of data.seq_length + 1 = {seq_length + 1}"
    shorter = f"data.seq_length={tokens - 1}, or " if tokens > 1 else ""
    fix = remedy or f"{shorter}prepare a larger corpus"
    return DataError(Problem("data.split", name, rule, f">= {seq_length + 1} tokens", fix))
