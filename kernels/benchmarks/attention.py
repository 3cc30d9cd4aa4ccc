"""Attention over batches of equal sequences, by their length, and over packed documents; 2048 channels in all heads.

FLOPs: 4 n^2 H D forward for each sequence of n, half of that if causal, 2.5 times as many backward, where the scores are
computed again. Every query sees keys of its own sequence only. Peers: the three of torch's scaled_dot_product_attention, each
called for itself, flex_attention, and FlashAttention 2 and 3 where they are installed.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from megalm_kernels.attention import flash_attention, flash_attention_reference, hopper
from megalm_kernels.benchmarks.harness import OURS, Absent, Case, Function, Provider, Work, find

_CHANNELS = 2048  # of all heads of the queries
_TOKENS = 16384  # of a batch, or one longer sequence
_EXACT_SCORES = 2**28  # that exist at a time where the result is computed in fp64
_DOCUMENTS = (4096, 37, 2048, 640, 1, 3000, 1024, 517, 2500, 128, 2000, 393)  # 16384 tokens
_TEXT = re.compile(r"\d+ x (\d+) x \d+ x (\d+)( causal)?")  # of a Problem


@dataclass(frozen=True)
class Problem:
    """Sequences of these lengths; packed: one after the other, else of one length and side by side."""

    lengths: tuple[int, ...]
    heads: int
    key_heads: int
    channels: int
    causal: bool
    packed: bool = False

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.key_heads}" if self.key_heads != self.heads else f"{self.heads}"
        start = f"{self.tokens} in {len(self.lengths)}" if self.packed else f"{len(self.lengths)} x {self.lengths[0]}"
        return f"{start} x {heads} x {self.channels}{' causal' * self.causal}"

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def group(self) -> str:
        """What a picture has a panel for."""
        shared = self.heads // self.key_heads
        words = [f"head_dim {self.channels}", "causal" if self.causal else "every key"]
        return ", ".join([*words, *([f"{shared} queries per key"] if shared > 1 else [])])

    def flops(self) -> int:
        """Of the forward."""
        return sum(4 * n * n * self.heads * self.channels for n in self.lengths) // (2 if self.causal else 1)

    def options(self, starts: Sequence[Tensor]) -> dict[str, Any]:
        """Those of `flash_attention`; starts: of the packed sequences, or nothing."""
        packed = {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[0]} if starts else {}
        return {"causal": self.causal, **packed}

    def make(self, device: torch.device) -> list[Tensor]:
        place = (self.tokens,) if self.packed else (len(self.lengths), self.lengths[0])
        counts = (self.heads, self.key_heads, self.key_heads)
        tensors = [torch.randn(*place, count, self.channels, device=device).bfloat16() for count in counts]
        if self.packed:
            starts = torch.tensor((0, *self.lengths)).cumsum(0)
            tensors.append(starts.to(device, torch.int32))
        return tensors


def read_shape(shape: str) -> dict[str, Any] | None:
    """head_dim, causal and seq_length of a row's shape, for the table that `auto` reads; None if it is packed or shares keys."""
    found = _TEXT.fullmatch(shape)
    if found is None:
        return None
    length, channels, causal = found.groups()
    return {"head_dim": int(channels), "causal": bool(causal), "seq_length": int(length)}


_LENGTHS = {"tiny": (16, 32), "quick": (2048, 8192), "full": tuple(2**i for i in range(9, 16))}
_SHARED = {"tiny": (32,), "quick": (8192,), "full": (1024, 4096, 16384)}  # the lengths at which 8 queries share a key, too
_WIDTHS = {"tiny": (32,), "quick": (128,), "full": (64, 128)}


