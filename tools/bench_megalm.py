"""megalm's side of `tools/bench_parallel.py`: one rank of a training, of a pipeline whose stages do nothing, or a block's MLP.

A training is what `megalm pretrain` runs between its hooks: `Trainer.train_step` on the job that `build_job` makes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from bench_turns import clocked, join_group, serve
from torch import Tensor

from megalm.checkpoint.state import RunState
from megalm.config.cluster import ClusterConfig
from megalm.config.data import DataConfig
from megalm.config.kernels import KernelsConfig
from megalm.config.model import ModelConfig
from megalm.config.optim import OptimConfig
from megalm.config.parallel import ParallelConfig
from megalm.config.run import RunConfig
from megalm.config.train import TrainConfig
from megalm.config.validate import check
from megalm.data.corpus import corpus_of
from megalm.models.registry import build_model
from megalm.parallel.pipeline import PipelineExecutor, Spec
from megalm.parallel.schedules import build_schedule
from megalm.parallel.topology import build_topology
from megalm.train.build import build_job
from megalm.train.trainer import Trainer


def run_config(spec: dict[str, Any]) -> RunConfig:
    """The run of a specification: the model and batch that both sides have, the layout, and megalm's own switches."""
    size = dict(
        architecture=spec["architecture"], num_layers=spec["layers"], hidden_size=spec["hidden"], num_heads=spec["heads"],
        ffn_size=spec["ffn"], vocab_size=spec["vocab"], max_seq_length=spec["seq"],
    )  # fmt: skip
    layout = dict(tensor_parallel=spec["tensor"], pipeline_parallel=spec["pipeline"], context_parallel=spec["context"])
    batch = dict(global_batch_size=spec["global_batch"], micro_batch_size=spec["micro_batch"])
    ranks = spec["tensor"] * spec["context"] * spec["pipeline"] * spec["data"]
    return RunConfig(
        model=ModelConfig(**size),
        parallel=ParallelConfig(**layout, **spec.get("parallel", {})),
        data=DataConfig(path=spec["corpus"], seq_length=spec["seq"], split="1,0,0"),
        optim=OptimConfig(lr=3e-4, min_lr=3e-4, schedule="constant"),
        train=TrainConfig(steps=1_000_000, **batch),
        cluster=ClusterConfig(num_processes=ranks, device="cpu"),
        kernels=KernelsConfig(**spec.get("kernels", {})),
    )


def build_training(spec: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    """Optimizer steps by the clock."""
    config = run_config(spec)
    check(config)
    join_group()
    topology = build_topology(config.parallel, torch.device("cpu"))
    corpus = corpus_of(config)
    trainer = Trainer(build_job(config, topology, corpus), RunState(data_fingerprint=corpus.fingerprint()), [])
    return clocked(lambda: trainer.train_step().loss)


def build_executor(spec: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    """CPU seconds that the executor itself takes per action: a run's on this thread, less those in what it calls.

    A stage hands on its input, one number, as its output. Taken away is what is spent within the stage's forward, within
    torch.autograd.backward, and within torch.distributed's posting of transfers and waiting for them. CPU time, because a
    rank that sleeps until its neighbour is done is not the executor's doing.
    """
    join_group()
    ranks = dist.get_world_size()
    group = build_topology(ParallelConfig(pipeline_parallel=ranks), torch.device("cpu")).pipeline
    schedule = build_schedule(spec["schedule"], ranks, spec["microbatches"], spec["chunks"])
    number = Spec((1,), torch.float32)
    executor = PipelineExecutor(schedule, group, lambda stage, microbatch: [number], torch.device("cpu"))
    actions, elsewhere = len(schedule.actions[group.rank]), [0.0]
    weight = torch.ones(1, requires_grad=True)

    @_timed_into(elsewhere)
    def forward(stage: int, microbatch: int, hidden: Any) -> Tensor:
        return weight * 1 if hidden is None else hidden.view(1)

    def run(steps: int) -> dict[str, Any]:
        dist.barrier()
        elsewhere[0] = 0.0
        with _timed_backends(elsewhere):
            clock, start = time.perf_counter(), time.thread_time()
            for _ in range(steps):
                executor.run(forward)
            seconds, clock = time.thread_time() - start, time.perf_counter() - clock
        return {"seconds": (seconds - elsewhere[0]) / steps / actions, "clock_seconds": clock / steps / actions}

    return run


def build_block(spec: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    """Forward and backward of the MLP of one block: dense, or of experts of which each token passes as many FLOPs."""
    join_group()
    torch.manual_seed(0)
    wide = spec["per_token"] * spec["expert_ffn"]
    experts = {"num_experts": spec["experts"], "experts_per_token": spec["per_token"], "expert_ffn_size": spec["expert_ffn"]}
    size = dict(num_layers=1, hidden_size=spec["hidden"], ffn_size=wide, **({} if spec["dense"] else experts))
    mlp: Any = build_model(ModelConfig(**size)).layers["0"].mlp
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x = torch.randn(1, spec["tokens"], spec["hidden"], requires_grad=True)

    def step() -> Tensor:
        mlp.zero_grad()
        y = mlp(x).sum()
        y.backward()
        return y.detach()

    return clocked(step)


def _timed_into(total: list[float]) -> Callable[[Callable], Callable]:
    """A decorator: CPU seconds of this thread within the function are added to `total`."""

    def decorate(function: Callable) -> Callable:
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                total[0] += time.thread_time() - start

        return timed

    return decorate


class _TimedWork:
    """A transfer on its way, whose waiting is counted."""

    def __init__(self, work: Any, total: list[float]):
        self.wait, self.is_completed = _timed_into(total)(work.wait), work.is_completed


@contextmanager
def _timed_backends(total: list[float]) -> Iterator[None]:
    """Within the scope, CPU seconds in the functions of torch that the executor calls are added to `total`."""
    backward, post = torch.autograd.backward, dist.batch_isend_irecv

    def post_and_watch(operations: list[Any]) -> list[Any]:
        return [_TimedWork(work, total) for work in _timed_into(total)(post)(operations)]

    torch.autograd.backward, dist.batch_isend_irecv = _timed_into(total)(backward), post_and_watch  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.backward, dist.batch_isend_irecv = backward, post


def build(spec: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    """What the specification's `kind` says."""
    return {"training": build_training, "executor": build_executor, "block": build_block}[spec["kind"]](spec)


if __name__ == "__main__":
    sys.exit(serve(build))
