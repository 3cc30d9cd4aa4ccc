"""Executes the functions of device/attention_hopper.py in Python, as they are written, with a clock that is as bad as can be.

What it models. The partitions of gl.warp_specialize are actors, of which one at a time does its next step; which one, the
caller's `choose` says, each time. A TMA copy is an actor too: from when it is issued until it is chosen its buffer holds NaN.
mbarriers have a count of completed phases, arrivals and bytes that are still to come; a wait sees only the parity of the count,
as on a GPU. A product that was issued reads its buffers until it is waited for; a copy into them meanwhile is a fault, and so is
a product that reads a buffer into which a copy is going on. Warps of one group are one actor: that all four have arrived
before a group says `empty` is what Triton's arrive does, with a bar.sync before it.
What it does not: layouts, swizzles, registers, the order of memory proxies (fences do nothing here).

`run` computes; `traces` gives the steps of each actor, and `explore` tries every order of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.runtime import JITFunction

from megalm_kernels.device import attention_hopper
from megalm_kernels.launch import Launch

Choose = Callable[[int], int]  # of so many the one that goes on


class Fault(AssertionError):
    """What a GPU would have done wrong, or not have ended."""


class Barrier:
    def __init__(self, name: str):
        self.name, self.count, self.phases, self.arrivals, self.bytes = name, 0, 0, 0, 0

    def arrive(self, arrivals: int, expected: int = 0) -> None:
        self.arrivals -= arrivals
        self.bytes += expected
        if self.arrivals < 0:
            raise Fault(f"{self.name}: one arrival too many")
        if self.arrivals == 0 and self.bytes == 0:
            self.phases, self.arrivals = self.phases + 1, self.count

    def passes(self, parity: int) -> bool:
        return self.phases % 2 != parity


class Buffer:
    """Of shared memory. readers: products that have been issued and not waited for."""

    def __init__(self, name: str, shape: Sequence[int], dtype: torch.dtype):
        self.name, self.x, self.dtype = name, torch.full(tuple(shape), torch.nan, dtype=dtype), dtype
        self.tile, self.busy, self.readers, self.turned = "", False, 0, False

    def permute(self, order: tuple[int, int]) -> SimpleNamespace:
        assert order == (1, 0)
        return SimpleNamespace(buffer=self)

    def store(self, x: torch.Tensor) -> None:
        pause(("write", self.name))
        if self.busy or self.readers:
            raise Fault(f"{self.name} is overwritten while it is in use")
        self.x = x.clone()


class Array:
    """What allocate_shared_memory gives."""

    def __init__(self, items: list, shape: Sequence[int], dtype: torch.dtype):
        self.items, self.type, self.dtype = items, SimpleNamespace(shape=list(shape)), dtype

    def index(self, i: int) -> Any:
        return self.items[i]


class Actor(threading.Thread):
    def __init__(self, name: str, work: Callable[[], None]):
        super().__init__(name=name, daemon=True)
        self.work, self.go, self.paused = work, threading.Semaphore(0), threading.Semaphore(0)
        self.step: tuple = ("begin",)
        self.steps: list[tuple] = []
        self.ready: Callable[[], bool] = lambda: True
        self.error: BaseException | None = None
        self.cancelled, self.products = False, []

    def run(self) -> None:
        self.go.acquire()
        try:
            if not self.cancelled:
                self.work()
        except BaseException as error:  # handed to the one who schedules
            self.error = error
        self.step = ("end",)
        self.paused.release()


def pause(step: tuple, ready: Callable[[], bool] = lambda: True) -> None:
    """Let others go before this step of the actor that calls; on the way to it nothing of it has been done."""
    actor = threading.current_thread()
    if not isinstance(actor, Actor):
        return
    actor.step, actor.ready = step, ready
    actor.paused.release()
    actor.go.acquire()
    if actor.cancelled:
        raise SystemExit
    actor.steps.append(step)


class Machine:
    """One program of the grid."""

    def __init__(self, program: int, choose: Choose, edit: Callable[[str], str] = str):
        self.program, self.choose, self.edit, self.counts = program, choose, edit, {}
        self.copies: list[tuple[Callable[[], None], str]] = []
        self.actors: list[Actor] = []
        self.allocated = 0

    def functions(self) -> dict[str, Any]:
        """The kernel's file, with this machine for a language, and the text of its functions as `edit` makes it."""
        space = dict(vars(attention_hopper))
        language = SimpleNamespace(
            program_id=lambda axis: self.program, static_range=range, minimum=min, cast=lambda x, dtype: int(x),
            arange=lambda begin, end, layout: torch.arange(begin, end), expand_dims=torch.unsqueeze, where=torch.where,
            zeros=lambda shape, dtype, layout: torch.zeros(shape), maximum=torch.maximum, exp2=torch.exp2, log2=torch.log2,
            max=torch.amax, sum=torch.sum, convert_layout=lambda x, layout: x, store=lambda place, x: place(x),
            allocate_shared_memory=self.allocate, warp_specialize=self.specialize, float32=gl.float32, int64=gl.int64,
            NVMMADistributedLayout=dict, DotOperandLayout=dict, SliceLayout=lambda axis, layout: None, constexpr=None,
        )  # fmt: skip
        barriers = SimpleNamespace(
            MBarrierLayout=lambda: "mbarrier", init=self.init, wait=self.wait, expect=self.expect, arrive=self.arrive
        )
        space.update(
            gl=language, tl=language, mbarrier=barriers, tma=SimpleNamespace(store_wait=lambda left: None),
            _load=self.load, _store=self.store, fence_async_shared=lambda: None,
            warpgroup_mma=self.product, warpgroup_mma_wait=self.product_wait,
        )  # fmt: skip
        for name, value in vars(attention_hopper).items():
            if isinstance(value, gl.constexpr):
                space[name] = value.value
            elif isinstance(value, JITFunction):
                exec(self.edit(value.src), space)
        return space

    def allocate(self, dtype: Any, shape: Sequence[int], layout: Any) -> Array:
        self.allocated += 1
        name = "abcdefghijk"[self.allocated - 1]
        if layout == "mbarrier":
            return Array([Barrier(f"barrier {name}{i}") for i in range(shape[0])], shape, torch.int64)
        return Array([Buffer(f"buffer {name}{i}", shape[1:], dtype) for i in range(shape[0])], shape, dtype)

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.arrivals = self.counts[barrier.name] = count

    def wait(self, barrier: Barrier, parity: int) -> None:
        pause(("wait", barrier.name, parity), lambda: barrier.passes(parity))

    def expect(self, barrier: Barrier, expected: int) -> None:
        pause(("expect", barrier.name, expected))
        barrier.arrive(1, expected)

    def arrive(self, barrier: Barrier, count: int) -> None:
        pause(("arrive", barrier.name))
        barrier.arrive(count)

    def load(self, descriptor: Any, place: Sequence[int], barrier: Barrier, buffer: Buffer) -> None:
        tile = f"{descriptor.name} {place[0]} {place[1]}"
        pause(("copy", buffer.name, tile, barrier.name, descriptor.block_type.nbytes))
        if buffer.busy or buffer.readers:
            raise Fault(f"{buffer.name} is overwritten while it is in use")
        buffer.busy, buffer.tile, buffer.x = True, tile, torch.full_like(buffer.x, torch.nan)

        def arrives() -> None:
            buffer.x, buffer.busy = descriptor.tile(*place).clone(), False
            barrier.arrive(0, -descriptor.block_type.nbytes)

        self.copies.append((arrives, buffer.name))

    def store(self, descriptor: Any, place: Sequence[int], buffer: Buffer) -> None:
        descriptor.tile(*place).copy_(buffer.x)

    def product(self, a: Any, b: Any, acc: Any, use_acc: bool = True, is_async: bool = False) -> list:
        """Reads now, and is still reading when it is waited for."""
        actor = threading.current_thread()
        assert isinstance(actor, Actor) and is_async
        right = b.buffer if isinstance(b, SimpleNamespace) else b
        read = [x for x in (a, right) if isinstance(x, Buffer)]
        pause(("read", tuple((x.name, x.tile) for x in read)))
        for x in read:
            if x.busy or not x.tile:
                raise Fault(f"{x.name} is read before it is full")
            x.readers += 1
        result = [None]
        left = a.x if isinstance(a, Buffer) else a

        def ends() -> None:
            for x in read:
                x.readers -= 1
            y = left.float() @ (right.x.float().T if right is not b else right.x.float())
            result[0] = y + acc if use_acc else y

        actor.products.append((ends, tuple(x.name for x in read)))
        return result

    def product_wait(self, going: int, deps: list) -> torch.Tensor:
        actor = threading.current_thread()
        assert isinstance(actor, Actor)
        done = actor.products[: len(actor.products) - going]
        pause(("read until", tuple(name for _, names in done for name in names)))
        actor.products = actor.products[len(done) :]
        for ends, _ in done:
            ends()
        (result,) = deps
        assert result[0] is not None, "used before it was waited for"
        return result[0]

    def specialize(self, parts: list, warps: list[int], registers: list[int]) -> None:
        assert (warps, len(parts)) == ([4, 1], 3)
        self.actors = [
            Actor(f"{function.__name__} {i}", lambda f=function, a=args: f(*a)) for i, (function, args) in enumerate(parts)
        ]
        for actor in self.actors:
            actor.start()
        try:
            while any(actor.is_alive() and actor.step != ("end",) for actor in self.actors):
                self._go_on()
        finally:
            for actor in self.actors:
                actor.cancelled = True
                actor.go.release()

    def _go_on(self) -> None:
        able = [actor for actor in self.actors if actor.step != ("end",) and actor.ready()]
        if not able and not self.copies:
            raise Fault(f"all wait: {[(actor.name, actor.step) for actor in self.actors]}")
        chosen = self.choose(len(able) + len(self.copies))
        if chosen >= len(able):
            self.copies.pop(chosen - len(able))[0]()
            return
        actor = able[chosen]
        actor.go.release()
        actor.paused.acquire()
        if actor.error is not None:
            raise actor.error


