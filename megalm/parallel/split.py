"""How many layers each pipeline stage has, along the model: even, or balanced by what a stage costs.

Pure functions on numbers, without torch: a command line is checked with them. A split is a list of the stages' numbers of
layers, in the order of the model.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

Cost = Callable[[int, range], float]
"""(stage, its layers) -> what the stage costs, with the embedding or the head that it has besides."""


def even_split(num_layers: int, num_stages: int) -> list[int]:
    """As even as possible; where it does not divide, the later stages have one more."""
    bounds = [stage * num_layers // num_stages for stage in range(num_stages + 1)]
    return [stop - start for start, stop in itertools.pairwise(bounds)]


def layers_of_stage(stage: int, split: Sequence[int]) -> range:
    """The numbers of one stage's layers."""
    start = sum(split[:stage])
    return range(start, start + split[stage])


def balanced_split(num_layers: int, num_stages: int, costs: Sequence[Cost]) -> list[int]:
    """The split whose most expensive stage is cheapest by the first cost; of equals by the second, and so on.

    Exact, by dynamic programming over (stage, first layer not yet placed), once per cost: a cost's optimum becomes a limit
    that the next ones must keep. What is equal by all costs is decided by the distance to the even split. The first and the
    last stage may be left without a layer (an embedding or a head can be worth several), the others not.
    """
    assert num_stages <= num_layers + 2, f"{num_layers} layers are too few for {num_stages} stages"
    options = [_runs_of_layers(stage, num_layers, num_stages) for stage in range(num_stages)]
    for cost in costs:
        priced = [[(layers, cost(stage, layers)) for layers in runs] for stage, runs in enumerate(options)]
        limit, _ = _cheapest(priced, max)
        options = [[layers for layers, price in runs if price <= limit] for runs in priced]
    even = even_split(num_layers, num_stages)
    distances = [
        [(layers, float((len(layers) - even[stage]) ** 2)) for layers in runs] for stage, runs in enumerate(options)
    ]
    return [len(layers) for layers in _cheapest(distances, operator.add)[1]]


def _runs_of_layers(stage: int, num_layers: int, num_stages: int) -> list[range]:
    """What one stage may have, if each of the other inner stages gets a layer too."""
    if num_stages == 1:
        return [range(num_layers)]
    least = 1 if 0 < stage < num_stages - 1 else 0
    before, after = max(0, stage - 1), max(0, num_stages - stage - 2)  # inner stages on either side
    starts = range(before, num_layers - after - least + 1) if stage else (0,)
    last = stage == num_stages - 1
    return [
        range(start, stop)
        for start in starts
        for stop in ((num_layers,) if last else range(start + least, num_layers - after + 1))
    ]


def _cheapest(priced: list[list[tuple[range, float]]], join: Callable[[float, float], float]) -> tuple[float, list[range]]:
    """One run of layers per stage, end to end, whose prices joined are least: (price, runs). The first of equals."""
    ways: dict[int, tuple[float, Any]] = {0: (0.0, None)}  # first layer not yet placed -> (price, the runs so far, linked)
    for runs in priced:
        longer: dict[int, tuple[float, Any]] = {}
        for layers, price in runs:
            if layers.start in ways:
                so_far, linked = ways[layers.start]
                total = join(so_far, price)
                if layers.stop not in longer or total < longer[layers.stop][0]:
                    longer[layers.stop] = (total, (linked, layers))
        ways = longer
    price, linked = ways[max(ways)]
    chosen: list[range] = []
    while linked is not None:
        linked, layers = linked
        chosen.insert(0, layers)
    return price, chosen
