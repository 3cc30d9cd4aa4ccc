"""Who computes which part of causal attention in a ring, as a list of blocks: pure functions on numbers, without torch.

A sample's S tokens are cut into 2n chunks, and rank r of n has chunks r and 2n-1-r: an early one, whose queries see little, and a
late one, whose queries see much. So all ranks have the same work, in every step of the ring. At step t a rank has the keys of
rank r-t, and computes what its queries see of them:

    its own              the causal triangle of both chunks
    of an earlier rank   both chunks of queries see the early chunk of keys, whole; nobody sees the late one
    of a later rank      the late chunk of queries sees both chunks of keys, whole; the early one sees none

Under a sliding window or a document mask, pairs of chunks are told apart, and what nobody sees is not computed. Both masks
leave a rectangle of a pair, with a slanting edge by the window: attention's own options say that, and no block needs a mask.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

ALL = -1  # a window's side without a bound
Starts = tuple[tuple[int, ...], ...]
"""Where documents begin in each sample; the first is 0. Empty: nobody tells documents apart."""


@dataclass(frozen=True)
class Block:
    """Rows of this rank's queries against rows of the keys that it has at one step, by one call of attention.

    Aligned at the end, as attention is: the last query stands at the last key. `borders`: of the documents among the tokens of
    all samples of this rank, one behind the other; then queries and keys are all of these.
    """

    step: int
    source: int  # rank whose keys they are
    queries: tuple[int, int]  # from, to
    keys: tuple[int, int]
    causal: bool = False
    left: int = ALL  # keys that a query sees before its own place
    sample: int | None = None  # None: all of them
    borders: tuple[int, ...] = ()


def local_chunks(size: int, rank: int) -> tuple[int, int]:
    """The two of 2 * size chunks that a rank has, the early one first (zig-zag)."""
    return rank, 2 * size - 1 - rank


@lru_cache(maxsize=64)
def blocks(size: int, rank: int, seq_length: int, window: int = 0, starts: Starts = ()) -> tuple[Block, ...]:
    """A rank's blocks, in the order in which it computes them.

    window: a token sees so many tokens before its own; 0: all. seq_length must be a multiple of 2 * size.
    """
    assert seq_length % (2 * size) == 0, "checked by the configuration"
    chunk, window = seq_length // (2 * size), 0 if window >= seq_length - 1 else window
    if not window and not starts:
        return tuple(_plain(size, rank, chunk))
    found = list(_own(size, rank, chunk, window, starts))
    for step in range(size):
        found += _pairs(step, size, rank, chunk, window, starts)
    return tuple(found)


def _plain(size: int, rank: int, chunk: int) -> Iterator[Block]:
    early, late, both = (0, chunk), (chunk, 2 * chunk), (0, 2 * chunk)
    yield Block(0, rank, both, both, causal=True)
    for step in range(1, size):
        source = (rank - step) % size
        yield Block(step, source, both, early) if source < rank else Block(step, source, late, both)


def _own(size: int, rank: int, chunk: int, window: int, starts: Starts) -> Iterator[Block]:
    """Each of a rank's chunks with itself."""
    left = window if 0 < window < chunk - 1 else ALL
    if not starts:
        for at in (0, chunk):
            yield Block(0, rank, (at, at + chunk), (at, at + chunk), True, left)
        return
    borders = [0]
    for sample in starts:
        for number in local_chunks(size, rank):
            begin = borders[-1] - number * chunk
            borders += [begin + start for start in sorted(set(sample)) if number * chunk < start < (number + 1) * chunk]
            borders.append(begin + (number + 1) * chunk)
    yield Block(0, rank, (0, borders[-1]), (0, borders[-1]), True, left, borders=tuple(borders))


def _pairs(step: int, size: int, rank: int, chunk: int, window: int, starts: Starts) -> Iterator[Block]:
    """What this rank's chunks see of earlier chunks that another rank has, or this one, in whole rectangles."""
    source = (rank - step) % size
    for row, late in enumerate(local_chunks(size, rank)):
        for column, early in enumerate(local_chunks(size, source)):
            if early >= late:
                continue
            for sample, (start, end) in _documents_at(late * chunk, 2 * size * chunk, starts):
                queries, keys = min(end - late * chunk, chunk), min((early + 1) * chunk - start, chunk)
                left = ALL
                if window:  # beyond its reach nobody sees anybody
                    reach = window + chunk - (late - early) * chunk
                    queries, keys = min(queries, reach), min(keys, reach)
                    left = reach - queries if reach - queries < keys - 1 else ALL
                if queries > 0 and keys > 0:
                    begin, stop = row * chunk, (column + 1) * chunk
                    yield Block(step, source, (begin, begin + queries), (stop - keys, stop), False, left, sample)


def _documents_at(place: int, seq_length: int, starts: Starts) -> Iterator[tuple[int | None, tuple[int, int]]]:
    """(sample, (start, end) of the document that has `place`): of a chunk's documents only the first may be in an earlier one."""
    if not starts:
        yield None, (0, seq_length)
    for number, sample in enumerate(starts):
        yield number, _document_at(place, seq_length, sample)


def _document_at(place: int, seq_length: int, sample: Sequence[int]) -> tuple[int, int]:
    after = bisect_right(sample, place)
    return sample[after - 1], sample[after] if after < len(sample) else seq_length
