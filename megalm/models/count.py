"""Parameters, FLOPs and activations of a model, from its configuration alone. The only place that counts them.

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


def count_stage_parameters(config: ModelConfig, num_layers: int, first: bool, last: bool) -> int:
    """All parameters of a part of the model: blocks, the embeddings if it is the first part, norm and head if the last."""
    E, heads, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    gpt = config.architecture == "gpt"
    norm = 2 * E if gpt else E
    biases = heads + 2 * kv + E + config.ffn_size + E if gpt else 0
    embedding = config.vocab_size * E
    total = num_layers * (count_block_parameters(config) + biases + 2 * norm)
    total += embedding + (config.max_seq_length * E if gpt else 0) if first else 0
    total += norm if last else 0
    return total + (embedding if last and not (first and config.tie_embeddings) else 0)


def count_parameters(config: ModelConfig) -> int:
    """All parameters of the model."""
    return count_stage_parameters(config, config.num_layers, True, True)


def count_stage_flops_per_token(config: ModelConfig, seq_length: int, num_layers: int, last: bool) -> float:
    """FLOPs of forward and backward of a part of the model for one token; only the last part's head counts beside blocks."""
    attention = 6 * num_layers * config.num_heads * config.head_dim * seq_length
    head = config.vocab_size * config.hidden_size if last else 0
    return 6 * (num_layers * count_block_parameters(config) + head) + attention


def count_flops_per_token(config: ModelConfig, seq_length: int) -> float:
    """FLOPs of forward and backward for one token in a causal sequence of `seq_length`."""
    return count_stage_flops_per_token(config, seq_length, config.num_layers, True)


def count_block_activations(
    config: ModelConfig,
    recompute: str,
    element_bytes: int,
    tensor_parallel: int = 1,
    sequence_parallel: bool = False,
    fused: bool = False,
    triton: bool = False,
    scores: int = 0,
) -> float:
    """Bytes per token that one block keeps on one rank from its forward to its backward, its input included.

    After Korthikanti et al. 2022, equations 1 to 4 and 6, for our operations: attention keeps no score matrix but its
    result and fp32 logarithms of sums (flash attention), the masks of dropout are 1 byte, and norms keep fp32 statistics.
    `fused` (kernels.fuse_projections): rotary turns copies of q and k, and the product they lie in stays for v's sake.
    `triton` (kernels.swiglu): the kernel computes silu(gate) again in the backward; torch's operators keep it.
    `scores` (kernels.attention=reference): of how many keys attention keeps the scores after all.
    """
    t, s = tensor_parallel, tensor_parallel if sequence_parallel else 1
    llama, e = config.architecture == "llama", element_bytes
    hidden, gathered = config.hidden_size * e / s, config.hidden_size * e
    if recompute == "full":
        return hidden
    q = config.num_heads * config.head_dim * e / t
    kv = max(config.num_kv_heads / t, 1) * config.head_dim * e  # each rank has a head, if need be a copy
    attention = q + 2 * kv + q + 4 * config.num_heads / t  # q, k, v, result, logarithms
    if scores:
        attention = _count_reference(config, recompute, q, kv, scores, t)
    inner = config.ffn_size * e / t
    if recompute == "selective":  # results of products, of attention and of collectives
        kept = 2 * hidden + attention + inner * (2 if llama else 1) + (2 * gathered if s > 1 else 0)
        return kept + (hidden if config.dropout and t > 1 and not llama else 0)  # the last sum, on its way to bias and mask
    attention += q + kv if fused and llama else 0
    statistics = 2 * (4 if llama else 8) / s
    masks = 2 * config.hidden_size / s if config.dropout else 0
    return 2 * (hidden + gathered) + attention + inner * (2 if not llama else 3 if triton else 4) + statistics + masks


def _count_reference(config: ModelConfig, recompute: str, q: float, kv: float, scores: int, tensor_parallel: int) -> float:
    """Attention by its reference: q, k and v in fp32 with a copy of k and v per head, scores and shares, result, logarithms."""
    heads = config.num_heads / tensor_parallel
    wide = 4 * heads * config.head_dim
    if recompute == "selective":  # q, k, v, and the results of both products, in fp32
        return q + 2 * kv + wide + 4 * heads * scores
    return 3 * wide + q + 4 * heads + 8 * heads * scores


def count_block_waiting(config: ModelConfig, element_bytes: int, tensor_parallel: int = 1) -> float:
    """Bytes per token of one block on one rank whose weight gradients wait (Qi et al. 2023): the linear layers' inputs x and
    output gradients dy, whatever was recomputed. Sequence parallelism gathers what it has cut: these are whole.
    """
    t, e = tensor_parallel, element_bytes
    hidden, q, inner = config.hidden_size * e, config.num_heads * config.head_dim * e / t, config.ffn_size * e / t
    kv = max(config.num_kv_heads / t, 1) * config.head_dim * e
    x = hidden + q + hidden + inner  # of q, k and v; of out; of up (and gate); of down
    return x + q + 2 * kv + hidden + inner * (2 if config.architecture == "llama" else 1) + hidden  # dy, in the same order


def count_head_waiting(config: ModelConfig, element_bytes: int, tensor_parallel: int = 1) -> float:
    """Bytes per token of the head on one rank whose weight gradient waits: its input and the logits' gradient."""
    return (config.hidden_size + config.vocab_size / tensor_parallel) * element_bytes


def count_head_activations(
    config: ModelConfig,
    element_bytes: int,
    tensor_parallel: int = 1,
    sequence_parallel: bool = False,
    triton: bool = False,
) -> float:
    """Bytes per token that the last norm, the head and the loss keep on one rank.

    The loss keeps fp32 probabilities over the vocabulary; with `triton` (kernels.cross_entropy) the logits as they are.
    """
    s = tensor_parallel if sequence_parallel else 1
    statistics = (4 if config.architecture == "llama" else 8) / s
    per_logit = element_bytes if triton else 4
    return config.hidden_size * element_bytes * (1 + 1 / s) + statistics + per_logit * config.vocab_size / tensor_parallel
