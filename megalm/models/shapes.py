"""The names and shapes of a model's parameters, from its configuration alone: without torch, so that a plan costs no import.

The order is that of `named_parameters()` of the model itself; tests/models/test_shapes.py holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterator

from megalm.config.model import ModelConfig

Shapes = dict[str, tuple[int, ...]]


def stage_shapes(config: ModelConfig, layers: range, first: bool = True, last: bool = True) -> Shapes:
    """Parameters of one pipeline stage with these layers. `first`: the embedding is here; `last`: norm and head are.

    The head of a tied model has a parameter of its own only where the embedding is elsewhere.
    """
    E, V, gpt = config.hidden_size, config.vocab_size, config.architecture == "gpt"
    shapes: Shapes = {}
    if first:
        shapes["embedding.weight"] = (V, E)
        if gpt:
            shapes["position_embedding.weight"] = (config.max_seq_length, E)
    for layer in layers:
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in block_shapes(config, layer)}
    if last:
        shapes |= {f"norm.{name}": shape for name, shape in _norm(config)}
        if not (first and config.tie_embeddings):
            shapes["head.weight"] = (V, E)
    return shapes


def block_shapes(config: ModelConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Parameters of one block, by their names within it."""
    attention = _latent_attention(config) if config.kv_latent_size else _attention(config)
    mlp = _experts(config) if config.has_experts(layer) else _mlp(config)
    for part, parameters in (("attention", attention), ("mlp", mlp)):
        for name, shape in _norm(config):
            yield f"{part}_norm.{name}", shape
        for name, shape in parameters.items():
            yield f"{part}.{name}", shape
            if config.architecture == "gpt":
                yield f"{part}.{name.replace('weight', 'bias')}", shape[:1]


def _attention(config: ModelConfig) -> Shapes:
    E, heads, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {"q.weight": (heads, E), "k.weight": (kv, E), "v.weight": (kv, E), "out.weight": (E, heads)}


def _latent_attention(config: ModelConfig) -> Shapes:
    """Keys and values made from one narrow vector per token, queries too if they have such a width; the norms are in between."""
    E, heads, value = config.hidden_size, config.num_heads, config.num_heads * config.value_head_dim
    latent, q_latent, plain = config.kv_latent_size, config.q_latent_size, config.head_dim - config.rope_head_dim
    query = heads * config.head_dim
    shapes: Shapes = {"q.weight": (query, E)}
    if q_latent:
        shapes = {"q_down.weight": (q_latent, E), "q_norm.weight": (q_latent,), "q_up.weight": (query, q_latent)}
    shapes |= {"kv_down.weight": (latent + config.rope_head_dim, E), "kv_norm.weight": (latent,)}
    return shapes | {"kv_up.weight": (heads * plain + value, latent), "out.weight": (E, value)}


def _mlp(config: ModelConfig, prefix: str = "", ffn_size: int = 0) -> Shapes:
    E, ffn = config.hidden_size, ffn_size or config.ffn_size
    names = ("up",) if config.architecture == "gpt" else ("gate", "up")
    shapes: Shapes = {f"{prefix}{name}.weight": (ffn, E) for name in names}
    return shapes | {f"{prefix}down.weight": (E, ffn)}


def _experts(config: ModelConfig) -> Shapes:
    """The router, the matrices of all experts stacked, and those that every token goes to as one MLP."""
    E, experts, ffn = config.hidden_size, config.num_experts, config.expert_ffn_size
    shapes: Shapes = {"router.weight": (experts, E), "experts.gate": (experts, ffn, E), "experts.up": (experts, ffn, E)}
    shapes["experts.down"] = (experts, E, ffn)
    return shapes | (_mlp(config, "shared.", config.num_shared_experts * ffn) if config.num_shared_experts else {})


def _norm(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "weight", (config.hidden_size,)
    if config.architecture == "gpt":
        yield "bias", (config.hidden_size,)
