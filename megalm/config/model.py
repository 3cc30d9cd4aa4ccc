"""What the model is. Knows nothing of how many processes train it."""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.knobs import knob

ARCHITECTURES = ("gpt", "llama")
_DERIVED = ("num_kv_heads", "head_dim", "ffn_size", "expert_ffn_size", "value_head_dim")  # where they are 0


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
    window: int = knob(0, "tokens before its own that a token sees in attention (sliding window); 0: all", minimum=0)
    kv_latent_size: int = knob(
        0, "multi-head latent attention: width that keys and values are made from (llama); 0: ordinary attention", minimum=0
    )
    q_latent_size: int = knob(0, "latent attention: the same for queries; 0: straight from the residual stream", minimum=0)
    rope_head_dim: int = knob(0, "latent attention: channels of head_dim with rotary positions; heads share their key", minimum=0)
    value_head_dim: int = knob(0, "latent attention: width of a head's value; 0: head_dim - rope_head_dim", minimum=0)
    num_experts: int = knob(0, "experts in a block's MLP (llama); 0: a dense MLP", minimum=0)
    experts_per_token: int = knob(2, "experts that each token goes to (top k)", minimum=1)
    expert_ffn_size: int = knob(0, "width inside one expert; 0: ffn_size", minimum=0)
    num_shared_experts: int = knob(0, "experts that every token goes to, besides; one MLP of so many times the width", minimum=0)
    num_dense_layers: int = knob(0, "first blocks that keep a dense MLP", minimum=0)
    router_score: str = knob("softmax", "from the router's logits to an expert's score", allowed=("softmax", "sigmoid"))
    router_normalize: bool = knob(True, "the scores of a token's experts are divided by their sum")
    router_scale: float = knob(1.0, "factor of the scores of a token's experts", above=0.0)
    router_aux_loss: float = knob(0.0, "coefficient of the loss that balances the experts' loads; 0: none", minimum=0.0)
    router_z_loss: float = knob(0.0, "coefficient of the loss that keeps the router's logits small; 0: none", minimum=0.0)
    router_balance_rate: float = knob(
        0.0,
        "step of the biases that balance the loads without a loss, added to scores when experts are chosen; 0: none",
        minimum=0.0,
    )
    capacity_factor: float = knob(
        0.0,
        "an expert takes so many times its even share of a microbatch's tokens, later ones are dropped; 0: it takes all",
        minimum=0.0,
    )
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
        self.derived = frozenset(name for name in _DERIVED if getattr(self, name) == 0)
        self.num_kv_heads = self.num_kv_heads or self.num_heads
        self.head_dim = self.head_dim or max(1, self.hidden_size // max(1, self.num_heads))
        llama_ffn = -(-8 * self.hidden_size // 3 // 64) * 64
        self.ffn_size = self.ffn_size or (llama_ffn if self.architecture == "llama" else 4 * self.hidden_size)
        if self.num_experts:  # else 0 stays: a saved configuration, changed in other places, shall not be refused for it
            self.expert_ffn_size = self.expert_ffn_size or self.ffn_size
        if self.kv_latent_size:
            self.value_head_dim = self.value_head_dim or self.head_dim - self.rope_head_dim

    def has_experts(self, layer: int) -> bool:
        """Whether a block's MLP is made of experts."""
        return self.num_experts > 0 and layer >= self.num_dense_layers
