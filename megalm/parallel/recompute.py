"""Activations that are computed again in the backward instead of kept, block by block (Chen et al. 2016).

full        of a block only its input is kept; its whole forward runs again.
selective   what costs time is kept too: results of matrix products, of attention and of collectives. Norms, activation
            functions, rotary positions and dropout masks are computed again, which costs little and is most of the memory
            (Korthikanti et al. 2022, section 5; they let attention go, which today's kernels do not keep anyway).

Both are torch's non-reentrant checkpoint around the block's forward; no module is wrapped, so all names and hooks stay (but
hooks of modules inside a block run once more in the backward). Selective adds two dispatch modes below autograd: one keeps
results in the order of their calls, the other hands them out in that order while the block's forward runs again. Torch has
such modes of its own, which know nothing of collectives (they write into their arguments) and keep every chosen result;
these learn in a block's first backward which ones are read again. Not read are the last matrix product and the parts that
the ranks of a row-parallel layer sum: the sum is kept.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from megalm.parallel.topology import Group

_PRODUCTS = (
    "mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
)  # fmt: skip
PRODUCTS = frozenset(getattr(torch.ops.aten, name).default for name in _PRODUCTS)
_COPIES = frozenset((torch.ops.aten.clone.default, torch.ops.aten.stack.default, torch.ops.aten.cat.default))


def apply_recompute(model: nn.Module, mode: str, every: int, group: Group, early_stop: bool = True) -> None:
    """Recompute every n-th block of `model.layers`, by their numbers in the whole model.

    group: whose collectives selective keeps; those of others (ZeRO-3 gathers weights) run again.
    early_stop: a block's second forward ends where nothing is missing any more. ZeRO-3 cannot have that: it releases a
    module's weights when the module's forward returns.
    """
    if mode == "none":
        return
    blocks: Any = model.layers
    for name, block in blocks.items():
        if int(name) % every == 0:
            extra = {"context_fn": _Selection(group)} if mode == "selective" else {}
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, early_stop=early_stop, **extra
            )  # no random state: dropout's masks are a function of positions (models/dropout.py)


class _Selection:
    """One block's choice of results: which of those that cost time are read again."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.read: list[bool] | None = None  # by order of calls; None before the first backward

    def __call__(self) -> tuple[TorchDispatchMode, TorchDispatchMode]:
        """The modes of one forward and of its repetition."""
        results: list[Any] = []
        return _Keep(self, results), _Give(self, results)

    def wants(self, index: int) -> bool:
        return self.read is None or (index < len(self.read) and self.read[index])

    def is_collective(self, operation: Any, args: Any) -> bool:
        """Whether it is one of the group's. It writes into its first argument, and returns that and a work to wait for."""
        if operation.namespace != "c10d":
            return False
        handle = next(x for x in args if isinstance(x, torch.ScriptObject))
        return dist.ProcessGroup.unbox(handle) is self.group.handle


class _Keep(TorchDispatchMode):
    def __init__(self, selection: _Selection, results: list[Any]):
        super().__init__()
        self.selection, self.results = selection, results
        self.addresses: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation in PRODUCTS or self.selection.is_collective(operation, args):
            wanted = self.selection.wants(len(self.results))
            keep = Tensor.detach if wanted else _unread
            self.results.append(tree_map(lambda x: keep(x) if isinstance(x, Tensor) else x, result))
            self.addresses |= {_address(x) for x in tree_leaves(result)} if wanted else set()
        elif operation._schema.is_mutable:
            assert _address(args[0]) not in self.addresses, f"{operation} changes a result that is kept for the backward"
        return result


class _Give(TorchDispatchMode):
    def __init__(self, selection: _Selection, results: list[Any]):
        super().__init__()
        self.selection, self.results, self.next = selection, results, 0
        self.watch = _Watch() if selection.read is None else None

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        collective = self.selection.is_collective(operation, args)
        if not collective and operation not in PRODUCTS:
            result = operation(*args, **(kwargs or {}))
            if self.watch is not None:
                self.watch.see(operation, args, result)
            return result
        result, self.results[self.next] = self.results[self.next], None
        result = tree_map(lambda x: x() if isinstance(x, partial) else x, result)
        self.next += 1
        if collective:
            for target, value in zip(tree_leaves(args[0]), tree_leaves(result[0]), strict=True):
                target.copy_(value)
            result = args[0], result[1]
        if self.watch is not None:
            self.watch.see_kept(result, () if collective else args)
        return result

    def __exit__(self, *error: Any) -> Any:
        if self.watch is not None:
            self.selection.read = self.watch.read
        return super().__exit__(*error)


class _Watch:
    """Sees one repetition of a block's forward: which kept results are read by anything but a collective, which replaces them."""

    def __init__(self) -> None:
        self.read: list[bool] = []
        self._sources: dict[int, int] = {}  # storage -> the result that it is, or is a copy of
        self._alive: list[Tensor] = []  # or a later tensor could have the same address

    def see_kept(self, result: Any, args: Any) -> None:
        """The next kept result, and what it was computed from."""
        self._mark(args)
        self.read.append(False)
        for x in tree_leaves(result):
            self._follow(x, len(self.read) - 1)

    def see(self, operation: Any, args: Any, result: Any) -> None:
        """Anything else. Views and copies are the result still."""
        if any(_address(x) in self._sources for x in tree_leaves(result)):
            return
        sources = {self._sources[_address(x)] for x in tree_leaves(args) if _address(x) in self._sources}
        if operation in _COPIES and len(sources) == 1:
            self._follow(result, *sources)
        else:
            self._mark(args)

    def _mark(self, args: Any) -> None:
        for x in tree_leaves(args):
            if _address(x) in self._sources:
                self.read[self._sources[_address(x)]] = True

    def _follow(self, x: Any, source: int) -> None:
        if address := _address(x):
            self._sources[address] = source
            self._alive.append(x)


def _address(x: Any) -> int:
    """Where a tensor's storage is; 0 for what has none."""
    return x.untyped_storage().data_ptr() if isinstance(x, Tensor) else 0


def _unread(x: Tensor) -> Any:
    """What makes a tensor like x that nobody must read: it says so in every number that is computed from it."""
    return partial(torch.full, x.shape, torch.nan, dtype=x.dtype, device=x.device)
