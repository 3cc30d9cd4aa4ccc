"""A layout's short name (`tp2_pp2_dp2_zero3`) applied to a run, and the list of all layouts that parity looks at."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from megalm.config.parallel import SCHEDULES, ParallelConfig, layout_name, parse_layout
from megalm.config.reader import read
from megalm.config.run import RunConfig

C = TypeVar("C", bound=RunConfig)


def with_layout(config: C, name: str) -> C:
    """A copy of the run laid out as `name` says; what the name leaves out is the default.

    Raises ValueError for a name that cannot be read.
    """
    values, copies = parse_layout(name)
    parallel, problems = read(ParallelConfig, values)
    faults = [f"{p.key} = {p.value}, allowed: {p.allowed}" for p in problems] + ["dp0"] * (copies < 1)
    if faults:
        raise ValueError(f"cannot use layout {name!r}: {'; '.join(faults)}")
    cluster = dataclasses.replace(config.cluster, num_processes=parallel.model_parallel * copies)
    return dataclasses.replace(config, parallel=parallel, cluster=cluster)


def layout_node(name: str) -> dict[str, Any]:
    """The layout as a config node. The world size is set only where the name says how many copies run (`dp2`)."""
    values, copies = parse_layout(name)
    node: dict[str, Any] = {"parallel": values}
    if "dp" in name:
        ranks = [values.get(axis, 1) for axis in ("tensor_parallel", "pipeline_parallel")]
        node["cluster"] = {"num_processes": math.prod([*ranks, copies])}
    return node


# --- all layouts ------------------------------------------------------------------------------------------------------

_ZERO = (
    {"zero": 0}, {"zero": 1}, {"zero": 2}, {"zero": 3}, {"zero": 2, "zero_reduce": "microbatch"},
    {"zero": 3, "zero_reduce": "microbatch"},
)  # fmt: skip
_CHUNKS = (1, 2, 4)


def candidate_layouts(max_ranks: int) -> list[str]:
    """Names of layouts of up to `max_ranks` ranks, most of them legal for some model; the rules decide (config/validate.py).

    Every size of an axis is a power of two. The full product of all axes has thousands of layouts that differ in nothing
    new, so three families stand for it:

    1. every grid tp x sp x pp x dp with 1f1b and zero=0;
    2. every grid with pp > 1 with every schedule and number of chunks, and every grid with dp > 1 with every ZeRO (that of
       one rank too), but not both on one grid;
    3. every schedule with every ZeRO, on pp2_dp2.
    """
    grids = [
        (tensor, sequence, pipeline, data)
        for tensor, pipeline, data in itertools.product(_powers(max_ranks), repeat=3)
        for sequence in (False, True)
        if 1 < tensor * pipeline * data <= max_ranks and not (sequence and tensor == 1)
    ]
    names = dict.fromkeys(_name(grid, {}, {}) for grid in grids)
    for grid in grids:
        names |= dict.fromkeys(_name(grid, schedule, {}) for schedule in _schedules() if grid[2] > 1)
        names |= dict.fromkeys(_name(grid, {}, zero) for zero in _ZERO if grid[3] > 1)
    both = itertools.product(_schedules(), _ZERO) if max_ranks >= 4 else ()
    names |= dict.fromkeys(_name((1, False, 2, 2), schedule, zero) for schedule, zero in both)
    names |= dict.fromkeys(f"zero{stage}" for stage in (1, 2, 3))
    return sorted(names, key=lambda name: (_ranks(name), list(names).index(name)))


def sample_layouts(legal: Sequence[str]) -> list[str]:
    """A few of the legal layouts that together show every value of every axis, each pair of axes, and every schedule.

    The layout that shows most that is new comes first; of equals the one with the fewest ranks, then the first.
    """
    wanted = {name: _traits(name) for name in legal}
    chosen, seen = list[str](), set[str]()
    while new := {name: traits - seen for name, traits in wanted.items() if traits - seen}:
        best = min(new, key=lambda name: (-len(new[name]) / _ranks(name), _ranks(name)))
        chosen.append(best)
        seen |= wanted[best]
    return [name for name in legal if name in chosen]


def _powers(limit: int) -> list[int]:
    return [2**n for n in range(limit.bit_length()) if 2**n <= limit]


def _schedules() -> Iterator[dict[str, Any]]:
    for schedule in SCHEDULES:
        if schedule != "csv":  # a file of the user's
            yield from ({"schedule": schedule, "chunks": chunks} for chunks in _CHUNKS)


def _name(grid: tuple[int, bool, int, int], schedule: dict[str, Any], zero: dict[str, Any]) -> str:
    tensor, sequence, pipeline, data = grid
    parallel = ParallelConfig(tensor, sequence, pipeline, **schedule, **zero)
    return layout_name(parallel, data)


def _ranks(name: str) -> int:
    values, data = parse_layout(name)
    return math.prod([values.get("tensor_parallel", 1), values.get("pipeline_parallel", 1), data])  # type: ignore[list-item]


def _traits(name: str) -> set[str]:
    """What a layout shows: the parts of its name, and which two axes it joins."""
    parts = name.split("_")
    axes = sorted({re.sub(r"\d", "", part) for part in parts} & {"tp", "sp", "pp", "dp", "zero"})
    with_ranks = [part for part in parts if part != "microbatch"] + ["_".join(parts[-2:])] * ("microbatch" in parts)
    return {*with_ranks, *("+".join(pair) for pair in itertools.combinations(axes, 2))}
