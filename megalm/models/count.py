"""Parameters, FLOPs and activations of a model, from its configuration alone. The only place that counts them.

Standard MFU = (6 N_matmul + 3 L h S) tokens/s / dense bf16 peak: N_matmul are the parameters that a token is multiplied with (no
embedding look-up; of experts those that it goes to), the second term is attention counted once for the causal mask (h = query
heads x the widths of key and value), forward 1 and backward 2 parts, no recomputation. A sliding window shortens S.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from megalm.config.model import ModelConfig
from megalm.models.activations import Setting, block_tape, head_tape
from megalm.models.shapes import block_shapes, stage_shapes

EVERYTHING = frozenset({"rms_norm", "layer_norm", "rotary", "swiglu", "cross_entropy"})


def count_block_parameters(config: ModelConfig, layer: int = 0) -> int:
    """Matrix parameters of one block that a token is multiplied with, without biases and norms."""
    total = 0
    for _, shape in block_shapes(config, layer):
        if len(shape) == 3:  # all experts, stacked
            total += config.experts_per_token * math.prod(shape[1:])
        elif len(shape) == 2:
            total += math.prod(shape)
    return total


def count_matmul_parameters(config: ModelConfig) -> int:
    """Parameters that a token is multiplied with: all blocks and the head."""
    return sum(_by_kind(config, range(config.num_layers), count_block_parameters)) + config.vocab_size * config.hidden_size


def count_stage_parameters(config: ModelConfig, layers: range, first: bool, last: bool) -> int:
    """All parameters of a part of the model: blocks, the embeddings if it is the first part, norm and head if the last."""
    ends = sum(math.prod(shape) for shape in stage_shapes(config, range(0), first, last).values())
    return ends + sum(_by_kind(config, layers, _all_of_block))


def count_expert_parameters(config: ModelConfig, layers: range) -> int:
    """Those of routed experts, which expert parallelism deals out."""
    return sum(_by_kind(config, layers, lambda c, i: sum(math.prod(s) for _, s in block_shapes(c, i) if len(s) == 3)))


def count_parameters(config: ModelConfig) -> int:
    """All parameters of the model."""
    return count_stage_parameters(config, range(config.num_layers), True, True)


def count_stage_flops_per_token(config: ModelConfig, seq_length: int, layers: range, last: bool) -> float:
    """FLOPs of forward and backward of a part of the model for one token; only the last part's head counts beside blocks."""
    keys = min(config.window + 1, seq_length) if config.window else seq_length
    twice_seen = 2 * keys - keys**2 / seq_length  # tokens that a token sees on average, counted twice: without a window S
    attention = 3 * config.num_heads * (config.head_dim + (config.value_head_dim or config.head_dim)) * twice_seen
    head = config.vocab_size * config.hidden_size if last else 0
    return 6 * (sum(_by_kind(config, layers, count_block_parameters)) + head) + len(layers) * attention


def count_flops_per_token(config: ModelConfig, seq_length: int) -> float:
    """FLOPs of forward and backward for one token in a causal sequence of `seq_length`."""
    return count_stage_flops_per_token(config, seq_length, range(config.num_layers), True)


def _all_of_block(config: ModelConfig, layer: int) -> int:
    return sum(math.prod(shape) for _, shape in block_shapes(config, layer))


def _by_kind(config: ModelConfig, layers: range, count: Callable[[ModelConfig, int], int]) -> list[int]:
    """How much the dense blocks and those with experts have, each counted once."""
    kinds = [[i for i in layers if config.has_experts(i) == experts] for experts in (False, True)]
    return [len(kind) * count(config, kind[0]) for kind in kinds if kind]


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

    As Korthikanti et al. 2022, equations 1 to 4 and 6, for our operations: attention keeps no score matrix but its result and
    fp32 logarithms of sums (flash attention), the masks of dropout are 1 byte, and norms, one kernel each, keep fp32 statistics.
    `fused` (kernels.fuse_projections): rotary turns copies of q and k, and the product they lie in stays for v's sake.
    `triton` (kernels.swiglu): the kernel computes silu(gate) again in the backward; torch's operators keep it.
    `scores` (kernels.attention=reference): of how many keys attention keeps the scores after all.
    """
    setting = Setting(
        element_bytes, 1, 1, tensor_parallel, sequence_parallel, fused, EVERYTHING if triton else frozenset(), True, scores
    )
    return block_tape(config, setting).profile(recompute).kept


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
    setting = Setting(element_bytes, 1, 1, tensor_parallel, sequence_parallel, cuda=True)
    return head_tape(config, setting, "triton" if triton else "torch").profile().kept
