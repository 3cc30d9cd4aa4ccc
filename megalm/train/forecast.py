"""What follows from a configuration before anything runs, without torch: layers per stage, and memory per rank.

Here the model's counts (models/count.py) meet the cluster's (split.py, memory.py, the schedules).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from megalm.config.machine import uses_cuda
from megalm.config.run import RunConfig
from megalm.config.stage_split import AUTO, explicit_split
from megalm.config.train import ITEM_BYTES
from megalm.models.count import (
    count_block_activations,
    count_block_waiting,
    count_head_activations,
    count_head_waiting,
    count_stage_flops_per_token,
    count_stage_parameters,
)
from megalm.parallel.memory import ModelStates, model_states
from megalm.parallel.schedules import BACKWARD, FORWARD, INPUT, WEIGHT, Schedule, build_schedule
from megalm.parallel.split import Cost, balanced_split, even_split, layers_of_stage
from megalm.parallel.timeline import held

_STEADY = 4  # microbatches per rank after which a schedule holds no more activations than before
_MANY = 1024  # microbatches of an interleaved schedule that is still quick to build


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank: model states, and activations where the schedule holds most of them."""

    states: ModelStates
    activations: float

    @property
    def total(self) -> float:
        """What the device must hold, without temporary buffers."""
        return self.states.on_device + self.activations


def layers_per_stage(config: RunConfig, num_stages: int) -> list[int]:
    """Layers of each stage along the model, as `parallel.stage_split` says; one stage has them all.

    auto: the slowest stage is as fast as it can be; of equals, the one that needs most memory needs as little as it can.
    """
    layers, wanted = config.model.num_layers, config.parallel.stage_split
    if num_stages == 1:
        return [layers]
    if wanted == AUTO:
        return balanced_split(layers, num_stages, [_work(config, num_stages), _memory(config, num_stages)])
    return list(explicit_split(wanted) or even_split(layers, num_stages))


def predict_memory(config: RunConfig) -> list[RankMemory]:
    """Of each rank of the pipeline."""
    schedule, times = _schedule(config)
    split = layers_per_stage(config, schedule.num_stages)
    stages = [layers_of_stage(stage, split) for stage in range(schedule.num_stages)]
    weights = [
        _weights(_kept(config, stage, layers, len(stages)), _waiting(config, stage, len(layers), len(stages)))
        for stage, layers in enumerate(stages)
    ]
    again = 0.0  # while one block's backward runs, all of it is there
    if config.train.recompute != "none":
        again = max(_kept_by_block(config, "none") - _kept_by_block(config, config.train.recompute), 0.0)
    ranks = []
    for rank, actions in enumerate(schedule.actions):
        most = times * max(held(actions, weights), default=0.0)
        parameters = sum(_parameters(config, s, len(stages[s]), len(stages)) for s in schedule.stages_of(rank))
        ranks.append(RankMemory(_states(config, parameters), most + again))
    return ranks


