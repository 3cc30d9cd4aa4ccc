"""The memory meter: every tensor's memory in one step on a CPU, from the operator that makes it until nobody holds it.

A GPU's allocator knows its own peak. A CPU's resident memory says little: the C library keeps what was freed and gives
pages only when they are touched. So the meter counts what a step asks for, to the byte: it stands in front of all operators
as a dispatch mode, as the ledger does, notes each new storage, and a weak reference tells when it goes. Nothing is summed
while the step runs: the list of what came and went gives the peak and, at no more cost, what was alive at it.

What it does not see: memory that an operator takes and gives back inside itself, and that of libraries (gloo's buffers).
It costs some microseconds per operator, so it is there for single steps.
"""

from __future__ import annotations

import gc
import itertools
import warnings
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OURS = DispatchKey.CompositeExplicitAutograd  # where torch.library puts an operator of ours
BEFORE = "from before"  # in place of an operator: what was there when the meter started


class Made(NamedTuple):
    """A storage: which operator made it, for what."""

    operator: str
    in_backward: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    size: int  # bytes

    @property
    def what(self) -> str:
        """For people."""
        where = " in the backward" if self.in_backward else ""
        return f"{self.operator}{where} {tuple(self.shape)} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Alive:
    """Storages of one kind that were there at the peak."""

    what: str
    count: int
    size: int  # bytes of all of them


class MemoryMeter(TorchDispatchMode):
    """`meter.start()`, a step, `meter.stop()`; then `meter.peak` is known, and `meter.alive()` says what it consists of.

    Storages that exist already are found through Python's garbage collector, so views that C++ alone holds are found when an
    operator first uses them.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.device_type = (device or torch.device("cpu")).type
        self.made: list[Made] = []
        self._events_before = 0
        self._events: list[int] = []  # i + 1: made[i] came; -(i + 1): it went
        self._known: dict[int, Any] = {}  # address of a live storage -> weak reference, which tells of its end

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would wrap the method below for its compiler, and import that in the middle of the step that is measured."""
        return False

    def start(self) -> None:
        """From here on; first what is there is looked for."""
        for tensor in _tensors():
            self._see(tensor, BEFORE)
        self._events_before = len(self._events)
        self.__enter__()

    def stop(self) -> None:
        self.__exit__(None, None, None)
        self._known.clear()  # no reference, no callback: what goes from here on is nobody's business

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for x in args:  # made where no mode looks: by another thread, or before
            if isinstance(x, Tensor):
                self._see(x, BEFORE)
        if func.namespace == "megalm" and func.has_kernel_for_dispatch_key(_OURS):
            with self:  # our own operators are made of torch's, which are seen one by one
                result = func._op_dk(_OURS, *args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._see(x, func.overloadpacket.__name__)
        return result

    def _see(self, tensor: Tensor, operator: str) -> None:
        if tensor.device.type != self.device_type or isinstance(tensor, FakeTensor):  # which torch.compile leaves behind
            return
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse, or a subclass with tensors inside
            return
        address, index = storage._cdata, len(self.made)
        size = storage.nbytes()
        if address in self._known or not size:
            return
        backward = operator != BEFORE and torch._C._current_graph_task_id() != -1
        self.made.append(Made(operator, backward, tuple(tensor.shape), tensor.dtype, size))

        def gone(_: Any) -> None:
            self._known.pop(address, None)
            self._events.append(-index - 1)

        self._known[address] = weakref.ref(storage, gone)
        self._events.append(index + 1)

    @property
    def before(self) -> int:
        """Bytes that were there when it started."""
        return sum(self.made[event - 1].size for event in self._events[: self._events_before])

    @property
    def now(self) -> int:
        """Bytes that are there at this moment, or were when it stopped."""
        return sum(map(self._change, self._events))

    @property
    def peak(self) -> int:
        """The most bytes there at once."""
        return max(itertools.accumulate(map(self._change, self._events)), default=0)

    def _change(self, event: int) -> int:
        return self.made[event - 1].size if event > 0 else -self.made[-event - 1].size

    def alive(self) -> list[Alive]:
        """What the peak consists of, the largest first."""
        levels = list(itertools.accumulate(map(self._change, self._events)))
        end = levels.index(max(levels)) + 1 if levels else 0
        there = set[int]()
        for event in self._events[:end]:
            there.add(event) if event > 0 else there.discard(-event)
        counts, sizes = Counter[str](), Counter[str]()
        for event in there:
            counts[self.made[event - 1].what] += 1
            sizes[self.made[event - 1].what] += self.made[event - 1].size
        return [Alive(what, counts[what], size) for what, size in sizes.most_common()]


def _tensors() -> list[Tensor]:
    """All that Python knows of, with their gradients."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at some objects warns
        for item in gc.get_objects():
            if issubclass(type(item), Tensor):
                found.append(item)
                if item.is_leaf and item.grad is not None:
                    found.append(item.grad)
    return found