class Descriptor:
    """A TensorDescriptor that was made for the GPU, over the tensor's own memory."""

    def __init__(self, name: str, of: Any):
        self.name, self.dtype, self.layout = name, of.base.dtype, of.layout
        size = of.block_shape[0] * of.block_shape[1]
        self.block_type = SimpleNamespace(shape=of.block_shape, nbytes=size * of.base.element_size())
        self.matrix = of.base.as_strided(of.shape, of.strides)

    def tile(self, row: int, column: int) -> torch.Tensor:
        rows, columns = self.block_type.shape
        assert row % rows == column % columns == 0
        assert row + rows <= self.matrix.shape[0] and column + columns <= self.matrix.shape[1]
        return self.matrix[row : row + rows, column : column + columns]


class Pointer:
    """To fp32; Pointer + places is what gl.store is given."""

    def __init__(self, x: torch.Tensor):
        self.x, self.offset = x.view(-1), 0

    def __add__(self, offset: Any) -> Any:
        if isinstance(offset, torch.Tensor):
            return lambda values: self.x.index_copy_(0, self.offset + offset, values)
        moved = Pointer(self.x)
        moved.offset = self.offset + offset
        return moved


def start(launch: Launch, machine: Machine) -> Machine:
    """Run the machine's program of a launch that was captured."""
    args: list[Any] = list(launch.args)
    for i, (name, arg) in enumerate(zip(launch.kernel.arg_names, launch.args, strict=False)):
        if hasattr(arg, "block_shape"):
            args[i] = Descriptor(name, arg)
        elif isinstance(arg, torch.Tensor):
            args[i] = Pointer(arg)
    meta = {name: value for name, value in launch.meta.items() if name in launch.kernel.arg_names}
    machine.functions()["_forward_hopper"](*args, **meta)
    return machine


