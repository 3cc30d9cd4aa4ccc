"""The rules about ZeRO and the precision of training."""

from __future__ import annotations

from megalm.config.fixes import Change, Rule, divisors, needs
from megalm.config.machine import replicas, uses_cuda
from megalm.config.parallel import SPLIT_BACKWARD
from megalm.config.run import RunConfig

_ZERO, _REDUCE, _OFFLOAD, _PATH, _NODE, _QUANTIZED = (
    f"parallel.zero{name}" for name in ("", "_reduce", "_offload", "_offload_path", "_node_size", "_quantized")
)
_PP, _SCHEDULE, _PRECISION = "parallel.pipeline_parallel", "parallel.schedule", "train.precision"
_EP = "parallel.expert_parallel"
_FOLDER = "offload"  # proposed where a folder is missing


def _in_backward(c: RunConfig) -> bool:
    return c.parallel.zero_reduce == "microbatch"


def _is_fp16(c: RunConfig) -> bool:
    return c.train.precision == "fp16"


def _nodes_fit(c: RunConfig) -> bool:
    size = c.parallel.zero_node_size
    return size == 0 or (size > 1 and replicas(c) % size == 0)


def _node_changes(c: RunConfig) -> list[Change]:
    return [change for change in divisors(c, _NODE, replicas(c)) if change[1] > 1] + [(_NODE, 0)]


RULES: tuple[Rule, ...] = (
    needs(
        "microbatch_zero",
        _REDUCE,
        "step",
        _ZERO,
        lambda c: c.parallel.zero >= 2,
        (_ZERO, 2),
        f"{_REDUCE}=microbatch needs {_ZERO}=2 or 3: with less, every rank keeps whole gradients",
    ),
    Rule(
        "microbatch_tied",
        (_REDUCE, "model.tie_embeddings", _PP),
        f"{_REDUCE}=microbatch reduces a gradient before the other end of the pipeline has added its part of a tied embedding",
        lambda c: not (_in_backward(c) and c.model.tie_embeddings and c.parallel.pipeline_parallel > 1),
        lambda c: [(_REDUCE, "step"), (_PP, 1), ("model.tie_embeddings", False)],
    ),
    Rule(
        "microbatch_whole_backward",
        (_REDUCE, _SCHEDULE),
        f"{_REDUCE}=microbatch needs gradients in the backward; {', '.join(SPLIT_BACKWARD)} compute those of weights later",
        lambda c: not (_in_backward(c) and c.parallel.schedule in SPLIT_BACKWARD),
        lambda c: [(_REDUCE, "step"), (_SCHEDULE, "interleaved" if c.parallel.chunks > 1 else "1f1b")],
    ),
    needs(
        "offload_zero",
        _OFFLOAD,
        "none",
        _ZERO,
        lambda c: c.parallel.zero >= 1,
        (_ZERO, 1),
        f"{_OFFLOAD} needs {_ZERO}=1, 2 or 3",
    ),
    Rule(
        "nvme_zero3",
        (_OFFLOAD, _ZERO),
        f"{_OFFLOAD}=nvme needs {_ZERO}=3",
        lambda c: c.parallel.zero_offload != "nvme" or c.parallel.zero == 3,
        lambda c: [(_OFFLOAD, "cpu"), (_ZERO, 3), (_OFFLOAD, "none")],
    ),
    Rule(
        "nvme_path",
        (_OFFLOAD, _PATH),
        f"{_OFFLOAD}=nvme needs {_PATH}, a folder on that disk",
        lambda c: c.parallel.zero_offload != "nvme" or bool(c.parallel.zero_offload_path),
        lambda c: [(_PATH, _FOLDER), (_OFFLOAD, "cpu")],
    ),
    needs(
        "nvme_path_used",
        _PATH,
        "",
        _OFFLOAD,
        lambda c: c.parallel.zero_offload == "nvme",
        (_OFFLOAD, "nvme"),
        f"{_PATH} has an effect with {_OFFLOAD}=nvme only",
    ),
    needs(
        "node_size_zero3",
        _NODE,
        0,
        _ZERO,
        lambda c: c.parallel.zero == 3,
        (_ZERO, 3),
        f"{_NODE} has an effect with {_ZERO}=3 only",
    ),
    Rule(
        "node_size_divides",
        (_NODE, "ranks with the same weights"),
        f"{_NODE} must be 2 or more and divide the ranks with the same weights (data x context parallel)",
        _nodes_fit,
        _node_changes,
    ),
    Rule(
        "node_size_experts",
        (_NODE, _EP),
        f"{_NODE} needs {_EP}=1: DeepSpeed knows one kind of node groups, and the ranks that have the same experts are others",
        lambda c: not c.parallel.zero_node_size or c.parallel.expert_parallel == 1,
        lambda c: [(_NODE, 0), (_EP, 1)],
    ),
    needs(
        "quantized_zero3",
        _QUANTIZED,
        False,
        _ZERO,
        lambda c: c.parallel.zero == 3,
        (_ZERO, 3),
        f"{_QUANTIZED} has an effect with {_ZERO}=3 only",
    ),
    Rule(
        "quantized_gpu",
        (_QUANTIZED, "cluster.device"),
        f"{_QUANTIZED} needs GPUs: its kernels are CUDA",
        lambda c: not c.parallel.zero_quantized or uses_cuda(c),
        lambda c: [(_QUANTIZED, False)],
    ),
    Rule(
        "quantized_experts",
        (_QUANTIZED, _EP),
        f"{_QUANTIZED} needs {_EP}=1: DeepSpeed sends quantized gradients over all ranks, and experts have fewer",
        lambda c: not c.parallel.zero_quantized or c.parallel.expert_parallel == 1,
        lambda c: [(_QUANTIZED, False), (_EP, 1)],
    ),
    Rule(
        "fp16_zero_device",
        (_PRECISION, _ZERO, "cluster.device"),
        f"{_PRECISION}=fp16 with {_ZERO} >= 1 needs GPUs: DeepSpeed refuses fp16 on a CPU",
        lambda c: not _is_fp16(c) or c.parallel.zero == 0 or uses_cuda(c),
        lambda c: [(_PRECISION, "bf16"), (_ZERO, 0)],
    ),
    needs(
        "loss_scale_used",
        "train.loss_scale",
        65536.0,
        _PRECISION,
        _is_fp16,
        (_PRECISION, "fp16"),
        f"train.loss_scale has an effect with {_PRECISION}=fp16 only",
    ),
    needs(
        "loss_scale_window_used",
        "train.loss_scale_window",
        1000,
        _PRECISION,
        _is_fp16,
        (_PRECISION, "fp16"),
        f"train.loss_scale_window has an effect with {_PRECISION}=fp16 only",
    ),
    needs(
        "accumulation_used",
        "train.accumulate_fp32",
        True,
        _PRECISION,
        lambda c: c.train.precision != "fp32",
        (_PRECISION, "bf16"),
        f"train.accumulate_fp32=false has no effect with {_PRECISION}=fp32",
    ),
    needs(
        "fuse_gathered",
        "kernels.fuse_projections",
        False,
        _ZERO,
        lambda c: c.parallel.zero < 3,
        (_ZERO, 2),
        f"kernels.fuse_projections has no effect with {_ZERO}=3, which gathers weights layer by layer",
    ),
)
