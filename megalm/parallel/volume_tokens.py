"""What attention and experts exchange in a step where other ranks have the tokens or the experts: one formula per method.

    n ranks share a sample, S' = S / n; Hkv key/value heads of a tensor rank (with latent attention all of its heads), D head_dim,
    d bytes per activation; per layer and microbatch:

    ring      keys and values go n - 1 hops in the forward and n - 1 in the backward, the sums of their gradients n, in fp32:
              2 B S' Hkv D numbers each, sent and received
    ulysses   two all-to-alls in the forward, two in the backward: q, k and v together, and the result
    experts   one all-to-all of N counts, and of the rows k B S' one to the experts and one back, twice again in the backward.
              How many rows go where is the router's choice: the bytes are those of an even one. A rank that gets more has a
              larger buffer, one that gets fewer has that of what it sends: nothing dropped, what is counted is never less.

A forward that recomputation repeats exchanges again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megalm.config.run import RunConfig
from megalm.config.train import ITEM_BYTES
from megalm.parallel.volume_parts import Call, Part, is_repeated

_COUNT = 8  # bytes of an int64


def token_calls(config: RunConfig, parts: Sequence[Part]) -> Iterator[Call]:
    """Of one stage in one optimizer step."""
    paths = list(dict.fromkeys(part.path for part in parts))
    for path in paths:
        if path.endswith(".attention.out") and config.parallel.context_parallel > 1:
            yield from _attention(config, _forwards(path, config))
        if path.endswith(".mlp.experts"):
            yield from _router(config, _forwards(path, config))
            yield from _experts(config, _forwards(path, config))


def _forwards(path: str, config: RunConfig) -> int:
    return config.num_microbatches * (2 if is_repeated(path, config) else 1)


def _attention(config: RunConfig, forwards: int) -> Iterator[Call]:
    model, ranks, backwards = config.model, config.parallel.context_parallel, config.num_microbatches
    heads = model.num_heads // config.parallel.tensor_parallel
    pairs = heads if model.kv_latent_size else max(1, model.num_kv_heads // config.parallel.tensor_parallel)
    item, per_head = ITEM_BYTES[config.train.precision], config.local_tokens * model.head_dim
    if config.parallel.context_method == "ring":
        for operation in ("send", "recv"):
            yield Call("context", operation, (forwards + backwards) * (ranks - 1), 2 * pairs * per_head * item)
            yield Call("context", operation, backwards * ranks, 2 * pairs * per_head * ITEM_BYTES["fp32"])
        return
    pairs *= max(1, ranks // pairs)  # where there are fewer than ranks, each goes to several
    yield Call("context", "all_to_all", forwards + backwards, (heads + 2 * pairs) * per_head * item)
    yield Call("context", "all_to_all", forwards + backwards, heads * per_head * item)


def _router(config: RunConfig, forwards: int) -> Iterator[Call]:
    """Of the whole microbatch: loads, for the losses and for what is told every `log_every` steps; choices, for the capacity."""
    model, train, ranks = config.model, config.train, config.parallel.context_parallel
    told = train.ledger_step > 0 and (train.ledger_step % train.log_every == 0 or train.ledger_step == train.steps)
    if model.router_aux_loss or model.router_z_loss or told:
        yield Call("context", "all_reduce", forwards, model.num_experts * _COUNT)
    if model.capacity_factor:
        yield Call("context", "all_gather", forwards, config.local_tokens * ranks * model.experts_per_token * _COUNT)


def _experts(config: RunConfig, forwards: int) -> Iterator[Call]:
    model, backwards = config.model, config.num_microbatches
    kept = min(1.0, model.capacity_factor or 1.0)
    rows = round(config.local_tokens * model.experts_per_token * kept)
    yield Call("expert", "all_to_all", forwards, model.num_experts * _COUNT)
    size = rows * model.hidden_size * ITEM_BYTES[config.train.precision]
    yield Call("expert", "all_to_all", 2 * (forwards + backwards), size, exact=False)
