"""Stages are cut evenly, or so that the most expensive one is as cheap as it can be."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator

import pytest

from megalm.parallel.split import Cost, balanced_split, even_split, layers_of_stage


@pytest.mark.parametrize(("stages", "layers"), [(1, 4), (2, 4), (2, 5), (3, 5), (4, 4), (6, 7), (5, 13)])
def test_even(stages: int, layers: int) -> None:
    split = even_split(layers, stages)
    assert len(split) == stages and sum(split) == layers
    assert max(split) - min(split) <= 1 and min(split) >= 1
    assert [i for stage in range(stages) for i in layers_of_stage(stage, split)] == list(range(layers))
    assert balanced_split(layers, stages, []) == split


def test_by_hand() -> None:
    blocks: Cost = lambda stage, layers: len(layers) + (2.4 if stage == 3 else 0)  # noqa: E731  the head: 2.4 blocks
    assert balanced_split(32, 4, [blocks]) in ([9, 9, 8, 6], [8, 9, 9, 6], [9, 8, 9, 6])
    weights: Cost = lambda stage, layers: len(layers) + (2.4 if stage in (0, 3) else 0)  # noqa: E731  and the embedding
    assert balanced_split(32, 4, [blocks, weights]) == [8, 9, 9, 6]
    assert balanced_split(32, 4, [weights]) == [7, 9, 9, 7]
    heavy: Cost = lambda stage, layers: len(layers) + (9 if stage == 2 else 0)  # noqa: E731  a head worth more than all
    assert balanced_split(4, 3, [heavy])[2] == 0
    assert balanced_split(1, 3, [heavy]) == [0, 1, 0]


def all_splits(layers: int, stages: int) -> Iterator[list[int]]:
    """Every split that leaves no inner stage empty."""
    for cuts in itertools.combinations_with_replacement(range(layers + 1), stages - 1):
        split = [b - a for a, b in itertools.pairwise((0, *cuts, layers))]
        if all(split[1:-1]):
            yield split


def test_nothing_beats_it() -> None:
    """Against all splits, with a cost of its own for every layer and stage, in the order of the costs."""
    rng = random.Random(5)
    for case in range(300):
        layers, stages = rng.randint(1, 9), rng.randint(1, 5)
        if stages > layers + 2:
            continue
        # Small whole numbers, so that many splits are equal by the first cost.
        tables = [([rng.randint(1, 4) for _ in range(layers)], [rng.randint(0, 6) for _ in range(stages)]) for _ in range(2)]
        costs: list[Cost] = [
            lambda stage, run, table=table: sum(table[0][i] for i in run) + table[1][stage] for table in tables
        ]

        def price(split: list[int], costs: list[Cost] = costs, even: list[int] = even_split(layers, stages)) -> tuple:  # noqa: B008
            worst = [max(cost(s, layers_of_stage(s, split)) for s in range(len(split))) for cost in costs]
            return *worst, sum((n - e) ** 2 for n, e in zip(split, even, strict=True))

        found = balanced_split(layers, stages, costs)
        assert sum(found) == layers and len(found) == stages and all(found[1:-1]), (case, found)
        assert price(found) == min(map(price, all_splits(layers, stages))), (case, found)


def test_large_models_take_no_time() -> None:
    begin = time.perf_counter()
    for stages in (16, 64, 126):
        assert sum(balanced_split(126, stages, [lambda stage, layers: len(layers) * (1 + 0.01 * stage)] * 2)) == 126
    assert time.perf_counter() - begin < 5


def test_too_few_layers() -> None:
    with pytest.raises(AssertionError, match="too few"):
        balanced_split(2, 5, [])