def _schedule(config: RunConfig) -> tuple[Schedule, int]:
    """A schedule that holds as much as the configured one, if need be so many times over, with fewer microbatches."""
    parallel, count = config.parallel, config.num_microbatches
    name, ranks, times = parallel.schedule, parallel.pipeline_parallel, 1
    if name == "csv":
        return build_schedule(name, ranks, count, parallel.chunks, parallel.schedule_file), 1
    if name in ("gpipe", "bfs"):  # all forwards first: they hold every microbatch
        count, times = 1, count
    elif name == "interleaved":  # its rounds decide, which a remainder makes longer: keep it, and rounds enough to share it
        count = min(count, max(ranks, _MANY // ranks) * ranks + count % ranks)
    else:
        count = min(count, _STEADY * ranks)
    return _build(name, ranks, count, parallel.chunks), times


_build = lru_cache(maxsize=4)(build_schedule)


def _weights(kept: float, waiting: float) -> Mapping[str, float]:
    """Bytes that each kind of action adds: a forward keeps, the input's half leaves the weights' half what it waits with."""
    return {FORWARD: kept, BACKWARD: -kept, INPUT: waiting - kept, WEIGHT: -waiting}


def _work(config: RunConfig, num_stages: int) -> Cost:
    """FLOPs of a stage for one token; blocks that are recomputed run forward twice."""
    block = count_stage_flops_per_token(config.model, config.data.seq_length, 1, False)
    head = count_stage_flops_per_token(config.model, config.data.seq_length, 0, True)

    def cost(stage: int, layers: range) -> float:
        again = sum(_mode(config, i) == "full" for i in layers)
        return len(layers) * block + again * block / 3 + (head if stage == num_stages - 1 else 0)

    return cost


def _memory(config: RunConfig, num_stages: int) -> Cost:
    """Bytes of a stage: its states, and the activations that the schedule lets it hold at once."""
    schedule, times = _schedule(config)
    assert schedule.num_stages == num_stages, f"the schedule has {schedule.num_stages} stages, not {num_stages}"
    moments = _fullest_moments(schedule)

    def cost(stage: int, layers: range) -> float:
        states = _states(config, _parameters(config, stage, len(layers), num_stages))
        kept, waiting = _kept(config, stage, layers, num_stages), _waiting(config, stage, len(layers), num_stages)
        return states.on_device + times * max((n * kept + m * waiting for n, m in moments[stage]), default=0.0)

    return cost


def _fullest_moments(schedule: Schedule) -> list[list[tuple[float, float]]]:
    """By stage: (microbatches kept, microbatches whose weight gradients wait), where no other moment has more of both."""
    kinds = [_weights(1, 0)] * schedule.num_stages, [_weights(0, 1)] * schedule.num_stages
    found = []
    for stage in range(schedule.num_stages):
        actions = [action for action in schedule.actions[schedule.rank_of(stage)] if action.stage == stage]
        moments = set(zip(*(held(actions, weights) for weights in kinds), strict=True))
        found.append([(n, m) for n, m in moments if not any(a >= n and b >= m and (a, b) != (n, m) for a, b in moments)])
    return found


def _parameters(config: RunConfig, stage: int, num_layers: int, num_stages: int) -> int:
    """On one tensor parallel rank; norms, which every rank has whole, are too few to matter."""
    whole = count_stage_parameters(config.model, num_layers, stage == 0, stage == num_stages - 1)
    return -(-whole // config.parallel.tensor_parallel)


def _states(config: RunConfig, parameters: int) -> ModelStates:
    parallel, train = config.parallel, config.train
    return model_states(
        parameters,
        config.data_parallel,
        parallel.zero,
        train.precision,
        in_backward=parallel.zero > 0 and parallel.zero_reduce == "microbatch",
        accumulate_fp32=train.accumulate_fp32,
        offload=parallel.zero > 0 and parallel.zero_offload != "none",
    )


def _mode(config: RunConfig, layer: int) -> str:
    """How a block is recomputed."""
    return config.train.recompute if layer % config.train.recompute_every == 0 else "none"


def _kept_by_block(config: RunConfig, mode: str) -> float:
    """Bytes that one block keeps of one microbatch."""
    parallel, fused = config.parallel, config.kernels.fuse_projections and config.parallel.zero < 3
    sizes = (ITEM_BYTES[config.train.precision], parallel.tensor_parallel, parallel.sequence_parallel)
    scores = config.data.seq_length if config.kernels.attention == "reference" else 0
    triton = _on_triton(config, "swiglu")
    return count_block_activations(config.model, mode, *sizes, fused=fused, triton=triton, scores=scores) * _tokens(config)


def _on_triton(config: RunConfig, operation: str) -> bool:
    """Whether an operation will run as a Triton kernel: asked for, or left to a machine that has a GPU."""
    wish = config.kernels.operations()[operation]
    wish = config.kernels.backend if wish == "auto" else wish
    return wish == "triton" or (wish != "torch" and uses_cuda(config))


def _tokens(config: RunConfig) -> int:
    """Of one microbatch."""
    return config.train.micro_batch_size * config.data.seq_length


def _waiting(config: RunConfig, stage: int, num_layers: int, num_stages: int) -> float:
    """Bytes that wait with a stage's weight gradients of one microbatch."""
    sizes = (ITEM_BYTES[config.train.precision], config.parallel.tensor_parallel)
    head = count_head_waiting(config.model, *sizes) if stage == num_stages - 1 else 0.0
    return (num_layers * count_block_waiting(config.model, *sizes) + head) * _tokens(config)


def _kept(config: RunConfig, stage: int, layers: range, num_stages: int) -> float:
    """Bytes that a stage keeps of one microbatch, with the head's."""
    again = sum(_mode(config, i) == config.train.recompute for i in layers)
    kept = again * _kept_by_block(config, config.train.recompute) + (len(layers) - again) * _kept_by_block(config, "none")
    if stage == num_stages - 1:
        parallel, precision = config.parallel, config.train.precision
        sizes = (ITEM_BYTES[precision], parallel.tensor_parallel, parallel.sequence_parallel)
        kept += count_head_activations(config.model, *sizes, triton=_on_triton(config, "cross_entropy")) * _tokens(config)
    return kept
