"""The rules about experts: a model's, and the ranks that they are dealt out to."""

from __future__ import annotations

from typing import Any

from megalm.config.fixes import Change, Rule, divisors, multiples, needs, value_of
from megalm.config.machine import replicas
from megalm.config.run import RunConfig

_EXPERTS, _CHOSEN, _INNER, _DENSE = (
    f"model.{name}" for name in ("num_experts", "experts_per_token", "expert_ffn_size", "num_dense_layers")
)
_EP, _TP = "parallel.expert_parallel", "parallel.tensor_parallel"
_NEUTRAL: dict[str, Any] = {  # without experts
    _CHOSEN: 2,
    "model.num_shared_experts": 0,
    _DENSE: 0,
    "model.router_score": "softmax",
    "model.router_normalize": True,
    "model.router_scale": 1.0,
    "model.router_aux_loss": 0.0,
    "model.router_z_loss": 0.0,
    "model.router_balance_rate": 0.0,
    "model.capacity_factor": 0.0,
    _EP: 1,
}
_SOME = (_EXPERTS, 8)


def _has_experts(c: RunConfig) -> bool:
    return c.model.num_experts > 0


def _own_width(c: RunConfig) -> bool:
    """Whether the experts have a width of their own; a saved configuration writes down what 0 stands for."""
    return c.model.expert_ffn_size not in (0, c.model.ffn_size)


def _needs_experts(key: str, neutral: Any) -> Rule:
    name = f"{key.partition('.')[2]}_used"
    return needs(name, key, neutral, _EXPERTS, _has_experts, _SOME, f"{key} has no effect with {_EXPERTS}=0")


def _per_rank_changes(c: RunConfig) -> list[Change]:
    return divisors(c, _EP, c.model.num_experts) + multiples(c, _EXPERTS, c.parallel.expert_parallel)


def _inner_changes(c: RunConfig) -> list[Change]:
    return divisors(c, _TP, c.model.expert_ffn_size) + multiples(c, _INNER, c.parallel.tensor_parallel)


RULES: tuple[Rule, ...] = (
    needs(
        "experts_llama",
        _EXPERTS,
        0,
        "model.architecture",
        lambda c: c.model.architecture == "llama",
        ("model.architecture", "llama"),
        f"{_EXPERTS} needs model.architecture=llama: experts are SwiGLU",
    ),
    *(_needs_experts(key, neutral) for key, neutral in _NEUTRAL.items()),
    Rule(
        "expert_ffn_size_used",
        (_INNER, _EXPERTS),
        f"{_INNER} has no effect with {_EXPERTS}=0",
        lambda c: _has_experts(c) or not _own_width(c),
        lambda c: [(_INNER, 0), _SOME],
    ),
    Rule(
        "experts_enough",
        (_CHOSEN, _EXPERTS),
        f"{_CHOSEN} must not exceed {_EXPERTS}: a token goes to so many different ones",
        lambda c: not _has_experts(c) or c.model.experts_per_token <= c.model.num_experts,
        lambda c: [(_CHOSEN, c.model.num_experts), (_EXPERTS, c.model.experts_per_token)],
    ),
    Rule(
        "router_learns",
        ("model.router_normalize", _CHOSEN),
        f"model.router_normalize with {_CHOSEN}=1 divides a score by itself: it is always 1, and the router learns nothing",
        lambda c: not _has_experts(c) or not c.model.router_normalize or c.model.experts_per_token > 1,
        lambda c: [("model.router_normalize", False), (_CHOSEN, 2)],
    ),
    Rule(
        "experts_somewhere",
        (_DENSE, "model.num_layers", _EXPERTS),
        f"{_DENSE} must be below model.num_layers where there are experts: no layer would have them",
        lambda c: not _has_experts(c) or c.model.num_dense_layers < c.model.num_layers,
        lambda c: [(_DENSE, c.model.num_layers - 1), ("model.num_layers", c.model.num_dense_layers + 1)],
    ),
    Rule(
        "expert_features_per_rank",
        (_INNER, _TP),
        f"{_INNER} must be a multiple of {_TP}, which splits every expert",
        lambda c: not (_has_experts(c) and _own_width(c)) or value_of(c, _INNER) % c.parallel.tensor_parallel == 0,
        _inner_changes,
    ),
    Rule(
        "experts_per_rank",
        (_EXPERTS, _EP),
        f"{_EXPERTS} must be a multiple of {_EP}: every rank gets as many",
        lambda c: c.model.num_experts % c.parallel.expert_parallel == 0,
        _per_rank_changes,
    ),
    Rule(
        "expert_ranks",
        (_EP, "ranks with the same weights"),
        f"{_EP} must divide the ranks with the same weights (data parallel copies x parallel.context_parallel)",
        lambda c: not _has_experts(c) or replicas(c) % c.parallel.expert_parallel == 0,
        lambda c: divisors(c, _EP, replicas(c)),
    ),
)
