"""Activations that wait elsewhere between forward and backward: in host memory (of a GPU) or in a file.

Each block's forward runs under `saved_tensors_hooks`, which see what autograd keeps for the backward. What is large goes on
the block's `Shelf`, once for each storage, however many views of it are kept. Parameters stay where they are: of them only the
place is kept, so that ZeRO-3 may release them. What a block shares with the others (its arguments behind the first) stays too.

    forward     block n begins     what block n - 1 kept is sent away, beside the computing;
                                   what block n - 2 kept is certainly stored, and gone from here
    backward    block n begins     what it needs is fetched, unless it is here still,
                                   and then what block n - 1 will need, beside the computing

So two blocks' activations are here at any time. The last block's stay if its backward is the next thing to run.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from megalm.config.train import SMALLEST_OFFLOADED
from megalm.parallel.offload_stores import Away, DiskStore, HostStore, Store


class Saved:
    """The bytes of one storage: here, away, or both."""

    def __init__(self, storage: torch.UntypedStorage):
        self.data: Tensor | None = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        self.away: Away | None = None
        self.fetching = False

    def send(self, store: Store) -> None:
        """Begin to store it."""
        if self.data is not None and self.away is None:
            self.away = store.put(self.data)

    def drop(self) -> None:
        """Wait until it is stored; then it is no longer here. Raises RunError if it cannot be stored."""
        if self.away is not None:
            self.away.settle()
            self.data = None

    def fetch(self) -> None:
        """Begin to bring it back, unless it is here."""
        if self.data is None and self.away is not None and not self.fetching:
            self.fetching = True
            self.away.fetch()

    def take(self) -> Tensor:
        """The bytes, here. Raises RunError if they cannot be read."""
        self.fetch()
        if self.data is None:
            assert self.away is not None, "what is not here is away"
            self.data = self.away.take()
        return self.data


class Shelf:
    """What one block keeps of one forward. It holds no tensor itself: autograd's handles do, and let go one by one."""

    def __init__(self, previous: Shelf | None):
        self.previous = previous  # of the block before, whose backward comes next
        self.items: list[weakref.ref[Saved]] = []
        self.by_storage: dict[tuple[int, int], weakref.ref[Saved]] = {}  # (address, version), while the forward runs
        self.begun = False

    def each(self, act: Callable[[Saved], None], backwards: bool = False) -> None:
        """On everything that is still wanted."""
        for item in reversed(self.items) if backwards else self.items:
            if (saved := item()) is not None:
                act(saved)

    def begin_backward(self) -> None:
        """Fetch this block's activations, then the next one's. What was kept last is needed first."""
        if not self.begun:
            self.begun = True
            self.each(Saved.fetch, backwards=True)
            if self.previous is not None:
                self.previous.each(Saved.fetch, backwards=True)


class Handle(NamedTuple):
    """A saved tensor: a view of bytes on a shelf."""

    saved: Saved
    shelf: Shelf
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


class OfParameter(NamedTuple):
    """A saved tensor that is a parameter, or a view of one."""

    parameter: nn.Parameter
    offset: int  # behind the parameter's own
    size: torch.Size
    stride: tuple[int, ...]


class Offload:
    """Sends away what the blocks of one chunk keep, and brings it back."""

    def __init__(self, store: Store, smallest: int | None = None):
        self.store, self.smallest = store, SMALLEST_OFFLOADED if smallest is None else smallest
        self.recent: deque[Shelf] = deque()  # of the last blocks that ran forward, two at the most
        self.shelf: Shelf | None = None  # of the block that runs forward
        self.parameters: list[nn.Parameter] = []  # of that block
        self.shared: set[int] = set()  # addresses of what it was given besides its input

    def run(self, block: nn.Module, forward: Callable[..., Any], is_first: bool, *args: Any, **kwargs: Any) -> Any:
        """The block's forward. is_first: of the chunk, so that a microbatch begins."""
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if len(self.recent) == 2:
            self.recent.popleft().each(Saved.drop)
        for last in self.recent:
            last.each(lambda saved: saved.send(self.store))
        self.shelf = Shelf(None if is_first else self.recent[-1])
        self.recent.append(self.shelf)
        self.parameters = list(block.parameters())
        self.shared = {address_of(x) for x in tree_leaves((args[1:], kwargs)) if isinstance(x, Tensor)}
        try:
            with saved_tensors_hooks(self.pack, self.unpack):
                return forward(*args, **kwargs)
        finally:
            self.shelf.by_storage.clear()
            self.shelf = None

    def pack(self, x: Tensor) -> Any:
        """What autograd is to keep in place of x."""
        assert self.shelf is not None, "only while a block runs forward"
        if x.layout != torch.strided:
            return x
        address, nbytes = address_of(x), x.untyped_storage().nbytes()
        for parameter in self.parameters:
            if address == address_of(parameter) and nbytes:
                return OfParameter(parameter, int(x.storage_offset() - parameter.storage_offset()), x.size(), x.stride())
        if nbytes < max(self.smallest, 1) or address in self.shared:
            return x
        key = address, x._version  # the address is this storage's alone: the shelf's things are here until the block ends
        known = self.shelf.by_storage.get(key)
        saved = known() if known is not None else None
        if saved is None:
            saved = Saved(x.untyped_storage())
            self.shelf.by_storage[key] = weakref.ref(saved)
            self.shelf.items.append(weakref.ref(saved))
        return Handle(saved, self.shelf, x.dtype, int(x.storage_offset()), x.size(), x.stride())

    def unpack(self, kept: Any) -> Tensor:
        """The tensor that `pack` was given."""
        if isinstance(kept, OfParameter):
            parameter = kept.parameter.detach()
            return parameter.as_strided(kept.size, kept.stride, parameter.storage_offset() + kept.offset)
        if isinstance(kept, Tensor):
            return kept
        kept.shelf.begin_backward()
        data = kept.saved.take()
        view = torch.empty(0, dtype=kept.dtype, device=data.device)
        return view.set_(data.untyped_storage(), kept.offset, kept.size, kept.stride)


def build_offload(where: str, folder: Path, device: torch.device) -> Offload | None:
    """where: none, cpu or disk (in `folder`). Raises RunError if the folder cannot be written."""
    if where == "disk":
        return Offload(DiskStore(folder, device))
    return Offload(HostStore(device)) if where == "cpu" else None


def apply_offload(model: nn.Module, offload: Offload | None) -> None:
    """Let every block of `model.layers` run under it. After `apply_recompute`: then what recomputation keeps is sent away."""
    if offload is None:
        return
    blocks: Any = model.layers
    for place, block in enumerate(blocks.values()):
        block.forward = partial(offload.run, block, block.forward, place == 0)


def address_of(x: Any) -> int:
    """Where a tensor's storage is; 0 for what has none."""
    return x.untyped_storage().data_ptr() if isinstance(x, Tensor) else 0
