"""The meeting place: what a rank gets follows from the config, and a run's seeds reach every part of it."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist

from megalm.config.parallel import ParallelConfig
from megalm.config.run import RunConfig
from megalm.data.corpus import open_corpus
from megalm.errors import ConfigError
from megalm.models.init import initial_value
from megalm.models.layers import Dropout
from megalm.parallel.engine import PlainEngine
from megalm.parallel.schedules import build_schedule
from megalm.parallel.topology import build_topology
from megalm.train.build import Job, build_job, build_stage, check_reduction


@pytest.fixture
def job(make):
    """A job on one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def build(changes: dict | None = None) -> Job:
        config = make("run", changes)
        return build_job(config, build_topology(config.parallel, torch.device("cpu")), open_corpus(config.data, 300))

    return build


def test_weights_are_drawn_by_name_from_the_runs_seed(job) -> None:
    built = job({"train.seed": 42})
    (stage,) = built.chunks
    for name, parameter in stage.named_parameters():
        expected = initial_value(name, tuple(parameter.shape), built.config.model, 42)
        assert torch.equal(parameter, expected), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_meta_tensor_is_left_and_all_have_the_precision(precision: str, job) -> None:
    (stage,) = job({"train.precision": precision, "model.tie_embeddings": True}).chunks
    dtypes = {parameter.dtype for parameter in stage.parameters()}
    assert dtypes == {{"fp32": torch.float32, "bf16": torch.bfloat16}[precision]}
    assert not any(t.is_meta for t in [*stage.parameters(), *stage.buffers()])
    assert stage.head.weight is stage.embedding.weight


def test_every_dropout_knows_the_seed(job) -> None:
    dropouts = [m for m in job({"train.seed": 42, "model.dropout": 0.1}).chunks.modules() if isinstance(m, Dropout)]
    assert len(dropouts) == 5 and {dropout.seed for dropout in dropouts} == {42}


def test_one_rank_without_zero_does_not_import_deepspeed(job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # an import of it raises
    assert isinstance(job().engine, PlainEngine)
    with pytest.raises(ImportError):
        job({"parallel.zero": 1})


@pytest.mark.parametrize(("samples", "expected"), [(1, 1), (4, 1), (5, 2), (8, 2)])
def test_evaluation_rounds_up_to_whole_batches(samples: int, expected: int, job) -> None:
    built = job({"train.eval_every": 1, "train.eval_samples": samples, "train.micro_batch_size": 4})
    assert built.evaluator.schedule.num_microbatches == expected
    assert [batch.samples.tolist() for batch in built.valid_batches] == [
        list(range(4 * i, 4 * i + 4)) for i in range(expected)
    ]


def test_without_evaluation_no_validation_sample_is_read(job) -> None:
    assert job().valid_batches == []


def test_stages_hold_their_parts_and_their_names(make) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = make("run", {"model.num_layers": 4})
    topology = build_topology(ParallelConfig(), torch.device("cpu"))
    stages = [build_stage(config, topology, stage, 3, torch.float32) for stage in range(3)]
    assert [list(stage.layers) for stage in stages] == [["0"], ["1"], ["2", "3"]]  # type: ignore[union-attr, arg-type, call-overload]
    whole = dict(build_stage(config, topology, 0, 1, torch.float32).named_parameters())
    parts = {name: p for stage in stages for name, p in stage.named_parameters()}
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_the_loader_begins_where_the_run_stopped(job) -> None:
    built = job()
    rows = torch.from_numpy(built.corpus.train.samples(torch.arange(40, 44).numpy()))
    batches = built.loader.step(40)
    assert torch.equal(torch.cat([b.tokens for b in batches]), rows[:, :-1])
    assert torch.equal(torch.cat([b.labels for b in batches]), rows[:, 1:])
    assert torch.cat([b.samples for b in batches]).tolist() == [40, 41, 42, 43]


def test_halves_of_a_backward_in_a_users_schedule_are_not_reduced_in_the_backward() -> None:
    config = RunConfig()
    config.parallel.zero_reduce, config.parallel.schedule_file = "microbatch", "mine.csv"
    check_reduction(config, build_schedule("1f1b", 2, 4, 1))
    with pytest.raises(ConfigError, match=r"mine\.csv has halves"):
        check_reduction(config, build_schedule("zbh1", 2, 4, 1))
