"""A layout's short name (`tp2_pp2_dp2_zero3`) applied to a run, and the list of all layouts that parity looks at."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from megalm.config.model import ModelConfig
from megalm.config.parallel import CONTEXT_METHODS, ParallelConfig, layout_name, parse_layout
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
    cluster = dataclasses.replace(config.cluster, num_processes=parallel.ranks_per_sample * copies)
    return dataclasses.replace(config, parallel=parallel, cluster=cluster)


def with_model(config: C, architecture: str) -> C:
    """A copy of the run with another architecture; gpt ties its embeddings, as GPT-2 does. What follows is derived anew."""
    values = {f.name: getattr(config.model, f.name) for f in dataclasses.fields(ModelConfig)}
    values |= dict.fromkeys(config.model.derived, 0) | {"architecture": architecture, "tie_embeddings": architecture == "gpt"}
    return dataclasses.replace(config, model=ModelConfig(**values))


def layout_node(name: str) -> dict[str, Any]:
    """The layout as a config node. The world size is set only where the name says how many copies run (`dp2`)."""
    values, copies = parse_layout(name)
    node: dict[str, Any] = {"parallel": values}
    if "dp" in name:
        parallel, _ = read(ParallelConfig, values)
        node["cluster"] = {"num_processes": parallel.ranks_per_sample * copies}
    return node


# --- all layouts ------------------------------------------------------------------------------------------------------

_SCHEDULES: tuple[dict[str, Any], ...] = (
    {"schedule": "1f1b"}, {"schedule": "gpipe"}, {"schedule": "gpipe", "chunks": 2}, {"schedule": "interleaved", "chunks": 2},
    {"schedule": "interleaved", "chunks": 4}, {"schedule": "bfs", "chunks": 2}, {"schedule": "zbh1"},
    {"schedule": "zbv", "chunks": 2}, {"schedule": "dualpipev", "chunks": 2},
)  # fmt: skip
_ZERO: tuple[dict[str, Any], ...] = (
    {"zero": 0}, {"zero": 1}, {"zero": 2}, {"zero": 3}, {"zero": 2, "zero_reduce": "microbatch"},
    {"zero": 3, "zero_reduce": "microbatch"},
)  # fmt: skip
_SAMPLE_RANKS = 4  # an axis of a sample's layout is no longer
# What else a sample's layouts join: three axes, and what meets at the same place in the code.
_TOGETHER = (
    {"tp", "pp", "dp"}, {"cp", "dp", "zero1"}, {"cp", "dp", "zero3"}, {"ep", "zero1"}, {"ep", "zero3"}, {"ep", "pp", "zero"},
    {"tp", "ulysses"},
)  # fmt: skip


def candidate_layouts(max_ranks: int) -> list[str]:
    """Names of layouts of up to `max_ranks` ranks, few first; the rules decide which are legal (config/validate.py).

    Sizes are powers of two. The full product of all axes has thousands of layouts that join nothing new, so these stand
    for it:

    1. every grid tp x sp x pp x dp, with 1f1b and without ZeRO;
    2. every grid with stages, with every schedule; every grid with copies, with every ZeRO. Where the tensors are split,
       sequence parallelism is on, which adds to what is exchanged and takes nothing away;
    3. every schedule with every ZeRO, on pp2_dp2;
    4. ZeRO on one rank;
    5. those of `_shared_samples`, where ranks share a sample or the experts.
    """
    sizes = [2**n for n in range(max_ranks.bit_length())]
    grids = [grid for grid in itertools.product(sizes, repeat=3) if 1 < math.prod(grid) <= max_ranks]
    names = [_name(tensor, sequence, *rest) for tensor, *rest in grids for sequence in {False, tensor > 1}]
    for tensor, pipeline, data in grids:
        grid = tensor, tensor > 1, pipeline, data
        names += [_name(*grid, **schedule) for schedule in _SCHEDULES if pipeline > 1]
        names += [_name(*grid, **zero) for zero in _ZERO if data > 1]
    if max_ranks >= 4:
        names += [_name(1, False, 2, 2, **both[0], **both[1]) for both in itertools.product(_SCHEDULES, _ZERO)]
    names += ["zero1", "zero2", "zero3", *_shared_samples(sizes, max_ranks)]
    return sorted(dict.fromkeys(names), key=_ranks)


def _shared_samples(sizes: list[int], max_ranks: int) -> Iterator[str]:
    """Context and expert parallel layouts.

    1. every grid tp x cp x pp x dp, with both methods of context parallelism and with every size of expert parallelism;
    2. all of them with ZeRO-1; without stages and split tensors either kind with every ZeRO;
    3. either kind on two stages, with every schedule.
    """
    for tensor, context, pipeline, data, experts in itertools.product(sizes, repeat=5):
        shared: dict[str, Any] = {"context_parallel": context, "expert_parallel": experts}
        if tensor * context * pipeline * data > max_ranks or experts > context * data or context * experts == 1:
            continue
        one_kind = 1 in (context, experts)
        more = [{"context_method": method} for method in (CONTEXT_METHODS if context > 1 else CONTEXT_METHODS[:1])]
        more += _ZERO if one_kind and tensor * pipeline == 1 else _ZERO[1:2]
        more += _SCHEDULES if one_kind and pipeline == 2 and tensor * context * data == 2 else ()
        yield from (_name(tensor, tensor > 1, pipeline, data, **(shared | changes)) for changes in more)


def sample_layouts(legal: Sequence[str]) -> list[str]:
    """A few of the legal layouts that together show every value of every axis, every pair of axes, and every schedule.

    They are chosen one by one: the one that shows most that is new per rank, of equals the smallest, then the first. Then
    those go that show nothing that another of the chosen does not.
    """
    traits = {name: _traits(name) for name in legal if _ranks(name) > 1}
    chosen, seen = list[str](), set[str]()
    while new := {name: len(shown - seen) for name, shown in traits.items() if shown - seen}:
        best = min(new, key=lambda name: (-new[name] / _ranks(name), _ranks(name)))
        chosen.append(best)
        seen |= traits[best]
    for name in list(chosen):
        others = set[str]().union(*(traits[other] for other in chosen if other != name))
        if traits[name] <= others:
            chosen.remove(name)
    return [name for name in legal if name in chosen]


def _name(tensor: int, sequence: bool, pipeline: int, data: int, **more: Any) -> str:
    return layout_name(ParallelConfig(tensor, sequence, pipeline_parallel=pipeline, **more), data)


def _ranks(name: str) -> int:
    values, data = parse_layout(name)
    parallel, _ = read(ParallelConfig, values)
    return parallel.ranks_per_sample * data


def _traits(name: str) -> set[str]:
    """What a layout shows: its sizes, schedule and ZeRO, and which axes it joins."""
    values, data = parse_layout(name)
    parallel, _ = read(ParallelConfig, values)
    sizes = {
        "tp": parallel.tensor_parallel, "cp": parallel.context_parallel, "pp": parallel.pipeline_parallel, "dp": data,
        "ep": parallel.expert_parallel, "zero": parallel.zero,
    }  # fmt: skip
    axes = [axis for axis, size in sizes.items() if size > (axis != "zero")] + ["sp"] * parallel.sequence_parallel
    shown = {f"{axis}{size}" for axis, size in sizes.items() if axis in axes and size <= _SAMPLE_RANKS}
    shown |= {"+".join(pair) for pair in itertools.combinations(axes, 2)}
    also = {f"zero{parallel.zero}"} | ({parallel.context_method} if parallel.context_parallel > 1 else set())
    shown |= {"+".join(sorted(group)) for group in _TOGETHER if group <= {*axes, *also}} | also
    return {*shown, f"{parallel.schedule} x {parallel.chunks}", f"zero{parallel.zero} {parallel.zero_reduce}"}
