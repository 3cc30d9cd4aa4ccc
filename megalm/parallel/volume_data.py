"""What goes over the copies of the model in a step, and what the norm of the gradients needs: one formula per ZeRO stage.

Stages 1 to 3 are DeepSpeed's. It reduces in buckets of `BUCKET_ELEMENTS`: bytes are exact always, the number of calls as long
as no single parameter is larger than a bucket.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from megalm.config.run import RunConfig
from megalm.config.train import ITEM_BYTES
from megalm.parallel.actions import FORWARD, WEIGHT, Schedule
from megalm.parallel.memory import BUCKET_ELEMENTS
from megalm.parallel.volume_parts import Call, Part

FLAT_BUCKET_ELEMENTS = 500_000_000  # of DeepSpeed's bf16 optimizer
ALIGNMENT = 2  # DeepSpeed pads a flat group to a multiple of this x the copies


def data_parallel_calls(config: RunConfig, schedule: Schedule, rank: int, parts: Mapping[int, Sequence[Part]]) -> Iterator[Call]:
    """Gradients, weights and the gradients' norm, in one step."""
    held = [part for stage in parts.values() for part in stage]
    groups = [group for group in _groups(held) if group]
    stage, in_backward = config.parallel.zero, config.parallel.zero_reduce == "microbatch"
    if stage == 0:
        yield from (Call("data", "all_reduce", 1, sum(p.numel for p in group) * 4) for group in groups)
        yield Call("model", "all_reduce", 1, 8)  # fp64
        return
    if is_flat_bf16(config):
        yield from _flat_reductions(groups, config)
    else:  # in the backward gradients come from the last layer to the first
        whole = [part for group in groups for part in group]
        reduced = [parts[s][::-1] for s in _backwards(schedule, rank)] if in_backward else [whole]
        limit = min(BUCKET_ELEMENTS, sum(p.numel for p in held))
        yield from (call for gradients in reduced for call in _reductions(gradients, config, limit))
    yield from _overflow(config)
    yield from _norm(config, len(groups))
    if stage == 3:
        yield from (Call("data", "all_gather", 1, size) for size in gathers(config, schedule, rank, parts))
        return
    for group in groups:  # the new weights
        yield Call("data", "all_gather", 1, _aligned(group, config) * ITEM_BYTES[config.train.precision])


def _aligned(group: Sequence[Part], config: RunConfig) -> int:
    """Elements of a flat group, padded so that it divides among the copies."""
    unit = ALIGNMENT * config.data_parallel
    return -(-sum(p.numel for p in group) // unit) * unit


def _groups(parts: Sequence[Part]) -> tuple[list[Part], list[Part]]:
    """With weight decay, and without."""
    return [p for p in parts if p.is_matrix], [p for p in parts if not p.is_matrix]


def _backwards(schedule: Schedule, rank: int) -> list[int]:
    """The stage of each backward, in order."""
    return [action.stage for action in schedule.actions[rank] if action.kind not in (FORWARD, WEIGHT)]


def _reductions(parts: Sequence[Part], config: RunConfig, limit: int) -> Iterator[Call]:
    """One reduction in buckets: an all-reduce in stages 1 and 2 (DeepSpeed's choice), a reduce-scatter in stage 3. fp32."""
    copies, scatters = config.data_parallel, config.parallel.zero == 3
    bucket, numel = 0, 0
    operation = "reduce_scatter" if scatters else "all_reduce"
    for part in parts:
        if bucket and bucket + part.numel > limit:
            yield Call("data", operation, 1, numel * 4)
            bucket, numel = 0, 0
        bucket += part.numel
        numel += _padded(part, copies) if scatters else part.numel
    yield Call("data", operation, 1, numel * 4)


def _flat_reductions(groups: Sequence[Sequence[Part]], config: RunConfig) -> Iterator[Call]:
    """bf16 ZeRO-1 sends its flat groups as they are, padding included, in fp32; a call ends once it has enough."""
    numel = 0
    for group in groups:
        sizes = [part.numel for part in group]
        sizes[-1] += _aligned(group, config) - sum(sizes)
        for size in sizes:
            numel += size
            if numel > FLAT_BUCKET_ELEMENTS:
                yield Call("data", "all_reduce", 1, numel * 4)
                numel = 0
    if numel:
        yield Call("data", "all_reduce", 1, numel * 4)


def _padded(part: Part, copies: int) -> int:
    return -(-part.numel // copies) * copies


def _overflow(config: RunConfig) -> Iterator[Call]:
    """A flag of one byte, where DeepSpeed looks for gradients that are not finite."""
    precision, stage = config.train.precision, config.parallel.zero
    if precision == "fp16" or (precision == "bf16" and stage < 3 and not is_flat_bf16(config)):
        yield Call("data", "all_reduce", 1, 1)
        yield Call("model", "all_reduce", 1, 1)


def _norm(config: RunConfig, groups: int) -> Iterator[Call]:
    """Squares, summed over the copies' shares and over the model: per group of parameters; stage 3 in fp64."""
    if is_flat_bf16(config):  # every copy has all gradients
        yield Call("model", "all_reduce", 1, 4)
        return
    size = 8 if config.parallel.zero == 3 else 4
    yield Call("data", "all_reduce", groups, size)
    yield Call("model", "all_reduce", groups, size)


def is_flat_bf16(config: RunConfig) -> bool:
    """Whether DeepSpeed runs its optimizer for bf16 with flat fp32 gradients."""
    train = config.train
    return config.parallel.zero == 1 and train.precision == "bf16" and train.accumulate_fp32


def gathers(config: RunConfig, schedule: Schedule, rank: int, parts: Mapping[int, Sequence[Part]]) -> Iterator[int]:
    """ZeRO-3: the bytes of each gathering of weights: a module's, when a forward or a backward enters it."""
    copies, item = config.data_parallel, ITEM_BYTES[config.train.precision]
    modules = {stage: _modules(held) for stage, held in parts.items()}
    _share_tied(config, modules)
    for action in schedule.actions[rank]:
        held = modules[action.stage] if action.kind != WEIGHT else {}
        for path in _entered(list(held), action.kind == FORWARD, config):
            yield sum(_padded(part, copies) for part in held[path]) * item


def _entered(paths: list[str], forward: bool, config: RunConfig) -> Iterator[str]:
    """The modules that one action enters.

    The backward of a block that is recomputed runs its forward again. Without dropout its last module, where the backward
    begins, asks for that; it has been entered then, and the second forward stops in it.
    """
    if forward:
        yield from paths
        return
    last = {".".join(path.split(".")[:2]): path for path in paths}
    for path in paths:
        is_last = path in last.values()
        yield path
        if is_recomputed(path, config) and (config.model.dropout or not is_last):
            yield path


def is_recomputed(path: str, config: RunConfig) -> bool:
    """Whether a module is (in) a block whose forward the backward repeats."""
    train = config.train
    return train.recompute != "none" and path.startswith("layers.") and int(path.split(".")[1]) % train.recompute_every == 0


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
