"""What follows from a configuration before anything runs, without torch: layers per stage, and peak memory per rank.

Here what each stage needs (stage_memory.py) meets the order in which the schedule runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from megalm.config.run import RunConfig
from megalm.config.stage_split import AUTO, explicit_split
from megalm.config.train import ITEM_BYTES
from megalm.models.count import count_stage_flops_per_token
from megalm.parallel.actions import Action
from megalm.parallel.memory import ModelStates
from megalm.parallel.schedules import BACKWARD, FORWARD, INPUT, WEIGHT, Schedule, build_schedule
from megalm.parallel.split import Cost, balanced_split, even_split, layers_of_stage
from megalm.parallel.timeline import held, losses_in_flight
from megalm.train.stage_memory import BlockMemory, StageMemory, held_by

_STEADY = 4  # microbatches per rank after which a schedule holds no more activations than before
SENDS_KEPT = 4  # parallel/pipeline.py waits for older ones
_MANY = 1024  # microbatches of an interleaved schedule that is still quick to build


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank at the fullest moment of a step."""

    states: ModelStates
    activations: float  # kept from forwards to backwards, where the schedule holds most of them
    temporary: float  # what the fullest moment needs besides: a block's backward, the loss, what is on its way to other stages

    @property
    def total(self) -> float:
        """What the device must hold at once."""
        return self.states.on_device + self.activations + self.temporary


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
    count, blocks = schedule.num_stages, BlockMemory(config, losses_in_flight(schedule) * times == 1)
    split = layers_per_stage(config, count)
    layers = [layers_of_stage(stage, split) for stage in range(count)]
    memory = [blocks.stage(layers[stage], stage == 0, stage == count - 1) for stage in range(count)]
    weights = [_weights(stage.kept, stage.waiting) for stage in memory]
    ranks = []
    for rank, actions in enumerate(schedule.actions):
        stages = schedule.stages_of(rank)
        levels = [times * level for level in held(actions, weights)]
        kept = max(levels, default=0.0)
        peak = max((_reached(*at, memory, times) for at in zip(actions, [0.0, *levels], strict=False)), default=0.0)
        peak += _on_its_way(schedule, rank) * blocks.setting.tokens * _hidden_bytes(config)
        weights_here = held_by(config, [layers[s] for s in stages], stages, count)
        ranks.append(RankMemory(weights_here.states, kept, max(peak, weights_here.step) - kept))
    return ranks


def describe_memory(config: RunConfig) -> str:
    """One line: the rank that needs most, of what this consists, and what the ranks of the other stages need."""
    ranks = predict_memory(config)
    most = max(ranks, key=lambda rank: rank.total)
    states = most.states
    optimizer = states.masters + states.moments - states.offloaded
    parts: dict[str, float] = {"weights": states.weights, "gradients": states.gradients + states.buckets, "optimizer": optimizer}
    parts |= {"activations": most.activations, "temporary": most.temporary}
    shares = ", ".join(f"{name} {size / 2**30:.3g}" for name, size in parts.items())
    totals = ", ".join(f"{rank.total / 2**30:.3g}" for rank in ranks)
    others = f"; pipeline ranks: {totals}" if len(ranks) > 1 else ""
    return f"memory: about {most.total / 2**30:.3g} GiB at the peak of the fullest rank ({shares}){others}"


def _reached(action: Action, before: float, memory: list[StageMemory], times: int) -> float:
    """The most within an action, which begins with `before`. times: such actions in a row, of which the last reaches most."""
    stage = memory[action.stage]
    if action.kind == FORWARD:
        return before + (times - 1) * stage.kept + stage.forward
    return before + (0.0 if action.kind == WEIGHT else stage.backward)


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
    length, train = config.data.seq_length, config.train

    def cost(stage: int, layers: range) -> float:
        again = [i for i in layers if train.recompute == "full" and i % train.recompute_every == 0]
        flops = [count_stage_flops_per_token(config.model, length, range(i, i + 1), False) for i in layers]
        head = count_stage_flops_per_token(config.model, length, range(0), True) if stage == num_stages - 1 else 0.0
        return sum(flops) + sum(flops[i - layers.start] for i in again) / 3 + head

    return cost


def _memory(config: RunConfig, num_stages: int) -> Cost:
    """Bytes of a stage: its states, and the activations that the schedule lets it hold at once."""
    schedule, times = _schedule(config)
    assert schedule.num_stages == num_stages, f"the schedule has {schedule.num_stages} stages, not {num_stages}"
    moments, blocks = _fullest_moments(schedule), BlockMemory(config)

    def cost(stage: int, layers: range) -> float:
        states = held_by(config, [layers], [stage], num_stages).states
        needs = blocks.stage(layers, stage == 0, stage == num_stages - 1)
        return states.on_device + times * max((n * needs.kept + m * needs.waiting for n, m in moments[stage]), default=0.0)

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


def _on_its_way(schedule: Schedule, rank: int) -> int:
    """Hidden states or gradients that are there for a neighbouring stage's sake: sent and not waited for, or received early."""
    if schedule.num_ranks == 1:
        return 0
    sent = sum(1 for action in schedule.actions[rank] if schedule.output_of(action) is not None)
    return min(sent, SENDS_KEPT) + 1


def _hidden_bytes(config: RunConfig) -> float:
    """Of one token, between stages."""
    split = config.parallel.tensor_parallel if config.parallel.sequence_parallel else 1
    return config.model.hidden_size * ITEM_BYTES[config.train.precision] / split
