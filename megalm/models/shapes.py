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
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in block_shapes(config)}
    if last:
        shapes |= {f"norm.{name}": shape for name, shape in _norm(config)}
        if not (first and config.tie_embeddings):
            shapes["head.weight"] = (V, E)
    return shapes


def block_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Parameters of one block, by their names within it."""
    E, heads, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    gpt, ffn = config.architecture == "gpt", config.ffn_size
    attention = {"q": (heads, E), "k": (kv, E), "v": (kv, E), "out": (E, heads)}
    mlp = {"up": (ffn, E), "down": (E, ffn)} if gpt else {"gate": (ffn, E), "up": (ffn, E), "down": (E, ffn)}
    for part, linears in (("attention", attention), ("mlp", mlp)):
        for name, shape in _norm(config):
            yield f"{part}_norm.{name}", shape
        for linear, matrix in linears.items():
            yield f"{part}.{linear}.weight", matrix
            if gpt:
                yield f"{part}.{linear}.bias", matrix[:1]


def _norm(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "weight", (config.hidden_size,)
    if config.architecture == "gpt":
        yield "bias", (config.hidden_size,)
