"""What goes over the copies of the weights in a step, and what the norm of the gradients needs: one formula per ZeRO stage.

Experts that are dealt out have fewer copies than all else and a group of their own, `expert_data`; under ZeRO an engine of their
own too (zero_experts.py).

Stages 1 to 3 are DeepSpeed's. It reduces in buckets of `BUCKET_ELEMENTS`: bytes are exact always, the number of calls as long
as no single parameter is larger than a bucket.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from megalm.config.run import RunConfig
from megalm.config.train import ITEM_BYTES
from megalm.parallel.actions import FORWARD, WEIGHT, Schedule
from megalm.parallel.memory import BUCKET_ELEMENTS
from megalm.parallel.volume_parts import Call, Part, is_repeated, repeated_with

FLAT_BUCKET_ELEMENTS = 500_000_000  # of DeepSpeed's bf16 optimizer
ALIGNMENT = 2  # DeepSpeed pads a flat group to a multiple of this x the copies


_NOTHING = Part("nothing", 1, False)


class Kind(NamedTuple):
    """Weights that the same ranks have copies of."""

    group: str
    copies: int
    parts: Mapping[int, Sequence[Part]]  # by stage

    @property
    def whole(self) -> list[Part]:
        """All of them."""
        return [part for stage in self.parts.values() for part in stage]

    @property
    def groups(self) -> list[list[Part]]:
        """With weight decay, and without; an empty one is left out."""
        found = [[p for p in self.whole if p.is_matrix is decays] for decays in (True, False)]
        return [group for group in found if group]

    def aligned(self, group: Sequence[Part]) -> int:
        """Elements of a flat group, padded so that it divides among the copies."""
        unit = ALIGNMENT * self.copies
        return -(-sum(p.numel for p in group) // unit) * unit

    def padded(self, part: Part) -> int:
        """Elements of one parameter, so that it divides among the copies."""
        return -(-part.numel // self.copies) * self.copies


def kinds(config: RunConfig, parts: Mapping[int, Sequence[Part]]) -> list[Kind]:
    """The dense weights, and if they are dealt out, the experts. Where there are none, ZeRO's engine for them has a number
    without a gradient."""
    dense = {stage: [p for p in held if not p.dealt_out] for stage, held in parts.items()}
    found, dealt = [Kind("data", config.replicas, dense)], config.parallel.expert_parallel
    if dealt > 1:
        experts = {stage: [p for p in held if p.dealt_out] for stage, held in parts.items()}
        if config.parallel.zero and not any(experts.values()):
            experts[min(experts)] = [_NOTHING]
        found.append(Kind("expert_data", config.replicas // dealt, experts))
    return found


def data_parallel_calls(config: RunConfig, schedule: Schedule, rank: int, parts: Mapping[int, Sequence[Part]]) -> Iterator[Call]:
    """Gradients, weights and the gradients' norm, in one step."""
    stage, dealt = config.parallel.zero, config.parallel.expert_parallel > 1
    for kind in kinds(config, parts):
        if stage == 0:
            yield from (Call(kind.group, "all_reduce", 1, sum(p.numel for p in group) * 4) for group in kind.groups)
        else:
            yield from _partitioned(config, schedule, rank, kind)
    if stage == 3:
        yield from gathers(config, schedule, rank, parts)
    if stage == 0 or dealt:  # fp64; with ZeRO the two engines' norms are added up outside of them
        yield Call("model", "all_reduce", 1, 8)
        yield Call("expert", "all_reduce", 1, 8)
    else:
        yield from _overflow(config)
        yield from _norm_over_model(config, len(kinds(config, parts)[0].groups))


def _partitioned(config: RunConfig, schedule: Schedule, rank: int, kind: Kind) -> Iterator[Call]:
    """One engine of DeepSpeed: gradients, its own part of the norm, and in stages 1 and 2 the new weights."""
    stage, groups = config.parallel.zero, kind.groups
    if is_flat_bf16(config):
        yield from _flat_reductions(kind)
    else:  # in the backward gradients come from the last layer to the first
        ordered = [part for group in groups for part in group]
        in_backward = config.parallel.zero_reduce == "microbatch"
        reduced = [kind.parts[s][::-1] for s in _backwards(schedule, rank)] if in_backward else [ordered]
        limit = min(BUCKET_ELEMENTS, sum(p.numel for p in kind.whole))
        yield from (call for gradients in reduced for call in _reductions(gradients, kind, stage == 3, limit))
        yield Call(kind.group, "all_reduce", len(groups), _square_bytes(config))
    if stage < 3:
        for group in groups:
            yield Call(kind.group, "all_gather", 1, kind.aligned(group) * ITEM_BYTES[config.train.precision])


