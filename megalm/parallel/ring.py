"""Ring attention: keys and values go round the ranks of a group while each computes with those that it has (Liu et al. 2023).

Forward: the next rank's keys and values are on their way while this one computes with the present ones. Results are merged by
their lse, exactly, into one running result. n - 1 hops.
Backward: keys and values go round again. The sums of their gradients follow one step behind: a rank adds its part to those that
arrive and hands them on, and after n hops they are at home.

Sums are kept in fp32 and added up in the same order every time: gradients repeat to the bit. Nothing waits for the device.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.parallel.ring_blocks import Block, Starts, blocks
from megalm.parallel.topology import Group
from megalm_kernels import attention_part, attention_part_backward, merge_into


class Documents(Protocol):
    """What the ring needs to know of the documents in a microbatch's samples."""

    @property
    def starts(self) -> Starts: ...


class RingStep(NamedTuple):
    """One step as it ran; seconds of a clock that all ranks of a machine share."""

    kind: str  # F forward, B backward
    source: int  # whose keys and values were here
    start: float  # the next ones are sent for, and computing begins
    computed: float
    arrived: float  # the next ones are here; there are none in the last step


class RingAttention:
    """Causal attention of this rank's tokens to those of all ranks, in zig-zag order: ring_blocks.py says who has which."""

    def __init__(self, group: Group, window: int = 0, scale: float | None = None):
        self.group, self.window, self.scale = group, window, scale
        self.record: list[RingStep] | None = None  # a list: every step's times are added

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        """q (B, S / n, H, D), k and v (B, S / n, Hkv, D) -> (B, S / n, H, D)."""
        size, rank = self.group.size, self.group.rank
        assert q.shape[1] == k.shape[1], "every rank has all of its keys"
        starts = documents.starts if documents is not None else ()
        todo = blocks(size, rank, size * q.shape[1], self.window, starts)
        return RingFunction.apply(q, k, v, self.group, todo, self.scale, self.record)


class RingFunction(torch.autograd.Function):
    """Attention by `todo`, the blocks of this rank."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        group: Group,
        todo: Sequence[Block],
        scale: float | None,
        record: list[RingStep] | None = None,
    ) -> Tensor:
        calls = [_Call(block, q, scale) for block in todo]
        wide = torch.promote_types(q.dtype, torch.float32)
        total = torch.zeros(q.shape, dtype=wide, device=q.device)
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=wide, device=q.device)
        here = torch.stack((k, v))
        there = torch.empty_like(here)
        clock = _Clock("F", group, record, q.device)
        for step in range(group.size):
            start = clock.now()
            works = _pass_on(here, there, group) if step < group.size - 1 else ()
            for call in calls:
                if call.block.step == step:
                    call.forward(total, lse, q, here)
            computed = clock.now()
            _wait(works)
            clock.note(step, start, computed)
            here, there = there, here
        out = total.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group, ctx.calls, ctx.record = group, calls, record
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        group, dout = ctx.group, dout.contiguous()
        dq = torch.zeros_like(out, dtype=lse.dtype)
        here = torch.stack((k, v))
        there = torch.empty_like(here)
        sums = torch.zeros_like(here, dtype=lse.dtype)  # of the gradients of what is here
        arriving = torch.empty_like(sums)
        on_their_way: Sequence[dist.Work] = ()
        clock = _Clock("B", group, ctx.record, q.device)
        for step in range(group.size):
            start = clock.now()
            works = _pass_on(here, there, group) if step < group.size - 1 else ()
            found = [(c, c.backward(dq, dout, q, here, out, lse)) for c in ctx.calls if c.block.step == step]
            computed = clock.now()
            if step > 0:
                _wait(on_their_way)
                sums, arriving = arriving, sums
            for call, parts in found:
                call.add(sums, parts)
            on_their_way = _pass_on(sums, arriving, group)
            _wait(works if step < group.size - 1 else on_their_way)
            clock.note(step, start, computed)
            here, there = there, here
        dk, dv = arriving.to(k.dtype)
        return dq.to(q.dtype), dk, dv, None, None, None, None


class _Call:
    """One block on tensors: the rows that it takes, and attention's options for it."""

    def __init__(self, block: Block, q: Tensor, scale: float | None):
        self.block = block
        whole = slice(None) if block.sample is None else slice(block.sample, block.sample + 1)
        self.rows = slice(None) if block.borders else (whole, slice(*block.queries))
        self.columns = (slice(None), *((slice(None),) if block.borders else (whole, slice(*block.keys))))
        self.lse_rows = slice(None) if block.borders else (whole, slice(None), slice(*block.queries))
        self.options: dict[str, Any] = {"causal": block.causal, "window": (block.left, -1), "scale": scale}
        if block.borders:
            borders = torch.tensor(block.borders, dtype=torch.int32, pin_memory=q.device.type == "cuda")
            borders = borders.to(q.device, non_blocking=True)
            self.options |= {"cu_seqlens_q": borders, "cu_seqlens_k": borders}

    def forward(self, total: Tensor, lse: Tensor, q: Tensor, here: Tensor) -> None:
        """Merge the block into total (B, S', H, D) and lse (B, H, S'). here: keys and values (2, B, S', Hkv, D)."""
        given, (k, v) = q[self.rows], here[self.columns]
        if not self.block.borders:
            part, part_lse = attention_part(given, k, v, **self.options)
        else:
            part, part_lse = attention_part(*(x.flatten(0, 1) for x in (given, k, v)), **self.options)
            part, part_lse = part.view(q.shape), part_lse.view(-1, *q.shape[:2]).transpose(0, 1)
        merge_into(total[self.rows], lse[self.lse_rows], part, part_lse)

    def backward(self, dq: Tensor, dout: Tensor, q: Tensor, here: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Add the block's part to dq, and return those of its keys and values."""
        k, v = here[self.columns]
        given = [dout[self.rows], q[self.rows], k, v, out[self.rows], lse[self.lse_rows]]
        if self.block.borders:
            given = [*(x.flatten(0, 1) for x in given[:-1]), lse.transpose(0, 1).flatten(1)]
        part, dk, dv = attention_part_backward(*given, **self.options)
        if self.block.borders:
            part, dk, dv = part.view(q.shape), dk.view(k.shape), dv.view(v.shape)
        dq[self.rows] += part
        return dk, dv

    def add(self, sums: Tensor, parts: Iterable[Tensor]) -> None:
        """Add a block's parts to the sums of the gradients of keys and values (2, B, S', Hkv, D)."""
        for total, part in zip(sums[self.columns], parts, strict=True):
            total += part


class _Clock:
    """Notes the times of a ring's steps, if somebody wants to know."""

    def __init__(self, kind: str, group: Group, record: list[RingStep] | None, device: torch.device):
        self.kind, self.group, self.record, self.device = kind, group, record, device

    def now(self) -> float:
        if self.record is not None and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # sync
        return 0.0 if self.record is None else time.monotonic()

    def note(self, step: int, start: float, computed: float) -> None:
        if self.record is not None:
            source = (self.group.rank - step) % self.group.size
            self.record.append(RingStep(self.kind, source, start, computed, self.now()))


def _pass_on(send: Tensor, receive: Tensor, group: Group) -> Sequence[dist.Work]:
    """To the next rank of the ring, from the one before."""
    following, previous = (group.ranks[(group.rank + step) % group.size] for step in (1, -1))
    return dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, send, following, group.handle),
            dist.P2POp(dist.irecv, receive, previous, group.handle),
        ]
    )


def _wait(works: Iterable[dist.Work]) -> None:
    for work in works:
        work.wait()
