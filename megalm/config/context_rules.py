"""The rules about context parallelism, and about attention's window."""

from __future__ import annotations

import math

from megalm.config.fixes import Change, Rule, divisors, multiples, needs
from megalm.config.kernel_rules import attention_of
from megalm.config.machine import uses_cuda
from megalm.config.run import RunConfig

_CP, _METHOD, _TP = "parallel.context_parallel", "parallel.context_method", "parallel.tensor_parallel"
_LENGTH, _HEADS, _KV_HEADS, _WINDOW = "data.seq_length", "model.num_heads", "model.num_kv_heads", "model.window"
_ATTENTION = "kernels.attention"


def _used(c: RunConfig) -> bool:
    return c.parallel.context_parallel > 1


def _is(c: RunConfig, method: str) -> bool:
    return _used(c) and c.parallel.context_method == method


def _unit(c: RunConfig) -> int:
    """What the sequence must be a multiple of: every rank has as many tokens, in a ring two chunks of as many."""
    tensor = c.parallel.tensor_parallel if c.parallel.sequence_parallel else 1
    return c.parallel.context_parallel * (math.lcm(2, tensor) if _is(c, "ring") else tensor)


def _length_changes(c: RunConfig) -> list[Change]:
    return multiples(c, _LENGTH, _unit(c)) + divisors(c, _CP, c.data.seq_length) + [(_METHOD, "ulysses")]


def _head_changes(c: RunConfig) -> list[Change]:
    """Fewer ranks, or the ring, which does not look at heads."""
    ranks = c.parallel.tensor_parallel * c.parallel.context_parallel
    return [*divisors(c, _CP, c.model.num_heads), (_METHOD, "ring"), *multiples(c, _HEADS, ranks)]


def _kv_heads_fit(c: RunConfig) -> bool:
    """Ranks get as many each, or share one: those of one tensor parallel rank, which has at least one."""
    ranks, heads = c.parallel.context_parallel, max(1, c.model.num_kv_heads // c.parallel.tensor_parallel)
    return not _is(c, "ulysses") or max(ranks, heads) % min(ranks, heads) == 0


RULES: tuple[Rule, ...] = (
    Rule(
        "sequence_per_context_rank",
        (_LENGTH, _CP, _METHOD, _TP, "parallel.sequence_parallel"),
        f"{_LENGTH} must be a multiple of 2 x {_CP} with {_METHOD}=ring, of {_CP} with ulysses, and with sequence parallelism "
        f"of {_CP} x {_TP}: every rank has as many tokens",
        lambda c: not _used(c) or c.data.seq_length % _unit(c) == 0,
        _length_changes,
    ),
    Rule(
        "heads_per_context_rank",
        (_HEADS, _TP, _CP, _METHOD),
        f"with {_METHOD}=ulysses, {_HEADS} must be a multiple of {_TP} x {_CP}: ranks exchange tokens for heads",
        lambda c: not _is(c, "ulysses") or c.model.num_heads % (c.parallel.tensor_parallel * c.parallel.context_parallel) == 0,
        _head_changes,
    ),
    Rule(
        "kv_heads_per_context_rank",
        (_KV_HEADS, _TP, _CP, _METHOD),
        f"with {_METHOD}=ulysses, {_KV_HEADS} / {_TP} must be a multiple of {_CP}, or divide it: then ranks share a head",
        _kv_heads_fit,
        lambda c: [*divisors(c, _CP, c.model.num_kv_heads), (_METHOD, "ring"), *divisors(c, _KV_HEADS, c.model.num_heads)],
    ),
    needs(
        "context_method_used",
        _METHOD,
        "ring",
        _CP,
        _used,
        (_CP, 2),
        f"{_METHOD} has no effect with {_CP}=1",
    ),
    Rule(
        "ring_kernel",
        (_ATTENTION, "kernels.backend", _METHOD, "cluster.device"),
        f"{_METHOD}=ring needs attention that tells its lse: on a GPU triton's, which runs there whatever {_ATTENTION} says",
        lambda c: not (_is(c, "ring") and uses_cuda(c) and attention_of(c) in ("sdpa", "cudnn")),
        lambda c: [(_ATTENTION, "auto"), (_ATTENTION, "triton"), (_ATTENTION, "reference"), (_METHOD, "ulysses")],
    ),
    Rule(
        "attention_window",
        (_ATTENTION, _WINDOW),
        f"{_ATTENTION}=cudnn has no sliding window",
        lambda c: attention_of(c) != "cudnn" or c.model.window == 0,
        lambda c: [(_ATTENTION, "auto"), (_ATTENTION, "triton"), (_WINDOW, 0)],
    ),
)
