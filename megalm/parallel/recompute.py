"""Activations that are computed again in the backward instead of kept, block by block (Chen et al. 2016).

full        of a block only its input is kept; its whole forward runs again.
selective   what costs time is kept too: results of matrix products, of attention and of collectives. Norms, activation
            functions, rotary positions and dropout masks are computed again, which costs little and is most of the memory
            (Korthikanti et al. 2022, section 5; they let attention go, which today's kernels do not keep anyway).
modules     of each part of a block that is named only the input is kept; the rest of the block does not run again. A linear
            layer keeps its input, so of a norm this saves what it keeps itself, not its output.

All are torch's non-reentrant checkpoint around a forward; no module is wrapped, so all names and hooks stay (but hooks of
modules inside run once more in the backward). Selective adds two dispatch modes below autograd: one keeps results in the order
of their calls, the other hands them out in that order while the block's forward runs again. Torch has such modes of its own,
which know nothing of collectives (they write into their arguments) and keep every chosen result; these learn in a block's
first backward which ones are read again. Not read are the last matrix product and the parts that the ranks of a row-parallel
layer sum: the sum is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C import _distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from megalm.parallel.offload import Offload, address_of
from megalm.parallel.topology import Group
from megalm_kernels.attention.operators import attention_forward_op
from megalm_kernels.grouped_linear import grouped_linear_op

_ATTENTIONS = (
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention", "bmm", "baddbmm",
)  # fmt: skip
# Once per document, per part of a ring: how often differs from one microbatch to the next, and all are read again.
ATTENTIONS = frozenset((*(getattr(torch.ops.aten, name).default for name in _ATTENTIONS), attention_forward_op._opoverload))
PRODUCTS = ATTENTIONS | {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, grouped_linear_op._opoverload}
_COPIES = frozenset((torch.ops.aten.clone.default, torch.ops.aten.stack.default, torch.ops.aten.cat.default))


_PARTS = {"attention": ("attention",), "mlp": ("mlp",), "norms": ("attention_norm", "mlp_norm")}


def apply_recompute(
    model: nn.Module, mode: str, every: int, group: Group, parts: Sequence[str] = (), offload: Offload | None = None
) -> None:
    """Recompute every n-th block of `model.layers`, by their numbers in the whole model.

    group: whose collectives selective keeps; those of others (ZeRO-3 gathers weights) run again. A block's second forward
    stops where nothing is missing any more: inside the layer whose backward asked for it, so ZeRO-3, which releases a
    layer's weights when its forward returns, leaves that one's for the backward. parts: what `modules` recomputes.
    offload: where selective's kept results wait.
    """
    if mode == "none":
        return
    blocks: Any = model.layers
    for name, block in blocks.items():
        if int(name) % every == 0:
            repeated = [getattr(block, part) for name in parts for part in _PARTS[name]] if mode == "modules" else [block]
            for module in repeated:
                # Without random state: dropout's masks are a function of seed and place (models/dropout.py).
                again = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
                module.forward = partial(again, context_fn=_Selection(group, offload)) if mode == "selective" else again


_Name = tuple[Any, int]
"""A result: the n-th of an operation in a block's forward."""


class _Selection:
    """One block's choice of results: which of those that cost time are read again."""

    def __init__(self, group: Group, offload: Offload | None) -> None:
        self.group, self.offload = group, offload
        self.read: dict[_Name, bool] | None = None  # None before the first backward

    def __call__(self) -> tuple[TorchDispatchMode, TorchDispatchMode]:
        """The modes of one forward and of its repetition."""
        results: list[Any] = []
        return _Keep(self, results), _Give(self, results)

    def wants(self, name: _Name) -> bool:
        return self.read is None or name[0] in ATTENTIONS or self.read.get(name, False)

    def keep(self, wanted: bool, x: Any) -> Any:
        """What to keep of x. Of an unwanted tensor: what makes one like it, which marks every number computed from it."""
        if not isinstance(x, Tensor):
            return x
        if not wanted:
            return partial(torch.full, x.shape, torch.nan, dtype=x.dtype, device=x.device)
        if self.offload is None or self.offload.shelf is None:
            return x.detach()
        return partial(self.offload.unpack, self.offload.pack(x.detach()))

    def is_collective(self, operation: Any, args: Any) -> bool:
        """Whether it is one of the group's: it writes into its first argument, and returns that and a work to wait for."""
        if operation.namespace != "c10d":
            return False
        handle = next(x for x in args if isinstance(x, torch.ScriptObject))
        return dist.ProcessGroup.unbox(handle) is self.group.handle


class _Keep(TorchDispatchMode):
    def __init__(self, selection: _Selection, results: list[Any]):
        super().__init__()
        self.selection, self.results = selection, results
        self.products: set[int] = set()  # where those that are kept lie
        self.calls = Counter[Any]()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        collective = self.selection.is_collective(operation, args)
        if collective or operation in PRODUCTS:
            wanted = self.selection.wants((operation, self.calls[operation]))
            self.calls[operation] += 1
            kept = args[0] if collective else result
            self.results.append(tree_map(partial(self.selection.keep, wanted), kept))
            if wanted and not collective:
                self.products |= {address_of(x) for x in tree_leaves(result)} - {0}  # 0: no rows, no memory
        elif operation._schema.is_mutable:
            assert address_of(args[0]) not in self.products, f"{operation} changes a result that is kept for the backward"
        return result


class _Give(TorchDispatchMode):
    def __init__(self, selection: _Selection, results: list[Any]):
        super().__init__()
        self.selection, self.results, self.next = selection, results, 0
        self.calls = Counter[Any]()
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
            for target, value in zip(tree_leaves(args[0]), tree_leaves(result), strict=True):
                target.copy_(value)
            result = args[0], _finished_work()
        if self.watch is not None:
            self.watch.see_kept((operation, self.calls[operation]), result, () if collective else args)
        self.calls[operation] += 1
        return result

    def __exit__(self, *error: Any) -> Any:
        if self.watch is not None:
            self.selection.read = self.watch.read
        return super().__exit__(*error)


class _Watch:
    """Sees one repetition of a block's forward: which kept results are read by anything but a collective, which replaces them."""

    def __init__(self) -> None:
        self.read: dict[_Name, bool] = {}
        self._sources: dict[int, _Name] = {}  # storage -> the result that it is, or is a copy of
        self._alive: list[Tensor] = []  # or a later tensor could have the same address

    def see_kept(self, name: _Name, result: Any, args: Any) -> None:
        """A kept result, and what it was computed from."""
        self._mark(args)
        self.read[name] = False
        for x in tree_leaves(result):
            self._follow(x, name)

    def see(self, operation: Any, args: Any, result: Any) -> None:
        """Anything else. Views and copies are the result still."""
        if any(address_of(x) in self._sources for x in tree_leaves(result)):
            return
        sources = {self._sources[address_of(x)] for x in tree_leaves(args) if address_of(x) in self._sources}
        if operation in _COPIES and len(sources) == 1:
            self._follow(result, *sources)
        else:
            self._mark(args)

    def _mark(self, args: Any) -> None:
        for x in tree_leaves(args):
            if address_of(x) in self._sources:
                self.read[self._sources[address_of(x)]] = True

    def _follow(self, x: Any, source: _Name) -> None:
        if address := address_of(x):
            self._sources[address] = source
            self._alive.append(x)


def _finished_work() -> Any:
    """Not the collective's own work: that one holds on to its inputs, and gloo's writes its output again when waited for."""
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(None)
    return _distributed_c10d._create_work_from_future(future).boxed()  # type: ignore[attr-defined]
