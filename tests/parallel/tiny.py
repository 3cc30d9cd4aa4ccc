"""What the tests of the cluster share: small configurations, a topology without processes, and a short training loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.config.optim import OptimConfig
from megalm.config.parallel import ParallelConfig
from megalm.config.run import RunConfig
from megalm.config.train import TrainConfig
from megalm.objectives.language_modeling import causal_loss
from megalm.optim.adam import build_optimizer
from megalm.optim.groups import build_groups
from megalm.parallel.engine import MOMENTS, WEIGHT, Engine, ParameterGroup, PlainEngine
from megalm.parallel.pipeline import PipelineExecutor, Spec
from megalm.parallel.schedules import build_schedule
from megalm.parallel.tensor_parallel import local_slice
from megalm.parallel.topology import Group, Topology, build_topology, tensor_topology
from megalm.train.build import DTYPES, build_engine, build_place, build_queue, build_stage, share_tied

SEQ_LENGTH, VOCAB = 8, 32
LR = 1e-2


def alone() -> Topology:
    """One rank, no process group."""
    return tensor_topology(Group((0,), 0), torch.device("cpu"))


def tiny_config(
    architecture: str = "llama", tied: bool = False, layers: int = 2, precision: str = "fp32", batch: int = 8, **parallel
) -> RunConfig:
    """Grouped-query heads that divide by 4, clipping that bites, and weights large enough that every gradient counts."""
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_heads": 8, "num_kv_heads": 4, "ffn_size": 48}
    return RunConfig(
        model=ModelConfig(
            architecture=architecture, num_layers=layers, tie_embeddings=tied, init_std=0.2, max_seq_length=16, **shape
        ),
        parallel=ParallelConfig(**parallel),
        # A large eps: Adam would turn the last bit of a gradient that is nearly zero into a whole step.
        optim=OptimConfig(clip=0.5, weight_decay=0.1, eps=1e-3),
        train=TrainConfig(global_batch_size=batch, micro_batch_size=1, precision=precision),
    )


def whole_model(config: RunConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of one rank."""
    return build_stage(config, alone(), 0, 1, dtype)


def samples(step: int, count: int) -> Tensor:
    """The tokens of one global batch, (count, S + 1) int64."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(VOCAB, (count, SEQ_LENGTH + 1), generator=generator)


def loss_of(model: nn.Module, tokens: Tensor, topology: Topology, config: RunConfig | None = None) -> Tensor:
    """Sum over the tokens. tokens (B, S + 1)."""
    vocab_size = config.model.vocab_size if config else VOCAB
    return causal_loss(model(tokens[:, :-1]), tokens[:, 1:], topology.tensor, vocab_size)


@dataclass
class Trained:
    """What a short run leaves behind on one rank."""

    losses: list[float]
    norms: list[float]
    engine: Engine

    def weights(self) -> dict[str, Tensor]:
        return {name: self.engine.read(name, "weight").clone() for name in self.engine.parameters}


def train(config: RunConfig, topology: Topology | None = None, steps: int = 3) -> Trained:
    """`steps` optimizer steps on the layout of `config`. Collective; `topology` is made from the config if not given."""
    topology = topology or build_topology(config.parallel, torch.device("cpu"))
    size, dtype = topology.pipeline.size, DTYPES[config.train.precision]
    microbatches = config.train.global_batch_size // topology.data.size
    schedule = build_schedule(config.parallel.schedule, size, microbatches, config.parallel.chunks)
    stages, queue = schedule.num_stages, build_queue(config, schedule)
    mine = schedule.stages_of(topology.pipeline.rank)
    place = build_place(config, topology, dtype)
    chunks = nn.ModuleList(build_stage(config, topology, stage, stages, dtype, queue=queue, place=place) for stage in mine)
    share_tied(chunks)
    engine = build_engine(config, topology, chunks)
    split = topology.tensor.size if topology.sequence_parallel else 1
    hidden = Spec((1, SEQ_LENGTH // split, config.model.hidden_size), dtype)
    executor = PipelineExecutor(schedule, topology.pipeline, lambda s, m: [hidden], topology.device, queue)
    executor.serve(engine)
    trained, divisor = Trained([], [], engine), config.train.global_batch_size * SEQ_LENGTH
    for step in range(steps):
        batch = samples(step, config.train.global_batch_size).chunk(topology.data.size)[topology.data.rank]
        losses = list[Tensor]()

        def forward(stage: int, microbatch: int, hidden: Tensor | None, batch=batch, losses=losses) -> Tensor:
            tokens = batch[microbatch : microbatch + 1]
            y = chunks[mine.index(stage)](tokens[:, :-1] if hidden is None else hidden, torch.arange(SEQ_LENGTH))
            if stage < stages - 1:
                return y
            losses.append(causal_loss(y, tokens[:, 1:], topology.tensor, config.model.vocab_size) / divisor)
            return engine.scale_loss(losses[-1])

        with engine.accumulate():
            executor.run(forward)
        trained.norms.append(engine.step(LR).item())
        trained.losses.append(sum(loss.item() for loss in losses))
    return trained


def difference_from_whole(trained: Trained, whole: dict[str, Tensor]) -> float:
    """Largest difference of this rank's weights from its slices of the whole model's."""
    weights, engine = trained.weights(), trained.engine
    return max(
        (value - local_slice(engine.parameters[name], engine.shapes[name], whole[name])).abs().max().item()
        for name, value in weights.items()
        if engine.saved_name(name) == name
    )


# --- a model without parallelism, for the engines alone ---------------------------------------------------------------

TOY_SAMPLES, TOY_MICROBATCHES = 12, 3


class Toy(nn.Module):
    """Sizes are odd, so that no buffer divides by the number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))


