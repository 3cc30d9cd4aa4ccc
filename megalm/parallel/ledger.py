"""The communication ledger: calls and bytes of every collective that really runs, by group and operation.

Whatever a collective is called through (our own functions, an autograd backward, `batch_isend_irecv`, DeepSpeed), it
ends in one operator of torch's `c10d` library, with its process group as an argument. The ledger stands in front of these
operators as a dispatch mode; autograd hands the mode on to the threads of its backward. So nothing can be forgotten, and
nothing has to be wrapped. It costs some microseconds per operator of any kind, so it is there for single steps.

The convention: `bytes` of a call are the bytes of the largest buffer that this rank hands in or gets back, so those of the
whole tensor in all-reduce, all-gather and reduce-scatter. What crosses the wire is `wire_bytes` of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megalm.parallel.topology import Group, Topology
from megalm.parallel.volume import Volume, add_up
from megalm.parallel.volume_parts import Call

OPERATIONS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "gather_": "gather",
    "scatter_": "scatter",
    "send": "send",
    "recv_": "recv",
    "recv_any_source_": "recv",
    "barrier": "barrier",
    "monitored_barrier_": "barrier",
}
# Of groups that are one where an axis is not used, the last gives the name: data.
AXES = ("tensor", "context", "batch", "expert_data", "data", "pipeline", "model", "embedding", "expert")


class Ledger(TorchDispatchMode):
    """`with Ledger(topology) as ledger: ...`, then `ledger.volume()`. Keep it to one thread's scope: modes nest like calls."""

    def __init__(self, topology: Topology):
        super().__init__()
        groups: dict[str, Group] = {axis: getattr(topology, axis) for axis in AXES}
        self.names = {g.handle.group_name: axis for axis, g in groups.items() if g.handle is not None}
        self.names[dist.group.WORLD.group_name] = "world"  # type: ignore[union-attr]
        self.calls: list[Call] = []  # in their order

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            self._note(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _note(self, operator: str, args: tuple) -> None:
        place = next((i for i, arg in enumerate(args) if isinstance(arg, torch.ScriptObject)), None)
        if place is None:
            return  # an operator on a tensor alone
        group = dist.ProcessGroup.unbox(args[place])
        operation = OPERATIONS.get(operator, operator)
        size = 0 if operation == "barrier" else max(map(_bytes, args[:place]))  # a barrier's tensor only names a device
        if group.size() > 1:  # DeepSpeed calls collectives of a single rank too: they send nothing
            self.calls.append(Call(self._name(group), operation, 1, size))

    def _name(self, group: dist.ProcessGroup) -> str:
        """The axis; a group that the topology did not make is called by its ranks."""
        ranks = dist.get_process_group_ranks(group)
        return self.names.get(group.group_name) or f"ranks {','.join(map(str, ranks))}"

    def volume(self) -> Volume:
        """The calls so far, summed by (group, operation)."""
        return add_up(self.calls)


def _bytes(argument: Any) -> int:
    """Bytes of a tensor, or of a list (of lists) of tensors."""
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_bytes, argument))
