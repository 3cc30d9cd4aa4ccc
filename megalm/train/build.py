"""The one meeting place: a plain model, a plan, a topology and an engine become a job that can train.

Everything below this file knows either the model or the cluster, not both. Read `build_job` from top to bottom.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from megalm.config.run import RunConfig
from megalm.data.corpus import Corpus
from megalm.data.loader import Batch, Loader
from megalm.data.packing import GPTDataset
from megalm.errors import ConfigError, Problem
from megalm.models.decoder import Decoder
from megalm.models.init import NoInitialisation, initial_value
from megalm.models.layers import Dropout, FusesProjections
from megalm.models.plans import PLANS, TIED
from megalm.models.registry import build_model
from megalm.models.router import Router, routers_of
from megalm.objectives.language_modeling import causal_loss
from megalm.optim.adam import build_optimizer
from megalm.optim.groups import build_groups
from megalm.parallel.context_parallel import apply_context_parallel, local_tokens
from megalm.parallel.engine import Engine, PlainEngine, Tie
from megalm.parallel.expert_parallel import apply_expert_parallel
from megalm.parallel.loss_scale import LossScale
from megalm.parallel.offload import apply_offload, build_offload
from megalm.parallel.pipeline import Forward, Hidden, PipelineExecutor, Spec
from megalm.parallel.recompute import apply_recompute
from megalm.parallel.schedules import Schedule, build_schedule, forward_only
from megalm.parallel.stages import apply_stage
from megalm.parallel.tensor_parallel import apply_tensor_parallel, local_slice, shard_of
from megalm.parallel.topology import Topology
from megalm.parallel.weight_gradients import WeightGradients
from megalm.train.forecast import layers_per_stage
from megalm.train.fused_loss import apply_fused_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


Place = Callable[[nn.Parameter], None]


@dataclass
class Job:
    """A run's parts on this rank."""

    config: RunConfig
    topology: Topology
    stages: list[int]  # this rank's, along the model
    chunks: nn.ModuleList  # the same as modules
    engine: Engine
    executor: PipelineExecutor
    evaluator: PipelineExecutor  # forwards only
    loader: Loader
    valid_batches: list[Batch]  # this rank's part of what every evaluation looks at; empty: no evaluation
    corpus: Corpus
    positions: Tensor  # the places in a sample of the tokens that this rank has, (S',) int64
    routers: dict[int, Router]  # this rank's, by layer

    @property
    def has_loss(self) -> bool:
        """Whether the last stage is here."""
        return self.executor.schedule.num_stages - 1 in self.stages