def toy_groups(model: nn.Module) -> list[ParameterGroup]:
    """Matrices decay, the rest does not, in an order that is not the model's."""
    return [group for group in reversed(build_groups(dict(model.named_parameters()), 0.1)) if group.parameters]


def toy_engine(
    parallel: ParallelConfig, dtype: torch.dtype, topology: Topology, clip: float = 0.5, model: nn.Module | None = None
) -> tuple[nn.Module, Engine]:
    """A toy and the engine of `parallel.zero` for it."""
    model = (model or Toy()).to(dtype)
    groups = toy_groups(model)
    if parallel.zero == 0:
        return model, PlainEngine(groups, adamw, topology, clip)
    from megalm.parallel.zero import ZeroEngine  # DeepSpeed takes seconds to load

    return model, ZeroEngine(nn.ModuleList([model]), groups, adamw, topology, clip, parallel)


def adamw(param_groups: list[dict]) -> torch.optim.Optimizer:
    return build_optimizer(param_groups, OptimConfig())


def toy_losses(model: nn.Module, step: int, dtype: torch.dtype, rank: int = 0, size: int = 1) -> Iterator[Tensor]:
    """The loss of each of this rank's microbatches: over all ranks they add up to the mean over the global batch."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(TOY_SAMPLES, 5, generator=generator).to(dtype)
    for part in x.chunk(size)[rank].chunk(TOY_MICROBATCHES):
        yield model(part).float().square().sum() / TOY_SAMPLES


def toy_step(engine: Engine, model: nn.Module, step: int) -> tuple[float, float]:
    """One optimizer step: this rank's share of the loss, and the global norm."""
    total, data = 0.0, engine.topology.data
    dtype = next(iter(engine.parameters.values())).dtype
    with engine.accumulate():
        for loss in toy_losses(model, step, dtype, data.rank, data.size):
            engine.before_backward()
            engine.scale_loss(loss).backward()
            engine.after_backward()
            total += loss.item()
    return total, engine.step(LR).item()


def state_of(engine: Engine) -> dict[tuple[str, str], Tensor]:
    """Everything a checkpoint reads."""
    return {(n, k): engine.read(n, k).clone() for n in engine.parameters for k in (WEIGHT, *MOMENTS)}


def load_state(engine: Engine, state: dict[tuple[str, str], Tensor], steps_done: int) -> None:
    engine.prepare_load(steps_done)
    for (name, kind), value in state.items():
        engine.write(name, kind, value)
    engine.finish_load()
