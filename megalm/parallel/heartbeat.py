"""In a rank: signs of life around every collective and step, and its stacks on request. Does nothing without an agent.

The collectives of torch.distributed are wrapped where they live, so that nothing that calls them by name is left out: our own
code, torch's functions for objects, and DeepSpeed, which looks them up when it starts. `isend` and `irecv` are not: torch
compares those two by identity in `batch_isend_irecv`, which is wrapped instead.
"""

from __future__ import annotations

import faulthandler
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from megalm.parallel.heartbeat_file import BUSY, HeartbeatFile
from megalm.parallel.rendezvous import spans
from megalm.parallel.topology import Group, Topology

WRAPPED = (
    "all_reduce", "all_reduce_coalesced", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "all_gather_single",
    "all_gather_coalesced", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single", "all_to_all", "all_to_all_single",
    "gather", "scatter", "barrier", "monitored_barrier", "send", "recv", "batch_isend_irecv",
)  # fmt: skip
# Of groups that are one where an axis is not used, the first gives the name.
_AXES = ("tensor", "context", "batch", "data", "pipeline", "model", "embedding", "expert", "expert_data")


class Heartbeat:
    """The rank's own; at most one in a process (see `start_heartbeat`)."""

    def __init__(self, path: Path):
        self.file = HeartbeatFile(path)
        self.phase, self.step, self.longest, self.steps = "start", 0, 0.0, 0
        self.since = time.monotonic()
        self.rows: dict[Any, int] = {}  # process group -> its row; None: the default one

    def name_groups(self, topology: Topology) -> None:
        """Give the rows of the topology's groups their names, before they are used."""
        for axis in _AXES:
            group: Group = getattr(topology, axis)
            if group.handle is not None and group.handle not in self.rows:
                self.rows[group.handle] = self.file.add_group(f"{axis} {spans(group.ranks)}")

    def row(self, group: Any) -> int:
        """The row of a group, which may be new."""
        if group not in self.rows:
            if group is not None and group is dist.group.WORLD:
                self.rows[group] = self.row(None)
            else:
                name = "world" if group is None else f"ranks {spans(dist.get_process_group_ranks(group))}"
                self.rows[group] = self.file.add_group(name)
        return self.rows[group]

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A collective that stamps before and after."""
        name, rows, file = function.__name__.encode()[:24], self.rows, self.file
        in_batch = function.__name__ == "batch_isend_irecv"

        @functools.wraps(function)
        def stamped(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group")
            if group is None:
                group = args[0][0].group if in_batch else next((arg for arg in args if isinstance(arg, dist.ProcessGroup)), None)
            row = rows.get(group)
            file.enter(self.row(group) if row is None else row, name)
            try:
                return function(*args, **kwargs)
            finally:
                file.leave()

        return stamped

    def say(self, phase: str, step: int) -> None:
        self.phase, self.step = phase, step
        self.file.say(phase, step, self.longest)

    def end_step(self, step: int) -> None:
        """A step and what belongs to it (evaluation, checkpoint) is over. The first takes longer than all others: it compiles."""
        now = time.monotonic()
        self.longest = now - self.since if self.steps <= 1 else max(self.longest, now - self.since)
        self.since = now
        self.steps += 1
        self.say("train", step)


_heartbeat: Heartbeat | None = None


def start_heartbeat() -> None:
    """Begin, if an agent wants to hear it: stamp collectives. In a job also without one: write stacks when SIGUSR2 asks."""
    global _heartbeat
    path, folder = os.environ.get("MEGALM_HEARTBEAT"), os.environ.get("MEGALM_LAUNCHER")
    if folder and "RANK" in os.environ:
        stacks = open(stacks_path(Path(folder), int(os.environ["RANK"])), "a")  # noqa: SIM115  open for as long as the process
        faulthandler.register(signal.SIGUSR2, stacks, all_threads=True, chain=False)
    if not path or _heartbeat is not None:
        return
    _heartbeat = Heartbeat(Path(path))
    for name in WRAPPED:
        function = getattr(distributed_c10d, name, None)
        if function is not None:
            stamped = _heartbeat.wrap(function)
            if getattr(dist, name, None) is function:
                setattr(dist, name, stamped)
            setattr(distributed_c10d, name, stamped)


def stacks_path(folder: Path, rank: int) -> Path:
    """Where a rank's stacks go."""
    return folder / f"stacks-rank-{rank}.txt"


def name_groups(topology: Topology) -> None:
    """See Heartbeat."""
    if _heartbeat is not None:
        _heartbeat.name_groups(topology)


def say(phase: str, step: int) -> None:
    """Tell the agent where this rank is."""
    if _heartbeat is not None:
        _heartbeat.say(phase, step)


def end_step(step: int) -> None:
    """See Heartbeat."""
    if _heartbeat is not None:
        _heartbeat.end_step(step)


@contextmanager
def during(phase: str) -> Iterator[None]:
    """Around what may take longer than a step: the agent, or without one whoever watches the log folder, is more patient then."""
    if _heartbeat is None:
        with _busy():
            yield
        return
    before = _heartbeat.phase
    _heartbeat.say(phase, _heartbeat.step)
    try:
        yield
    finally:
        _heartbeat.say(before, _heartbeat.step)


@contextmanager
def _busy() -> Iterator[None]:
    """See BUSY."""
    folder = os.environ.get("MEGALM_LAUNCHER") if os.environ.get("RANK") == "0" else None
    try:
        if folder:
            with suppress(OSError):
                Path(folder, BUSY).touch()
        yield
    finally:
        if folder:
            with suppress(OSError):
                Path(folder, BUSY).unlink()