def run(launch: Launch, choose: Choose, edit: Callable[[str], str] = str) -> None:
    """All programs of the grid, one after the other."""
    for program in range(launch.grid[0]):
        start(launch, Machine(program, choose, edit))


@dataclass
class Traces:
    """The steps of the actors, which do not depend on their order; and how many arrivals each barrier counts."""

    actors: list[list[tuple]]
    counts: dict[str, int]


def traces(launch: Launch, program: int, choose: Choose, edit: Callable[[str], str] = str) -> Traces:
    machine = start(launch, Machine(program, choose, edit))
    return Traces([actor.steps for actor in machine.actors], machine.counts)


def explore(of: Traces) -> int:
    """Every order of the steps, and of the ends of the copies. Raises Fault; returns how many states there are.

    A state: how far each actor is; the copies that go on; of each barrier the parity, and the arrivals and bytes to come; of each
    buffer the tile in it ("going" while one is copied) and how many read it.
    """
    buffers = {step[1]: "" for steps in of.actors for step in steps if step[0] == "copy"}
    begin = (
        tuple(0 for _ in of.actors),
        (),
        tuple((name, 0, count, 0) for name, count in of.counts.items()),
        tuple((name, tile, 0) for name, tile in buffers.items()),
    )
    end = tuple(len(steps) for steps in of.actors)
    seen, waiting = {begin}, [begin]
    while waiting:
        state = waiting.pop()
        following = [*_steps(of, state), *_arrivals(of, state)]
        if not following and state[0] != end:
            at = zip(of.actors, state[0], strict=True)
            raise Fault(f"all wait: {[steps[i] for steps, i in at if i < len(steps)]}")
        for after in following:
            if after not in seen:
                seen.add(after)
                waiting.append(after)
    return len(seen)


