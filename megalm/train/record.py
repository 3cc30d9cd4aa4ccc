"""`train.record=FOLDER`: what every module computed in one step, by name, so that two runs can be compared module by module.

Each rank writes `rank-N.pt`: a list of `Piece`s. A piece is a part of a whole that one rank would have computed: it has the
numbers of its samples and its place in the sequence and among the features, so that layouts can be compared whatever they
split. Recorded are, of the step `train.record_step`:

    output            of every module that is called with a batch
    output gradient   of the same, as it comes back in the backward, without the engine's scaling of the loss
    gradient          of every parameter, reduced over all ranks, before clipping
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megalm.errors import writing
from megalm.log import log
from megalm.parallel.tensor_parallel import ColumnParallelLinear, shard_of
from megalm.train.trainer import Hook, StepResult, Trainer

OUTPUT, OUTPUT_GRADIENT, GRADIENT = "output", "output gradient", "gradient"


@dataclass
class Piece:
    """A part of a whole. Modules: value (B, S', F') of the samples; parameters: the local slice, and no samples."""

    name: str
    kind: str
    value: Tensor  # fp32, on the CPU
    start: tuple[int, ...]  # of its place in the whole: (S, F), or the parameter's dims
    samples: list[int]


class Recording(Hook):
    """Watches one step through hooks on every module; the other steps run as without it."""

    def __init__(self, folder: Path, step: int):
        self.folder, self.step = folder, step

    def on_start(self, trainer: Trainer) -> None:
        if trainer.state.step >= self.step:
            log(f"no record: this run goes on after step {trainer.state.step}, and train.record_step is {self.step}")
        self.pieces: list[Piece] = []
        self.seen: set[tuple[str, str, tuple[int, ...]]] = set()
        self.samples: list[int] | None = None  # of the microbatch that is in a forward now
        self.handles: list[RemovableHandle] = []
        self.trainer = trainer
        for chunk in trainer.job.chunks:
            self.handles += [
                chunk.register_forward_pre_hook(self._enter, with_kwargs=True),
                chunk.register_forward_hook(self._leave),
            ]
            for name, module in chunk.named_modules():
                if name:  # in front of tensor parallelism's own hook, which gathers a norm's output for the next layer
                    self.handles.append(module.register_forward_hook(partial(self._note_output, name), prepend=True))

    def before_update(self, trainer: Trainer) -> None:
        if trainer.state.step + 1 != self.step:
            return
        engine = trainer.engine
        for name, parameter in engine.parameters.items():
            gradient, shard = engine.gradient(name), shard_of(parameter)  # collective
            if engine.replicas(name).is_first:
                self.pieces.append(Piece(engine.saved_name(name), GRADIENT, _copy(shard.real(gradient)), shard.offset, []))

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.state.step == self.step:
            with writing(self.folder, "train.record"):
                self.folder.mkdir(parents=True, exist_ok=True)
                torch.save([vars(piece) for piece in self.pieces], self.folder / f"rank-{trainer.topology.rank}.pt")

    def on_end(self, trainer: Trainer) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter(self, chunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        samples = kwargs.get("samples", args[2] if len(args) > 2 else None)
        if chunk.training and self.trainer.state.step + 1 == self.step and samples is not None:
            self.samples = samples.tolist()

    def _leave(self, chunk: nn.Module, args: object, y: object) -> None:
        self.samples = None  # what a backward computes again is not recorded a second time

    def _note_output(self, name: str, module: nn.Module, args: object, y: object) -> None:
        """Forward hook. Of a recomputed module only the output has a gradient: the first time, nothing inside it has."""
        if self.samples is None or not isinstance(y, Tensor) or y.dim() != 3:  # a table of positions has no samples
            return
        samples, (feature, padding, is_partial) = self.samples, _features(module)
        place = partial(self._add, name, places=self._places(y), feature=feature, padding=padding, samples=samples)
        place(OUTPUT, y)
        if y.requires_grad and not is_partial:
            scale = float(self.trainer.engine.scale_loss(torch.ones(())))  # sync
            y.register_hook(lambda gradient: place(OUTPUT_GRADIENT, gradient / scale))

    def _places(self, y: Tensor) -> Tensor:
        """The places in their samples of y's tokens, which may be a slice of this rank's."""
        places, tensor = self.trainer.job.positions.cpu(), self.trainer.topology.tensor
        return places if y.shape[1] == len(places) else places.chunk(tensor.size)[tensor.rank]

    def _add(
        self, name: str, kind: str, x: Tensor, places: Tensor, feature: int, padding: int, samples: list[int]
    ) -> None:
        key = name, kind, tuple(samples)
        if key in self.seen:  # a backward in two halves passes twice
            return
        self.seen.add(key)
        x, begin = x[..., : x.shape[-1] - padding], 0
        for end in [*((places.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(places)]:  # of runs without a gap
            self.pieces.append(Piece(name, kind, _copy(x[:, begin:end]), (int(places[begin]), feature), samples))
            begin = end


def _features(module: nn.Module) -> tuple[int, int, bool]:
    """A module's first feature, its padded features, and whether its output's gradient is one of several parts."""
    if not isinstance(module, ColumnParallelLinear):
        return 0, 0, getattr(module, "partial_output_gradient", False)
    shard = shard_of(module.weight)
    return shard.start, shard.padding, shard.is_partial


def _copy(x: Tensor) -> Tensor:
    return x.detach().float().cpu().clone()


def read_pieces(folder: Path) -> list[Piece]:
    """What all ranks of a run have recorded."""
    files = sorted(folder.glob("rank-*.pt"))
    return [Piece(**fields) for file in files for fields in torch.load(file, weights_only=True)]
