"""What the model is. Knows nothing of how many processes train it."""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.knobs import knob

ARCHITECTURES = ("gpt", "llama")


@dataclass
class ModelConfig:
    """The shape of the transformer."""

    architecture: str = knob(
        "llama", "gpt: learned positions, LayerNorm, GELU; llama: RoPE, RMSNorm, SwiGLU, GQA", allowed=ARCHITECTURES
    )
    vocab_size: int = knob(2048, "rows of the embedding; at least the tokenizer's size", minimum=2)
    hidden_size: int = knob(128, "width of the residual stream (E)", minimum=1)
    num_layers: int = knob(4, "transformer blocks", minimum=1)
    num_heads: int = knob(4, "query heads (H)", minimum=1)
    num_kv_heads: int = knob(0, "key and value heads (grouped-query attention); 0: num_heads", minimum=0)
    head_dim: int = knob(0, "width of one head (D); 0: hidden_size / num_heads", minimum=0)
    ffn_size: int = knob(
        0, "width inside the MLP; 0: 4 E (gpt), 8/3 E rounded up to a multiple of 64 (llama)", minimum=0
    )
    max_seq_length: int = knob(
        1024, "longest sequence the model is made for, tokens; rows of gpt's position table", minimum=1
    )
    rope_theta: float = knob(10000.0, "base of the rotary frequencies (llama)", above=0.0)
    norm_eps: float = knob(1e-5, "added to the variance in every norm", above=0.0)
    tie_embeddings: bool = knob(False, "the output head uses the embedding's weight")
    dropout: float = knob(
        0.0,
        "probability of dropping an element after the embedding and on each residual branch",
        minimum=0.0,
        maximum=0.99,
    )
    init_std: float = knob(
        0.02,
        "standard deviation of the initial weights; residual projections get it over sqrt(2 num_layers)",
        minimum=0.0,
    )

    def __post_init__(self) -> None:
        # Not a field. Rules tell what was asked for from what follows: a derived head_dim must divide, a given one not.
        self.derived = frozenset(name for name in ("num_kv_heads", "head_dim", "ffn_size") if getattr(self, name) == 0)
        self.num_kv_heads = self.num_kv_heads or self.num_heads
        self.head_dim = self.head_dim or max(1, self.hidden_size // max(1, self.num_heads))
        llama_ffn = -(-8 * self.hidden_size // 3 // 64) * 64
        self.ffn_size = self.ffn_size or (llama_ffn if self.architecture == "llama" else 4 * self.hidden_size)
