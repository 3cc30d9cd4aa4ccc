"""A layout's short name (`tp2_pp2_dp2_zero3`) applied to a run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

from megalm.config.parallel import ParallelConfig, parse_layout
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
