"""Parameters and FLOPs of a model, from its configuration alone. The only place that counts them.

Standard MFU = (6 N_matmul + 6 L h S) tokens/s / dense bf16 peak: N_matmul are the parameters that take part in a matrix
product (no embedding look-up), the second term is attention counted once for the causal mask (h = query heads x head
dim), forward 1 and backward 2 parts, no recomputation.
"""

from __future__ import annotations

from megalm.config.model import ModelConfig


def count_block_parameters(config: ModelConfig) -> int:
    """Matrix parameters of one block, without biases and norms."""
    attention = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    matrices = 3 if config.architecture == "llama" else 2
    return attention + matrices * config.hidden_size * config.ffn_size


def count_matmul_parameters(config: ModelConfig) -> int:
    """Parameters in matrix products: all blocks and the head."""
    return config.num_layers * count_block_parameters(config) + config.vocab_size * config.hidden_size


def count_parameters(config: ModelConfig) -> int:
    """All parameters of the model."""
    E, heads, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    embedding = config.vocab_size * E
    total = count_matmul_parameters(config) + (0 if config.tie_embeddings else embedding)
    if config.architecture == "llama":
        return total + (2 * config.num_layers + 1) * E
    biases = heads + 2 * kv + E + config.ffn_size + E
    return total + config.max_seq_length * E + config.num_layers * (biases + 4 * E) + 2 * E


def count_flops_per_token(config: ModelConfig, seq_length: int) -> float:
    """FLOPs of forward and backward for one token in a causal sequence of `seq_length`."""
    attention = 6 * config.num_layers * config.num_heads * config.head_dim * seq_length
    return 6 * count_matmul_parameters(config) + attention
