"""The one meeting place: a plain model, a plan, a topology and an engine become a job that can train.

Everything below this file knows either the model or the cluster, not both. Read `build_job` from top to bottom.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalm.config.run import RunConfig
from megalm.data.corpus import Corpus
from megalm.data.loader import Batch, Loader
from megalm.data.packing import GPTDataset
from megalm.models.init import initial_value
from megalm.models.layers import Dropout
from megalm.models.plans import PLANS, TIED
from megalm.models.registry import build_model
from megalm.objectives.language_modeling import causal_loss
from megalm.optim.adam import build_optimizer
from megalm.optim.groups import build_groups
from megalm.parallel.engine import Engine, PlainEngine, Tie
from megalm.parallel.pipeline import Forward, PipelineExecutor
from megalm.parallel.schedules import SCHEDULES, forward_only
from megalm.parallel.stages import apply_stage
from megalm.parallel.tensor_parallel import apply_tensor_parallel, local_slice, shard_of
from megalm.parallel.topology import Topology

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Job:
    """A run's parts on this rank."""

    config: RunConfig
    topology: Topology
    chunks: nn.ModuleList  # this rank's stages
    engine: Engine
    executor: PipelineExecutor
    evaluator: PipelineExecutor  # forwards only
    loader: Loader
    valid_batches: list[Batch]  # this rank's part of what every evaluation looks at; empty: no evaluation
    corpus: Corpus


def build_job(config: RunConfig, topology: Topology, corpus: Corpus, draw: bool = True) -> Job:
    """Model -> stages -> slices -> weights -> engine -> schedule -> loaders.

    Without `draw` the weights are zeros, for a checkpoint to fill in: drawing a large model takes minutes.
    """
    parallel, dtype = config.parallel, DTYPES[config.train.precision]
    stages = parallel.pipeline_parallel * parallel.chunks
    chunks = nn.ModuleList(
        build_stage(config, topology, chunk * parallel.pipeline_parallel + topology.pipeline.rank, stages, dtype, draw)
        for chunk in range(parallel.chunks)
    )
    batch_size = config.train.global_batch_size
    eval_samples = -(-config.train.eval_samples // batch_size) * batch_size  # whole batches: the same on every layout
    eval_microbatches = config.num_microbatches * eval_samples // batch_size
    schedule = SCHEDULES[parallel.schedule](parallel.pipeline_parallel, config.num_microbatches, parallel.chunks)
    eval_schedule = forward_only(parallel.pipeline_parallel, eval_microbatches, parallel.chunks)
    split = topology.tensor.size if topology.sequence_parallel else 1
    hidden = (config.train.micro_batch_size, config.data.seq_length // split, config.model.hidden_size)
    executor, evaluator = (
        PipelineExecutor(s, topology.pipeline, hidden, dtype, topology.device) for s in (schedule, eval_schedule)
    )
    loader = build_loader(config, topology, corpus.train, batch_size)
    valid: list[Batch] = []
    if config.train.eval_every and corpus.valid:
        valid = [batch.to(topology.device) for batch in build_loader(config, topology, corpus.valid, eval_samples).read(0)]
    engine = build_engine(config, topology, chunks)
    return Job(config, topology, chunks, engine, executor, evaluator, loader, valid, corpus)


def build_stage(
    config: RunConfig, topology: Topology, stage: int, num_stages: int, dtype: torch.dtype, draw: bool = True
) -> nn.Module:
    """One pipeline stage, sliced for this tensor rank, with its initial weights, or zeros."""
    with torch.device("meta"):
        model = build_model(config.model)
    apply_stage(model, stage, num_stages)
    apply_tensor_parallel(model, PLANS[config.model.architecture], topology)
    model.tie()
    apply_initial_weights(model, config, dtype, topology.device, draw)
    for module in model.modules():
        if isinstance(module, Dropout):
            module.seed = config.train.seed
    return model


def apply_initial_weights(
    model: nn.Module, config: RunConfig, dtype: torch.dtype, device: torch.device, draw: bool = True
) -> None:
    """Replace every meta parameter by its slice of the initial weights, drawn by name: the same on every layout."""
    tied = TIED if config.model.tie_embeddings else {}
    made: dict[int, nn.Parameter] = {}  # a tied parameter has two owners
    for path, module in model.named_modules():
        for leaf, empty in list(module.named_parameters(recurse=False)):
            name = f"{path}.{leaf}".lstrip(".")
            if id(empty) not in made:
                shard = shard_of(empty)
                part = torch.zeros(empty.shape)
                if draw:
                    whole = initial_value(tied.get(name, name), shard.global_shape, config.model, config.train.seed)
                    part = local_slice(empty, tuple(empty.shape), whole)
                made[id(empty)] = nn.Parameter(part.to(device=device, dtype=dtype, copy=True).contiguous())
                made[id(empty)].shard = shard  # type: ignore[attr-defined]
            setattr(module, leaf, made[id(empty)])


def build_engine(config: RunConfig, topology: Topology, chunks: nn.ModuleList) -> Engine:
    """Plain data parallel for zero=0, DeepSpeed (imported only then) for zero=1, 2, 3."""
    parameters = {name: p for chunk in chunks for name, p in chunk.named_parameters()}
    groups = build_groups(parameters, config.optim.weight_decay)
    tie = None
    if config.model.tie_embeddings and topology.pipeline.size > 1:
        ends = [Tie(name, original) for copy, original in TIED.items() for name in (copy, original)]
        tie = next((end for end in ends if end.name in parameters), None)  # none on a middle stage

    def make_optimizer(param_groups: list[dict]) -> torch.optim.Optimizer:
        return build_optimizer(param_groups, config.optim)

    if config.parallel.zero == 0:
        return PlainEngine(groups, make_optimizer, topology, config.optim.clip, tie)
    from megalm.parallel.zero import ZeroEngine

    return ZeroEngine(
        chunks, groups, make_optimizer, topology, config.optim.clip, config.parallel.zero, tie
    )


def build_loader(config: RunConfig, topology: Topology, dataset: GPTDataset, batch_size: int) -> Loader:
    """Only the ends of the pipeline read tokens; the other stages need the samples' numbers alone."""
    reads = topology.pipeline.is_first or topology.pipeline.is_last
    micro, data, pinned = config.train.micro_batch_size, topology.data, topology.device.type == "cuda"
    return Loader(dataset, batch_size, micro, data.rank, data.size, reads, pinned)


def build_forward(job: Job, batches: list[Batch], divisor: Tensor, losses: list[Tensor]) -> Forward:
    """What the executor runs: a chunk, and on the last stage the loss (sum over tokens / divisor), noted in `losses`."""
    device, last = job.topology.device, job.executor.schedule.num_stages - 1
    positions = torch.arange(job.config.data.seq_length, device=device)

    def forward(stage: int, microbatch: int, hidden: Tensor | None) -> Tensor:
        batch = batches[microbatch]
        x = batch.tokens if hidden is None else hidden
        assert x is not None, "the first stage reads"
        y = job.chunks[stage // job.topology.pipeline.size](x, positions, batch.samples)
        if stage < last:
            return y
        assert batch.labels is not None, "the last stage reads"
        loss = causal_loss(y, batch.labels, job.topology.tensor) / divisor
        losses.append(loss.detach())
        return job.engine.scale_loss(loss)

    return forward
