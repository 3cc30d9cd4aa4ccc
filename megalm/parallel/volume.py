"""What one optimizer step sends, from the configuration alone: calls and bytes by group and operation, for one rank.

The formulae of the communication ledger (ledger.py), which counts the same in the real run; tests hold the two equal to the
byte. `predict` puts together one part per axis, and reads like the step: tensor parallel inside forward and backward,
context and experts there too (volume_tokens.py), pipeline between stages, the sum of partial gradients, the copies
(volume_data.py), norm and loss.

Bytes are those of the largest buffer that a rank hands in or gets back in a call: the whole tensor of an all-reduce, what an
all-gather makes, what a reduce-scatter takes. `wire_bytes` turns them into what a ring algorithm sends.

    B microbatch size, S sequence, E hidden, V vocabulary, d bytes per activation, t tensor ranks, m microbatches
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from megalm.config.run import RunConfig
from megalm.config.train import ITEM_BYTES
from megalm.parallel.actions import Schedule
from megalm.parallel.volume_data import data_parallel_calls
from megalm.parallel.volume_parts import Call, Part, is_repeated
from megalm.parallel.volume_tokens import token_calls


class Count(NamedTuple):
    """How often, and how many bytes in all."""

    calls: int
    bytes: int
    exact: bool = True  # of a formula: whether it says how many bytes, not what an even choice of experts gives


Volume = dict[tuple[str, str], Count]
"""(group, operation) -> what one rank does there in one optimizer step."""


def add_up(calls: Iterable[Call]) -> Volume:
    """Sum calls of the same group and operation; what was not called is left out."""
    volume: Volume = {}
    for group, operation, times, size, exact in calls:
        if times:
            so_far = volume.get((group, operation), Count(0, 0))
            volume[group, operation] = Count(so_far.calls + times, so_far.bytes + times * size, so_far.exact and exact)
    return dict(sorted(volume.items()))


def wire_bytes(operation: str, size: int, ranks: int) -> float:
    """What one rank sends for `size` bytes with a ring algorithm; a receiver and a barrier send nothing."""
    share = (ranks - 1) / ranks
    factors = {"all_reduce": 2 * share, "recv": 0.0, "barrier": 0.0}
    factors |= dict.fromkeys(("all_gather", "reduce_scatter", "all_to_all"), share)
    return factors.get(operation, 1.0) * size


def group_sizes(config: RunConfig, schedule: Schedule) -> dict[str, int]:
    """Ranks in each group; in a group of one nothing is sent."""
    parallel = config.parallel
    ends_apart = schedule.rank_of(0) != schedule.rank_of(schedule.num_stages - 1)
    return {
        "tensor": parallel.tensor_parallel,
        "pipeline": parallel.pipeline_parallel,
        "data": config.replicas,
        "context": parallel.context_parallel,
        "expert": parallel.expert_parallel,
        "expert_data": config.replicas // parallel.expert_parallel,
        "model": parallel.model_parallel,
        "embedding": 2 if ends_apart else 1,
        "world": parallel.model_parallel * config.replicas,
    }


def is_covered(config: RunConfig) -> bool:
    """Whether there are formulae: not for ZeRO with offload, hierarchical partition or quantised communication."""
    parallel = config.parallel
    return parallel.zero_offload == "none" and not parallel.zero_node_size and not parallel.zero_quantized


def predict(config: RunConfig, schedule: Schedule, rank: int, parts: Mapping[int, Sequence[Part]]) -> Volume:
    """The volume of one step on pipeline rank `rank`, whose stages hold `parts` (of one tensor parallel rank)."""
    assert is_covered(config), "ask is_covered first"
    calls = [*_tensor(config, parts), *_pipeline(config, schedule, rank), *_sums_within_a_copy(config, parts)]
    calls += [call for held in parts.values() for call in token_calls(config, held)]
    calls += [*data_parallel_calls(config, schedule, rank, parts), *_reports()]
    sizes = group_sizes(config, schedule)
    return add_up(call for call in calls if sizes[call.group] > 1)


def activation_bytes(config: RunConfig) -> int:
    """One microbatch's hidden state, of all tokens that the rank has."""
    return config.local_tokens * config.model.hidden_size * ITEM_BYTES[config.train.precision]