def _backwards(schedule: Schedule, rank: int) -> list[int]:
    """The stage of each backward, in order."""
    return [action.stage for action in schedule.actions[rank] if action.kind not in (FORWARD, WEIGHT)]


def _reductions(parts: Sequence[Part], kind: Kind, scatters: bool, limit: int) -> Iterator[Call]:
    """One reduction in buckets: an all-reduce in stages 1 and 2 (DeepSpeed's choice), a reduce-scatter in stage 3. fp32."""
    bucket, numel = 0, 0
    operation = "reduce_scatter" if scatters else "all_reduce"
    for part in parts:
        if part is _NOTHING:
            continue
        if bucket and bucket + part.numel > limit:
            yield Call(kind.group, operation, 1, numel * 4)
            bucket, numel = 0, 0
        bucket += part.numel
        numel += kind.padded(part) if scatters else part.numel
    if bucket:
        yield Call(kind.group, operation, 1, numel * 4)


def _flat_reductions(kind: Kind) -> Iterator[Call]:
    """bf16 ZeRO-1 sends its flat groups as they are, padding included, in fp32; a call ends once it has enough."""
    numel = 0
    for group in kind.groups:
        sizes = [part.numel for part in group]
        sizes[-1] += kind.aligned(group) - sum(sizes)
        for size in sizes:
            numel += size
            if numel > FLAT_BUCKET_ELEMENTS:
                yield Call(kind.group, "all_reduce", 1, numel * 4)
                numel = 0
    if numel:
        yield Call(kind.group, "all_reduce", 1, numel * 4)


def _overflow(config: RunConfig) -> Iterator[Call]:
    """A flag of one byte, where DeepSpeed looks for gradients that are not finite."""
    precision, stage = config.train.precision, config.parallel.zero
    if precision == "fp16" or (precision == "bf16" and stage < 3 and not is_flat_bf16(config)):
        yield Call("data", "all_reduce", 1, 1)
        yield Call("model", "all_reduce", 1, 1)


def _square_bytes(config: RunConfig) -> int:
    """Of a sum of squares, one per group of parameters: stage 3 in fp64."""
    return 8 if config.parallel.zero == 3 else 4


def _norm_over_model(config: RunConfig, groups: int) -> Iterator[Call]:
    """With flat fp32 gradients, which every copy has all of, one number; else one per group of parameters."""
    flat = is_flat_bf16(config)
    yield Call("model", "all_reduce", 1 if flat else groups, 4 if flat else _square_bytes(config))


def is_flat_bf16(config: RunConfig) -> bool:
    """Whether DeepSpeed runs its optimizer for bf16 with flat fp32 gradients."""
    train = config.train
    return config.parallel.zero == 1 and train.precision == "bf16" and train.accumulate_fp32


def gathers(config: RunConfig, schedule: Schedule, rank: int, parts: Mapping[int, Sequence[Part]]) -> Iterator[Call]:
    """ZeRO-3: each gathering of weights: a module's, when a forward or a backward enters it."""
    item = ITEM_BYTES[config.train.precision]
    modules = {stage: _modules(held) for stage, held in parts.items()}
    _share_tied(config, modules)
    dense, *experts = kinds(config, parts)
    for action in schedule.actions[rank]:
        held = modules[action.stage] if action.kind != WEIGHT else {}
        for path in _entered(list(held), action.kind == FORWARD, config):
            kind = experts[0] if held[path][0].dealt_out else dense
            yield Call(kind.group, "all_gather", 1, sum(kind.padded(part) for part in held[path]) * item)


def _entered(paths: list[str], forward: bool, config: RunConfig) -> Iterator[str]:
    """The modules that one action enters.

    The backward of what is recomputed runs its forward again. If its last module is where the backward begins (no dropout
    follows inside, and no sum of experts' results), that asks for it; it has been entered then, and the second forward stops in
    it.
    """
    if forward:
        yield from paths
        return
    last = {repeated_with(path, config): path for path in paths}
    for path in paths:
        begins = path in last.values() and not path.endswith(".mlp.experts")
        yield path
        if is_repeated(path, config) and ((config.model.dropout and config.train.recompute != "modules") or not begins):
            yield path


def _modules(parts: Sequence[Part]) -> dict[str, list[Part]]:
    """Parts by the module that has them."""
    modules: dict[str, list[Part]] = {}
    for part in parts:
        modules.setdefault(part.path, []).append(part)
    return modules


def _share_tied(config: RunConfig, modules: dict[int, dict[str, list[Part]]]) -> None:
    """A head without a parameter of its own uses the embedding's, if both are on this rank."""
    for stage in modules.values():
        if "norm" in stage and "head" not in stage:
            stage["head"] = next(held["embedding"] for held in modules.values() if "embedding" in held)