def cases(sizes: str) -> Iterator[Case]:
    """bf16."""
    tiny = sizes == "tiny"
    for channels in _WIDTHS[sizes]:
        heads = 4 if tiny else _CHANNELS // channels
        groups = heads // (2 if tiny else 8)
        for causal, length in itertools.product((True, False), _LENGTHS[sizes]):
            lengths = (length,) * (2 if tiny else max(1, _TOKENS // length))
            for key_heads in (heads, groups) if length in _SHARED[sizes] else (heads,):
                yield _case("attention", Problem(lengths, heads, key_heads, channels, causal))
        documents = (5, 1, 16, 10) if tiny else _DOCUMENTS
        for key_heads in (heads, groups):
            yield _case("attention_packed", Problem(documents, heads, key_heads, channels, True, packed=True))


def _case(operation: str, problem: Problem) -> Case:
    queries, keys = (2 * problem.tokens * count * problem.channels for count in (problem.heads, problem.key_heads))  # bytes
    flops = problem.flops()
    return Case(
        operation, str(problem), torch.bfloat16, problem.make, lambda q, k, v, *_: _exact(q, k, v, problem), _providers(problem),
        Work(2 * queries + 2 * keys, flops), Work(4 * queries + 4 * keys, flops * 5 // 2), bound="flops", gradients=(0, 1, 2),
        size=0 if problem.packed else problem.lengths[0], group="" if problem.packed else problem.group,
    )  # fmt: skip


def _exact(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
    """The reference, some rows of scores at a time, which the backward computes again: all would not fit a GPU."""
    if not problem.packed:
        return _exact_rows(q, k, v, problem.causal)
    parts = zip(*(x[None].split(problem.lengths, 1) for x in (q, k, v)), strict=True)
    return torch.cat([_exact_rows(a, b, c, problem.causal)[0] for a, b, c in parts])


def _exact_rows(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    batch, length, heads, _ = q.shape
    rows = max(1, _EXACT_SCORES // (batch * heads * length))
    parts = []
    for begin in range(0, length, rows):
        end = min(length, begin + rows)
        seen = end if causal else length  # aligned at the end, so the mask of these rows is the causal one again
        some = (q[:, begin:end], k[:, :seen], v[:, :seen])
        parts.append(checkpoint(flash_attention_reference, *some, causal=causal, use_reentrant=False))
    return torch.cat(parts, 1)


# --- providers --------------------------------------------------------------------------------------------------------


def _providers(problem: Problem) -> list[Provider]:
    """Ours, its variants, and peers."""

    def public(function: Function = flash_attention, **more: Any) -> Callable[[], Function]:
        return lambda: lambda q, k, v, *starts: function(q, k, v, **problem.options(starts), **more)

    ours = {"attention": OURS}
    plain = [] if problem.packed else [Provider(f"{OURS} plain", public(_plain), ours)]  # packed, it always is
    return [
        Provider(OURS, public(), ours),
        Provider(f"{OURS} unordered", public(deterministic=False), ours),
        *plain,
        Provider("torch", public(deterministic=False), {"attention": "torch"}),
        Provider("reference", public(flash_attention_reference)),
        Provider("sdpa flash", lambda: _varlen(problem) if problem.packed else _sdpa(SDPBackend.FLASH_ATTENTION, problem)),
        Provider("sdpa cudnn", lambda: _sdpa(SDPBackend.CUDNN_ATTENTION, problem)),
        Provider("sdpa efficient", lambda: _sdpa(SDPBackend.EFFICIENT_ATTENTION, problem)),
        Provider("flex", lambda: _flex(problem)),
        Provider("flash-attn 2", lambda: _flash_attn("flash_attn", problem)),
        Provider("flash-attn 3", lambda: _flash_attn("flash_attn_interface", problem)),
    ]


def _plain(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Without the warp-specialised forward."""
    hopper.use(False)
    try:
        return flash_attention(q, k, v, **options)
    finally:
        hopper.use(True)


def _sdpa(backend: SDPBackend, problem: Problem) -> Function:
    """One of torch's, or nothing: it may not fall back on another."""
    name = backend.name.lower()
    if problem.packed:
        raise Absent(f"{name} of scaled_dot_product_attention has no packed sequences")
    shared = problem.heads != problem.key_heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        try:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=problem.causal, enable_gqa=shared).transpose(1, 2)
        except RuntimeError as error:
            if not re.match("No (available kernel|viable backend)", str(error)):  # as a GPU says it, and a CPU
                raise
            raise Absent(f"{name} of scaled_dot_product_attention does not take {problem.group}") from error

    return attend


def _varlen(problem: Problem) -> Function:
    """Torch's FlashAttention for packed sequences, from 2.10 on."""
    try:
        attend = find("torch.nn.attention.varlen", "varlen_attn")
    except ImportError as error:
        raise Absent(f"torch {torch.__version__} has no varlen_attn") from error
    takes = inspect.signature(attend).parameters
    mask: dict[str, Any] = {"is_causal": problem.causal}
    if "window_size" in takes:
        mask = {"window_size": (-1, 0 if problem.causal else -1)}
    if "enable_gqa" in takes:
        mask["enable_gqa"] = problem.heads != problem.key_heads
    longest = max(problem.lengths)
    return lambda q, k, v, starts: attend(q, k, v, starts, starts, longest, longest, **mask)


def _flex(problem: Problem) -> Function:
    """Compiled for this shape; its block mask is made at the first call, which is not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()
    compiled: Function = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    masks: list[Any] = []

    def mask_of(device: torch.device) -> Any:
        ends = torch.tensor(problem.lengths, device=device)
        document = torch.repeat_interleave(torch.arange(len(ends), device=device), ends)

        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (document[query] == document[key]) & (query >= key)

        def before(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return query >= key

        length = problem.tokens if problem.packed else problem.lengths[0]
        make: Function = torch.compile(create_block_mask)  # which else makes the whole matrix first
        return make(seen if problem.packed else before, None, None, length, length, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor, *starts: Tensor) -> Tensor:
        if problem.causal and not masks:
            masks.append(mask_of(q.device))
        shared = {"enable_gqa": problem.heads != problem.key_heads, "block_mask": masks[0] if masks else None}
        if problem.packed:
            return compiled(*(x[None].transpose(1, 2) for x in (q, k, v)), **shared)[0].transpose(0, 1)
        return compiled(*(x.transpose(1, 2) for x in (q, k, v)), **shared).transpose(1, 2)

    return attend


def _flash_attn(module: str, problem: Problem) -> Function:
    """FlashAttention 2 or 3 as its authors ship it; some versions give lse too."""
    function = find(module, "flash_attn_varlen_func" if problem.packed else "flash_attn_func")
    longest = max(problem.lengths)

    def attend(q: Tensor, k: Tensor, v: Tensor, *starts: Tensor) -> Tensor:
        packed = (starts[0], starts[0], longest, longest) if problem.packed else ()
        found = function(q, k, v, *packed, causal=problem.causal)
        return found[0] if isinstance(found, tuple) else found

    return attend
