"""The training loop: a step one can point at, an evaluation, and what goes around them. Everything else is a hook."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.checkpoint.state import RunState
from megalm.data.loader import Batch
from megalm.errors import HopelessError, Problem
from megalm.objectives.language_modeling import count_tokens
from megalm.optim.schedule import learning_rate
from megalm.parallel.collectives import all_reduce
from megalm.train.build import Job, build_forward

SMALLEST_SCALE = 1.0  # of the loss in fp16: below it gradients vanish where they do not overflow


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step tells; the tensors are scalars, equal on all ranks."""

    loss: Tensor  # nats per token over the global batch, before the update
    grad_norm: Tensor  # before clipping; inf if the step was skipped
    lr: float
    skipped: bool = False  # fp16: a gradient overflowed, nothing was updated
    loss_scale: float | None = None  # fp16: with which this step ran


@dataclass(frozen=True)
class Evaluation:
    """On validation samples, which are the same each time."""

    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float | None  # None: no tokenizer, so the tokens' bytes are not known


class Hook:
    """Called at the start, around every step (in the order of the list) and at the end (in reverse, also after an error)."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step."""

    def before_step(self, trainer: Trainer) -> None:
        """Before every optimizer step."""

    def before_update(self, trainer: Trainer) -> None:
        """In every step, when the gradients are reduced and nothing has changed yet."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """After every optimizer step; `trainer.state.step` counts it already."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step."""


class Trainer:
    """Runs a job from `state` to the last step."""

    def __init__(self, job: Job, state: RunState, hooks: Sequence[Hook]):
        self.job, self.state, self.hooks = job, state, list(hooks)
        self.config, self.topology, self.engine = job.config, job.topology, job.engine
        self.interrupted = False  # asked to stop (see stopping.py): the run is not done, and goes on another time

    @property
    def is_done(self) -> bool:
        """No step is left to do."""
        return self.state.step >= self.config.train.steps or self.state.stopped_early

    def fit(self) -> None:
        """Train until `train.steps`, or until a hook sets `state.stopped_early` or `interrupted`."""
        started: list[Hook] = []
        try:
            for hook in self.hooks:
                hook.on_start(self)
                started.append(hook)
            while not (self.is_done or self.interrupted):
                for hook in self.hooks:
                    hook.before_step(self)
                result = self.train_step()
                for hook in self.hooks:
                    hook.after_step(self, result)
        finally:
            for hook in reversed(started):
                hook.on_end(self)
            self.job.loader.close()

    def train_step(self) -> StepResult:
        """One optimizer step on one global batch."""
        batches = [batch.to(self.topology.device) for batch in self.job.loader.step(self.state.consumed_samples)]
        divisor, losses = self._count(batches), list[Tensor]()
        self.job.chunks.train()
        with self.engine.accumulate():
            self.job.executor.run(build_forward(self.job, batches, divisor, losses))
        for hook in self.hooks:
            hook.before_update(self)
        lr = learning_rate(self.state.step, self.config.optim, self.config.train.steps)
        scale = self.engine.loss_scale.scale if self.engine.loss_scale else None
        grad_norm = self.engine.step(lr)
        self.state.step += 1
        self.state.note_scaling(self.engine.loss_scale, self.engine.skipped)
        self.state.consumed_samples += self.config.train.global_batch_size
        self.state.consumed_tokens += self.config.train.global_batch_size * self.config.data.seq_length
        return StepResult(self._sum(losses), grad_norm, lr, self.engine.skipped, scale)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Loss on the first validation samples."""
        batches, losses = self.job.valid_batches, list[Tensor]()
        assert batches, "evaluation needs a validation split"
        self.job.chunks.eval()
        self.job.evaluator.run(build_forward(self.job, batches, self._count(batches), losses))
        total = self._sum(losses)
        dist.broadcast(total, 0)  # hooks decide by it: not one rank may see another last bit
        loss = float(total)
        return Evaluation(loss, math.exp(min(loss, 700.0)), self._bits_per_byte(batches, loss))

    def _count(self, batches: list[Batch]) -> Tensor:
        """Tokens that count in the global batch, fp32 scalar; right on the last stage, which divides by it."""
        counts = [count_tokens(batch.labels) for batch in batches if batch.labels is not None]
        total = torch.stack(counts).sum() if counts else torch.ones((), dtype=torch.int64)
        return all_reduce(total.to(self.topology.device), self.topology.data).float()

    def _sum(self, parts: list[Tensor]) -> Tensor:
        """Sum of what the last stage's ranks have, told to every stage; the others' parts do not count."""
        total = torch.stack(parts).sum() if parts else torch.zeros((), device=self.topology.device)
        if not self.job.has_loss:
            total = torch.zeros_like(total)
        return all_reduce(all_reduce(total, self.topology.data), self.topology.pipeline)

    def _bits_per_byte(self, batches: list[Batch], loss: float) -> float | None:
        """Loss per byte of text, which does not depend on the tokenizer: nats / ln 2 / bytes of the labels."""
        tokenizer = self.job.corpus.tokenizer
        if tokenizer is None:
            return None
        sizes = torch.from_numpy(tokenizer.token_bytes()).to(self.topology.device)
        labels = [batch.labels for batch in batches if batch.labels is not None]
        tokens = self._sum([count_tokens(x).float() for x in labels])
        num_bytes = self._sum([sizes[x[x >= 0]].sum().float() for x in labels])
        return loss * float(tokens) / math.log(2) / max(1.0, float(num_bytes))


def check_finite(step: int, result: StepResult) -> tuple[float, float]:
    """Loss and gradient norm as numbers. Raises HopelessError when one is not finite: the weights are no longer worth saving.

    In fp16 a step that overflowed was skipped and harmed nothing, unless the loss scale has nothing left to give.
    """
    loss, norm = torch.stack([result.loss, result.grad_norm.to(result.loss)]).tolist()  # sync
    if result.skipped and math.isfinite(loss) and result.loss_scale is not None:
        if result.loss_scale >= SMALLEST_SCALE:
            return loss, norm
        rule = f"gradients overflow fp16 even with a loss scale of {result.loss_scale}; the last checkpoint is untouched"
        raise HopelessError(Problem(f"step {step}", None, rule, "", "train.precision=bf16, or a smaller optim.lr"))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        rule = f"loss ({loss}) and gradient norm ({norm}) must stay finite; the last checkpoint is untouched"
        fix = "a smaller optim.lr, more optim.warmup_steps, or optim.clip=1.0; the same command resumes from there"
        raise HopelessError(Problem(f"step {step}", None, rule, "", fix))
    return loss, norm


def as_record(step: int, evaluation: Evaluation) -> dict[str, float | int | None]:
    """One line of metrics.jsonl."""
    return {"step": step, **{f"valid_{key}": value for key, value in asdict(evaluation).items()}}
