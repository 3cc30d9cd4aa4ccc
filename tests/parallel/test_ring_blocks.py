"""The blocks of a ring against the mask of the whole sample, place by place; and how the work is shared out."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from megalm.parallel.context_parallel import local_tokens
from megalm.parallel.ring_blocks import Block, Starts, blocks, local_chunks


def whole_mask(seq_length: int, window: int, starts: tuple[int, ...]) -> np.ndarray:
    """(S, S) bool: who sees whom in one sample."""
    place = np.arange(seq_length)
    seen = place[None, :] <= place[:, None]
    if window:
        seen &= place[:, None] - place[None, :] <= window
    if starts:
        document = np.searchsorted(starts, place, side="right")
        seen &= document[:, None] == document[None, :]
    return seen


def rectangle(queries: int, keys: int, block: Block) -> np.ndarray:
    """(queries, keys) int: what attention lets be seen, aligned at the end."""
    ahead = np.arange(keys)[None, :] - (np.arange(queries)[:, None] + keys - queries)
    seen = np.ones_like(ahead, dtype=bool)
    seen &= ahead <= 0 if block.causal else seen
    return (seen & (ahead >= -block.left) if block.left >= 0 else seen).astype(int)


def computed(size: int, seq_length: int, window: int, starts: Starts, samples: int) -> np.ndarray:
    """(samples, S, S) int: how often the ranks together compute each place."""
    found = np.zeros((samples, seq_length, seq_length), dtype=int)
    places = [local_tokens("ring", size, rank, seq_length).numpy() for rank in range(size)]
    for rank in range(size):
        for block in blocks(size, rank, seq_length, window, starts):
            assert block.source == (rank - block.step) % size
            mine, theirs = places[rank], places[block.source]
            if not block.borders:
                rows, columns = mine[slice(*block.queries)], theirs[slice(*block.keys)]
                assert min(len(rows), len(columns)) > 0 and (not block.causal or len(rows) == len(columns))
                for sample in range(samples) if block.sample is None else (block.sample,):
                    found[sample][np.ix_(rows, columns)] += rectangle(len(rows), len(columns), block)
                continue
            assert block.borders[-1] == samples * len(mine) and block.queries == block.keys == (0, block.borders[-1])
            for begin, end in itertools.pairwise(block.borders):
                assert begin < end
                (sample,) = {begin // len(mine), (end - 1) // len(mine)}
                at = mine[begin - sample * len(mine) : end - sample * len(mine)]
                found[sample][np.ix_(at, at)] += rectangle(len(at), len(at), block)
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_blocks_are_the_mask(size: int) -> None:
    """Each place that is seen once, no other; every window, and documents that begin anywhere or are empty."""
    draw = random.Random(size)
    for chunk in (1, 2, 3, 5):
        seq_length = 2 * size * chunk
        for window in (0, *range(1, min(seq_length, 12)), seq_length - 2, seq_length - 1, 2 * seq_length):
            for many in (0, 1, 2, 3, 6):
                inner = [sorted(draw.choices(range(1, seq_length), k=many)) if many > 1 else [] for _ in range(2)]
                starts = tuple((0, *sample) for sample in inner) if many else ()
                got = computed(size, seq_length, window, starts, 2)
                want = [whole_mask(seq_length, window, starts[sample] if starts else ()) for sample in range(2)]
                assert np.array_equal(got, np.stack(want)), (seq_length, window, starts)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_every_step_is_the_same_work_for_all(size: int) -> None:
    """What zig-zag is for: half of a rank's queries and keys at each step but the first, which is the triangle."""
    seq_length, chunk = 8 * size, 4
    for rank in range(size):
        assert local_chunks(size, rank) == (rank, 2 * size - 1 - rank)
        work = {block.step: np.ptp(block.queries) * np.ptp(block.keys) for block in blocks(size, rank, seq_length)}
        assert work == {0: 4 * chunk**2} | dict.fromkeys(range(1, size), 2 * chunk**2)


def test_nothing_is_computed_that_nobody_sees() -> None:
    """A window of one chunk leaves each chunk itself and the one before; documents of a chunk's length only itself."""
    size, chunk = 4, 8
    found = [block for rank in range(size) for block in blocks(size, rank, 2 * size * chunk, chunk)]
    assert len([block for block in found if block.causal]) == 2 * size and len(found) == 4 * size - 1
    starts = (tuple(range(0, 2 * size * chunk, chunk)),)
    assert all(len(blocks(size, rank, 2 * size * chunk, 0, starts)) == 1 for rank in range(size))


def test_places_of_a_rank() -> None:
    assert local_tokens("ring", 2, 0, 8).tolist() == [0, 1, 6, 7] and local_tokens("ring", 2, 1, 8).tolist() == [2, 3, 4, 5]
    assert local_tokens("ulysses", 2, 1, 8).tolist() == [4, 5, 6, 7]
    for method in ("ring", "ulysses"):
        assert local_tokens(method, 1, 0, 5).tolist() == [0, 1, 2, 3, 4]