def _tensor(config: RunConfig, parts: Mapping[int, Sequence[Part]]) -> Iterator[Call]:
    """f at each norm, g behind each row layer and the embedding: once per microbatch, on the way there or on the way back.

    f is an all-reduce in the backward, g one in the forward; with sequence parallelism each is a pair of all-gather and
    reduce-scatter, one in the forward and one in the backward. The loss sums (T,) and (2, T) in fp32.
    """
    count, size = config.num_microbatches, activation_bytes(config)
    for held in parts.values():
        paths = [part.path for part in held]
        f = sum(path.endswith((".attention_norm", ".mlp_norm")) for path in dict.fromkeys(paths)) + ("norm" in paths)
        g = f - ("norm" in paths) + ("embedding" in paths)  # at the end of what each of a block's norms begins
        f_again, g_again = _forward_again(config, paths)
        if config.parallel.sequence_parallel:
            yield Call("tensor", "all_gather", count * (f + g + f_again), size)
            yield Call("tensor", "reduce_scatter", count * (f + g + g_again), size)
        else:
            yield Call("tensor", "all_reduce", count * (f + g + g_again), size)
        if "norm" in paths:
            yield Call("tensor", "all_reduce", count, config.local_tokens * 4)
            yield Call("tensor", "all_reduce", count, 2 * config.local_tokens * 4)


def _forward_again(config: RunConfig, paths: Sequence[str]) -> tuple[int, int]:
    """f and g in the forwards that the backward repeats. Selective recomputation keeps what collectives gave, and what `modules`
    repeats lies between them.

    The second forward ends with the last thing that the backward needs: without dropout that lies in front of a block's last g.
    """
    blocks = {path.split(".")[1] for path in paths if is_repeated(path, config)}
    again = len(blocks) if config.train.recompute == "full" else 0
    return 2 * again, (2 if config.model.dropout else 1) * again


def _pipeline(config: RunConfig, schedule: Schedule, rank: int) -> Iterator[Call]:
    """An activation or its gradient over each boundary between two ranks; with sequence parallelism 1/t of it."""
    size = activation_bytes(config) // (config.parallel.tensor_parallel if config.parallel.sequence_parallel else 1)
    for action in schedule.actions[rank]:
        sent, received = schedule.output_of(action), schedule.input_of(action)
        if sent is not None and schedule.rank_of(sent.target) != rank:
            yield Call("pipeline", "send", 1, size)
        if received is not None and schedule.rank_of(received.source) != rank:
            yield Call("pipeline", "recv", 1, size)


def _sums_within_a_copy(config: RunConfig, parts: Mapping[int, Sequence[Part]]) -> Iterator[Call]:
    """Gradients that arise in parts over the tensor group (one call for all of them), and those of tied embeddings."""
    held = [part for stage in parts.values() for part in stage]
    size = ITEM_BYTES["fp32" if config.train.accumulate_fp32 else config.train.precision]
    partial = [part.partial for part in held if part.partial]
    if config.parallel.zero and config.parallel.zero_reduce == "microbatch":  # in hooks, each on its own, in each backward
        yield from (Call("tensor", "all_reduce", config.num_microbatches, p * size) for p in partial)
    elif partial:
        yield Call("tensor", "all_reduce", 1, sum(partial) * size)
    ends = [part for part in held if part.path in ("embedding", "head")]
    if config.model.tie_embeddings and len(ends) == 1:
        yield Call("embedding", "all_reduce", 1, ends[0].numel * size)


def _reports() -> Iterator[Call]:
    """Around the step: how many tokens count (int64), and the loss (fp32) from the last stage to all ranks."""
    yield Call("data", "all_reduce", 1, 8)
    yield Call("data", "all_reduce", 1, 4)
    yield Call("pipeline", "all_reduce", 1, 4)
