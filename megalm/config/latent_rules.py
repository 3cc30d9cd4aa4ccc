"""Rules about multi-head latent attention (models/latent_attention.py)."""

from __future__ import annotations

from megalm.config.fixes import Change, Rule, needs
from megalm.config.run import RunConfig

_KV, _Q, _ROPE, _VALUE, _HEAD = (
    f"model.{name}" for name in ("kv_latent_size", "q_latent_size", "rope_head_dim", "value_head_dim", "head_dim")
)
_LATENT = (_KV, 64)  # proposed where a width is missing


def _is_latent(c: RunConfig) -> bool:
    return c.model.kv_latent_size > 0


def _rope_changes(c: RunConfig) -> list[Change]:
    """The paper's third of a head, or a head of twice the width; then no latents."""
    return [(_ROPE, max(2, c.model.head_dim // 3 // 2 * 2)), (_HEAD, 2 * c.model.rope_head_dim), (_KV, 0)]


def _value_is_used(c: RunConfig) -> bool:
    """Or is what it would be anyway: a saved configuration says so of a model that has no latents, too."""
    usual = c.model.head_dim - c.model.rope_head_dim
    return _is_latent(c) or c.model.value_head_dim in (0, usual)


RULES: tuple[Rule, ...] = (
    needs(
        "latent_llama",
        _KV,
        0,
        "model.architecture",
        lambda c: c.model.architecture == "llama",
        ("model.architecture", "llama"),
        f"{_KV}: latent attention needs rotary positions, model.architecture=llama",
    ),
    Rule(
        "latent_rope_even",
        (_ROPE, _KV),
        f"with {_KV}, {_ROPE} must be even: RoPE turns pairs of numbers",
        lambda c: not _is_latent(c) or c.model.rope_head_dim % 2 == 0,
        lambda c: [(_ROPE, c.model.rope_head_dim + 1), (_ROPE, c.model.rope_head_dim - 1)],
    ),
    Rule(
        "latent_rope",
        (_ROPE, _KV, _HEAD),
        f"with {_KV}, {_ROPE} must be more than 0 and less than {_HEAD}: the other channels come from the latent",
        lambda c: not _is_latent(c) or 0 < c.model.rope_head_dim < c.model.head_dim,
        _rope_changes,
    ),
    Rule(
        "latent_value",
        (_VALUE, _HEAD, _KV),
        f"{_VALUE} must not exceed {_HEAD}: attention's kernels want values no wider than keys",
        lambda c: not _is_latent(c) or c.model.value_head_dim <= c.model.head_dim,
        lambda c: [(_VALUE, c.model.head_dim), (_VALUE, 0)],
    ),
    Rule(
        "latent_kv_heads",
        ("model.num_kv_heads", "model.num_heads", _KV),
        f"with {_KV} every head has its own key and value: model.num_kv_heads must be model.num_heads",
        lambda c: not _is_latent(c) or c.model.num_kv_heads == c.model.num_heads,
        lambda c: [("model.num_kv_heads", 0), ("model.num_heads", c.model.num_kv_heads), (_KV, 0)],
    ),
    needs("q_latent_used", _Q, 0, _KV, _is_latent, _LATENT, f"{_Q} has no effect with {_KV}=0"),
    needs("rope_head_dim_used", _ROPE, 0, _KV, _is_latent, _LATENT, f"{_ROPE} has no effect with {_KV}=0"),
    Rule(
        "value_head_dim_used",
        (_VALUE, _KV),
        f"{_VALUE} has no effect with {_KV}=0",
        _value_is_used,
        lambda c: [(_VALUE, 0), _LATENT],
    ),
)