def _steps(of: Traces, state: tuple) -> Iterator[tuple]:
    """The states after one step of an actor that can make it."""
    at, copies, barriers, buffers = state
    for i, steps in enumerate(of.actors):
        if at[i] == len(steps):
            continue
        after = (*at[:i], at[i] + 1, *at[i + 1 :])
        kind, *what = steps[at[i]]
        if kind == "wait":
            if next(parity for name, parity, *_ in barriers if name == what[0]) != what[1]:
                yield after, copies, barriers, buffers
        elif kind in ("expect", "arrive"):
            yield after, copies, _arrive(of, barriers, what[0], 1, *what[1:]), buffers
        elif kind == "copy":
            buffer, tile, barrier, size = what
            going = tuple(sorted((*copies, (buffer, tile, barrier, size))))
            yield after, going, barriers, tuple(_overwritten(b) if b[0] == buffer else b for b in buffers)
        elif kind == "read":
            tiles = dict(what[0])
            yield after, copies, barriers, tuple(_read(b, tiles[b[0]]) if b[0] in tiles else b for b in buffers)
        elif kind == "read until":
            done = what[0]
            yield after, copies, barriers, tuple((b[0], b[1], b[2] - done.count(b[0])) for b in buffers)
        else:
            assert kind == "write"
            yield after, copies, barriers, tuple((*_overwritten(b)[:1], "written", 0) if b[0] == what[0] else b for b in buffers)


def _arrivals(of: Traces, state: tuple) -> Iterator[tuple]:
    """The states after the end of one copy."""
    at, copies, barriers, buffers = state
    for i, (buffer, tile, barrier, size) in enumerate(copies):
        filled = tuple((b[0], tile, b[2]) if b[0] == buffer else b for b in buffers)
        yield at, copies[:i] + copies[i + 1 :], _arrive(of, barriers, barrier, 0, -size), filled


def _arrive(of: Traces, barriers: tuple, name: str, arrivals: int, expected: int = 0) -> tuple:
    def one(barrier: tuple) -> tuple:
        if barrier[0] != name:
            return barrier
        _, parity, missing, size = barrier
        missing, size = missing - arrivals, size + expected
        if missing < 0:
            raise Fault(f"{name}: one arrival too many")
        return (name, 1 - parity, of.counts[name], 0) if missing == size == 0 else (name, parity, missing, size)

    return tuple(one(barrier) for barrier in barriers)


def _overwritten(buffer: tuple) -> tuple:
    name, tile, readers = buffer
    if readers or tile == "going":
        raise Fault(f"{name} is overwritten while it is in use")
    return name, "going", 0


def _read(buffer: tuple, tile: str) -> tuple:
    if buffer[1] != tile:
        raise Fault(f"{buffer[0]} has {buffer[1] or 'nothing'} where {tile} is read")
    return buffer[0], tile, buffer[2] + 1