def build_job(config: RunConfig, topology: Topology, corpus: Corpus, draw: bool = True) -> Job:
    """Model -> stages -> slices -> weights -> engine -> schedule -> loaders.

    Without `draw` the weights are zeros, for a checkpoint to fill in: drawing a large model takes minutes.
    """
    parallel, dtype = config.parallel, DTYPES[config.train.precision]
    ranks, chunks_each = parallel.pipeline_parallel, parallel.chunks
    schedule = build_schedule(parallel.schedule, ranks, config.num_microbatches, chunks_each, parallel.schedule_file)
    check_reduction(config, schedule)
    queue = build_queue(config, schedule)
    stages = schedule.stages_of(topology.pipeline.rank)
    place = build_place(config, topology, dtype)
    chunks = nn.ModuleList(build_stage(config, topology, s, schedule.num_stages, dtype, draw, queue, place) for s in stages)
    share_tied(chunks)
    apply_fused_loss(chunks, config, topology, schedule)
    batch_size = config.train.global_batch_size
    eval_samples = -(-config.train.eval_samples // batch_size) * batch_size  # whole batches: the same on every layout
    eval_microbatches = config.num_microbatches * eval_samples // batch_size
    eval_schedule = forward_only(ranks, eval_microbatches, chunks_each, schedule.placement)
    split = topology.context.size * (topology.tensor.size if topology.sequence_parallel else 1)
    hidden = Spec((config.train.micro_batch_size, config.data.seq_length // split, config.model.hidden_size), dtype)
    executor, evaluator = (
        PipelineExecutor(s, topology.pipeline, lambda stage, microbatch: [hidden], topology.device, queue)
        for s in (schedule, eval_schedule)
    )
    reads = not {0, schedule.num_stages - 1}.isdisjoint(stages)
    loader = build_loader(config, topology, corpus.train, batch_size, reads)
    valid: list[Batch] = []
    if config.train.eval_every and corpus.valid:
        valid = [batch.to(topology.device) for batch in build_loader(config, topology, corpus.valid, eval_samples, reads).read(0)]
    engine = build_engine(config, topology, chunks)
    engine.buffers = dict(item for chunk in chunks for item in chunk.named_buffers())
    executor.serve(engine)
    positions = build_places(config, topology).to(topology.device)
    routers = routers_of(chunks)
    return Job(config, topology, stages, chunks, engine, executor, evaluator, loader, valid, corpus, positions, routers)


def check_reduction(config: RunConfig, schedule: Schedule) -> None:
    """Raise ConfigError for a user's schedule with halves of the backward that ZeRO's hooks would not see."""
    if config.parallel.zero_reduce == "microbatch" and schedule.splits_backward:
        rule = f"microbatch needs whole backwards (B), and {config.parallel.schedule_file} has halves (I, W)"
        raise ConfigError(Problem("parallel.zero_reduce", "microbatch", rule, "", "parallel.zero_reduce=step"))


def build_queue(config: RunConfig, schedule: Schedule) -> WeightGradients | None:
    """The queue of weight gradients, if anything makes them wait; ZeRO's hooks in the backward need them at once.

    ZeRO-3 has one too: torch's linear keeps a view of its weight for the backward, and with it the gathered weight.
    """
    parallel = config.parallel
    overlap = parallel.overlap and parallel.tensor_parallel > 1 and parallel.zero_reduce == "step"
    return WeightGradients(overlap) if overlap or schedule.splits_backward or parallel.zero == 3 else None


def share_tied(chunks: nn.ModuleList) -> None:
    """Where first and last stage are on one rank, tied embeddings are one parameter."""
    first, last = cast(Decoder, chunks[0]), cast(Decoder, chunks[-1])
    if first is not last and last.config.tie_embeddings and first.embedding is not None and last.head is not None:
        last.head.weight = first.embedding.weight


def build_stage(
    config: RunConfig,
    topology: Topology,
    stage: int,
    num_stages: int,
    dtype: torch.dtype,
    draw: bool = True,
    queue: WeightGradients | None = None,
    place: Place | None = None,
) -> nn.Module:
    """One pipeline stage, sliced for this tensor rank, with its initial weights, or zeros."""
    with torch.device("meta"), NoInitialisation():
        model = build_model(config.model)
    apply_stage(model, stage, layers_per_stage(config, num_stages))
    apply_tensor_parallel(model, PLANS[config.model.architecture], topology, queue)
    apply_context_parallel(model, topology, config.parallel.context_method)
    apply_expert_parallel(model, PLANS[config.model.architecture], topology, config.parallel.context_method)
    model.tie()
    apply_initial_weights(model, config, dtype, topology.device, draw, place)
    train = config.train
    offload = build_offload(train.offload_activations, Path(train.offload_path or train.run_dir), topology.device)
    apply_recompute(model, train.recompute, train.recompute_every, topology.tensor, train.recompute_modules, offload)
    apply_offload(model, offload)
    for module in model.modules():
        if isinstance(module, Dropout):
            module.seed = config.train.seed
        if isinstance(module, FusesProjections):  # ZeRO-3 gathers weights where a module is called, not where it is used
            module.fuse = config.kernels.fuse_projections and config.parallel.zero < 3
    return model


def apply_initial_weights(
    model: nn.Module,
    config: RunConfig,
    dtype: torch.dtype,
    device: torch.device,
    draw: bool = True,
    place: Place | None = None,
) -> None:
    """Replace every meta parameter by its slice of the initial weights, drawn by name: the same on every layout.

    Buffers begin as zeros. `place` is called with each parameter as soon as it is made.
    """
    tied = TIED if config.model.tie_embeddings else {}
    made: dict[int, nn.Parameter] = {}  # a tied parameter has two owners
    for path, module in model.named_modules():
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, leaf, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
        for leaf, empty in list(module.named_parameters(recurse=False)):
            name = f"{path}.{leaf}".lstrip(".")
            if id(empty) not in made:
                if draw:
                    part = draw_part(empty, tied.get(name, name), config, dtype, device)
                else:
                    part = torch.zeros(empty.shape, dtype=dtype, device=device)
                made[id(empty)] = nn.Parameter(part)
                made[id(empty)].shard = shard_of(empty)  # type: ignore[attr-defined]
                if place is not None:
                    place(made[id(empty)])
            setattr(module, leaf, made[id(empty)])


def draw_part(empty: nn.Parameter, name: str, config: RunConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """This rank's part of a parameter's initial value. The whole one, in fp32, is there only while this function runs.

    Of stacked experts, whose values do not depend on one another, only those that are here are drawn.
    """
    if empty.dim() == 3:
        parts = torch.empty(empty.shape, dtype=dtype, device=device)
        for index in range(len(parts)):
            expert, shard = shard_of(empty).of_expert(index)
            whole = initial_value(f"{name}.{expert}", shard.global_shape, config.model, config.train.seed)
            parts[index] = shard.slice_of(whole, tuple(empty.shape[1:]))
        return parts
    whole = initial_value(name, shard_of(empty).global_shape, config.model, config.train.seed)
    part = local_slice(empty, tuple(empty.shape), whole).to(device=device, dtype=dtype)
    in_larger = part.untyped_storage().nbytes() > part.nbytes  # a view would keep the whole alive
    return part.clone(memory_format=torch.contiguous_format) if in_larger else part.contiguous()


def named_parameters(chunks: nn.ModuleList) -> dict[str, nn.Parameter]:
    """Parameters of all chunks by name, each once, under the first name that it has."""
    found, seen = dict[str, nn.Parameter](), set[int]()
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[name] = parameter
    return found


def build_place(config: RunConfig, topology: Topology, dtype: torch.dtype) -> Place | None:
    """What becomes of a parameter once it is made: ZeRO-3 shares it out, so that no rank ever holds all of the weights."""
    if config.parallel.zero < 3:
        return None
    from megalm.parallel.zero_start import ShareOut

    return ShareOut(topology, dtype, config.parallel)


def build_engine(config: RunConfig, topology: Topology, chunks: nn.ModuleList) -> Engine:
    """Plain data parallel for zero=0, DeepSpeed (imported only then) for zero=1, 2, 3."""
    parameters = named_parameters(chunks)
    groups = build_groups(parameters, config.optim.weight_decay)
    tie = None
    if config.model.tie_embeddings and topology.pipeline.size > 1:
        ends = [Tie(name, original) for copy, original in TIED.items() for name in (copy, original)]
        held = [end for end in ends if end.name in parameters]
        here = any(stage.embedding is not None for stage in chunks) and any(stage.head is not None for stage in chunks)
        tie = held[0] if held and not here else None  # none on a middle stage, nor where both ends are one parameter

    def make_optimizer(param_groups: list[dict]) -> torch.optim.Optimizer:
        return build_optimizer(param_groups, config.optim)

    train, clip = config.train, config.optim.clip
    scale = LossScale(train.loss_scale, train.loss_scale_window) if train.precision == "fp16" else None
    if config.parallel.zero == 0:
        return PlainEngine(groups, make_optimizer, topology, clip, tie, scale, train.accumulate_fp32)
    from megalm.parallel.zero import ZeroEngine
    from megalm.parallel.zero_experts import ZeroExpertEngine

    kind = ZeroEngine if topology.expert.size == 1 else ZeroExpertEngine
    return kind(
        chunks, groups, make_optimizer, topology, clip, config.parallel, tie, scale, train.accumulate_fp32
    )


def build_loader(config: RunConfig, topology: Topology, dataset: GPTDataset, batch_size: int, reads: bool) -> Loader:
    """Only ranks with an end of the model (`reads`) read tokens; the others need the samples' numbers alone."""
    micro, batch, pinned = config.train.micro_batch_size, topology.batch, topology.device.type == "cuda"
    places = build_places(config, topology).numpy() if topology.context.size > 1 else None
    return Loader(dataset, batch_size, micro, batch.rank, batch.size, reads, pinned, places, config.data.document_mask)


def build_places(config: RunConfig, topology: Topology) -> Tensor:
    """The places in a sample of the tokens that this rank has, (S',) int64."""
    context, length = topology.context, config.data.seq_length
    return local_tokens(config.parallel.context_method, context.size, context.rank, length)


def build_forward(job: Job, batches: list[Batch], divisor: Tensor, losses: list[Tensor]) -> Forward:
    """What the executor runs: a chunk, and on the last stage the loss (sum over tokens / divisor), noted in `losses`."""
    last = job.executor.schedule.num_stages - 1
    if job.routers:  # every rank of a tensor group adds the same gradient of their losses
        microbatches = job.config.train.global_batch_size // job.config.train.micro_batch_size
        scale = job.engine.scale_loss(torch.ones((), device=job.topology.device)) / (microbatches * job.topology.tensor.size)
        for router in job.routers.values():
            router.loss_scale = scale
    chunk_of, fused = dict(zip(job.stages, job.chunks, strict=True)), job.config.kernels.fused_loss

    def forward(stage: int, microbatch: int, hidden: Hidden | None) -> Tensor:
        batch = batches[microbatch]
        x = batch.tokens if hidden is None else hidden
        assert x is not None, "the first stage reads"
        labels = batch.labels if fused and stage == last else None
        y = chunk_of[stage](x, job.positions, batch.samples, documents=batch.documents, labels=labels)
        if stage < last:
            return y
        assert batch.labels is not None, "the last stage reads"
        total = y if fused else causal_loss(y, batch.labels, job.topology.tensor, job.config.model.vocab_size)
        loss = total / divisor
        losses.append(loss.detach())
        return job.engine.scale_loss(loss)

    return forward
