"""A real step sends what the formulae say, to the call and the byte, on every rank; and how a run shows it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.checkpoint.state import RunState
from megalm.config.cluster import ClusterConfig
from megalm.config.data import DataConfig
from megalm.config.model import ModelConfig
from megalm.config.optim import OptimConfig
from megalm.config.parallel import ParallelConfig, parse_layout
from megalm.config.run import RunConfig
from megalm.config.train import TrainConfig
from megalm.data.corpus import corpus_of
from megalm.data.indexed import IndexedWriter
from megalm.parallel.ledger import Ledger
from megalm.parallel.topology import build_topology
from megalm.parallel.volume import Count
from megalm.testing import run_distributed
from megalm.train.build import build_job
from megalm.train.counting import compare, table
from megalm.train.pretrain import pretrain
from megalm.train.traffic import forecast_volume
from megalm.train.trainer import Trainer

VOCAB = 37  # odd: padded by tensor parallelism; other sizes make DeepSpeed pad too
Case = tuple[str, str, dict[str, Any]]  # architecture, layout, changes by name of the field
EXPERTS = {"num_experts": 4, "expert_ffn_size": 24, "router_aux_loss": 0.01}
LATENT = {"kv_latent_size": 12, "q_latent_size": 20, "rope_head_dim": 2, "value_head_dim": 2}
TWO: list[Case] = [
    *itertools.product(("llama", "gpt"), ("tp2", "tp2_sp", "pp2", "pp2_interleaved", "dp2", "dp2_zero1"), ({},)),
    *itertools.product(("llama", "gpt"), ("dp2_zero2", "dp2_zero3"), ({},)),
    ("gpt", "pp2", {"tie_embeddings": True}),
    ("gpt", "tp2_sp", {"tie_embeddings": True, "num_kv_heads": 1, "precision": "bf16", "overlap": False}),
    ("llama", "tp2_sp", {"recompute": "full", "dropout": 0.1}),
    ("gpt", "tp2", {"recompute": "full", "recompute_every": 2, "num_layers": 3}),
    ("gpt", "pp2_zbv", {"tie_embeddings": True}),
    ("llama", "pp2_zbh1", {}),
    ("gpt", "dp2_zero1", {"precision": "bf16"}),
    ("gpt", "dp2_zero2_microbatch", {"precision": "bf16"}),
    ("llama", "dp2_zero3", {"tie_embeddings": True, "precision": "bf16"}),
    ("llama", "dp2_zero3_microbatch", {"recompute": "full", "recompute_every": 2, "num_layers": 3}),
    ("llama", "cp2_ring", {"recompute": "selective"}),
    ("gpt", "cp2_ring_zero1", {"precision": "bf16", "num_kv_heads": 8}),
    ("llama", "cp2_ulysses", {"num_kv_heads": 1, "recompute": "full"}),
    ("llama", "cp2_ulysses_zero3", {**LATENT, "recompute": "modules"}),
    ("llama", "tp2_sp", {**EXPERTS, **LATENT, "num_shared_experts": 1, "recompute": "full"}),
    ("llama", "dp2_ep2", {**EXPERTS, "precision": "bf16"}),
    ("llama", "dp2_ep2_zero1", EXPERTS),
    ("llama", "dp2_zero3", {**EXPERTS, "recompute": "full"}),
    ("llama", "cp2_ring_ep2", {**EXPERTS, "num_dense_layers": 1, "capacity_factor": 1.0, "recompute": "full"}),
]
EIGHT: list[Case] = [
    ("llama", "tp2_pp2_dp2_zero1", {}),
    ("gpt", "tp2_sp_pp2_dp2_zero2", {"tie_embeddings": True, "precision": "bf16"}),
    ("gpt", "tp2_sp_pp2_interleaved_dp2_zero3", {"tie_embeddings": True, "num_kv_heads": 1}),
    ("gpt", "tp2_pp2_zbv_dp2_zero3", {}),
    ("llama", "tp2_pp2_bfs_dp2_zero3", {"precision": "bf16", "recompute": "selective", "dropout": 0.1}),
    ("gpt", "tp2_sp_pp2_dp2_zero3_microbatch", {"num_kv_heads": 1}),
    ("llama", "tp2_sp_pp2_interleaved_dp2_zero2_microbatch", {"precision": "bf16"}),
    ("llama", "tp8_sp", {"num_kv_heads": 2}),
    ("gpt", "pp4_interleaved_dp2_zero1", {"num_layers": 9, "precision": "bf16"}),
    ("llama", "tp2_sp_cp2_ulysses_dp2_ep4_zero1", {**EXPERTS, "num_shared_experts": 1}),
    ("llama", "cp2_ring_pp2_dp2_ep2_zero3", {**EXPERTS, "precision": "bf16", "recompute": "full"}),
    ("llama", "pp2_dp4_ep2_zero2", {**EXPERTS, "num_dense_layers": 1}),
    ("llama", "cp4_ring_dp2_ep4_zero3_microbatch", {**EXPERTS, **LATENT}),
]


def name_of(case: Case) -> str:
    return "-".join([*case[:2], *map(str, itertools.chain(*case[2].items()))])


def run_config(folder: str, case: Case, world_size: int) -> RunConfig:
    architecture, layout, changes = case
    values, _ = parse_layout(layout)
    parallel = ParallelConfig(**values)  # type: ignore[arg-type]
    layers = max(2, parallel.pipeline_parallel * parallel.chunks)
    config = RunConfig(
        model=ModelConfig(architecture, VOCAB, 32, layers, num_heads=8, num_kv_heads=4, ffn_size=48, max_seq_length=17),
        parallel=parallel,
        data=DataConfig(path=f"{folder}/corpus", seq_length=8),
        optim=OptimConfig(clip=0.5),
        train=TrainConfig(run_dir=folder, global_batch_size=8, micro_batch_size=1),
        cluster=ClusterConfig(num_processes=world_size),
    )
    for name, value in changes.items():
        section = next(s for s in (config.model, config.parallel, config.train) if hasattr(s, name))
        setattr(section, name, value)
    return config


def count_steps(rank: int, world_size: int, folder: str, cases: list[Case]) -> list[list]:
    """Of every case: the first two steps as counted, and as predicted."""
    return [_count_step(run_config(folder, case, world_size)) for case in cases]


def _count_step(config: RunConfig) -> list:
    topology = build_topology(config.parallel, torch.device("cpu"))
    job = build_job(config, topology, corpus_of(config))
    trainer = Trainer(job, RunState(), [])
    volumes = []
    for _ in range(2):
        with Ledger(topology) as ledger:
            trainer.train_step()
        volumes.append(ledger.volume())
    job.loader.close()
    return [*volumes, forecast_volume(config, job.executor.schedule, topology.pipeline.rank)]


@pytest.fixture(scope="module")
def random_corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("counted")
    generator = torch.Generator().manual_seed(0)
    with IndexedWriter(folder / "corpus", VOCAB) as writer:
        for _ in range(32):
            writer.add_document(torch.randint(VOCAB, (100,), generator=generator).numpy())
    return str(folder)


def check_equal(cases: list[Case], by_rank: list[list[list]]) -> None:
    differences = {}
    for index, case in enumerate(cases):
        for rank, results in enumerate(by_rank):
            *steps, expected = results[index]
            assert expected, "something is sent"
            for number, volume in enumerate(steps, 1):
                rows = compare(volume, expected, {})
                loose = [row for row in rows if not row["exact"]]
                assert all(0.6 < row["bytes"] / row["formula_bytes"] < 1.7 for row in loose), "almost even at the start"
                for key in [(row["group"], row["operation"]) for row in rows if not row["equal"]]:
                    differences[name_of(case), rank, number, key] = (volume.get(key), expected.get(key))
    assert differences == {}, "counted, then predicted"


@pytest.mark.dist
def test_two_ranks_send_what_the_formulae_say(random_corpus: str) -> None:
    check_equal(TWO, run_distributed(count_steps, 2, random_corpus, TWO))


@pytest.mark.dist
@pytest.mark.slow
def test_eight_ranks_send_what_the_formulae_say(random_corpus: str) -> None:
    check_equal(EIGHT, run_distributed(count_steps, 8, random_corpus, EIGHT, timeout_seconds=280))


@pytest.mark.dist
def test_a_run_shows_its_ledger(make, command) -> None:
    """Evaluation and checkpoints around the step do not count."""
    changes = {"train.steps": 4, "train.ledger_step": 2, "train.eval_every": 1, "checkpoint.save_every": 1}
    config = make("run", {**changes, "parallel.pipeline_parallel": 2})
    done = command(config)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("pipeline", "model"))]
    assert rows == [
        ["model", "all_reduce", "1", "1", "0.000008", "0.000008", "0.000008"],
        ["pipeline", "all_reduce", "1", "1", "0.000004", "0.000004", "0.000004"],
        ["pipeline", "recv", "4", "4", "0.008192", "0.008192", "0.000000"],
        ["pipeline", "send", "4", "4", "0.008192", "0.008192", "0.008192"],
    ]
    assert "equal to the formulae on 2 of 2 ranks" in done.stdout
    written = json.loads(Path(config.train.run_dir, "ledger.json").read_text())
    assert (written["step"], written["layout"], len(written["ranks"])) == (2, "pp2", 2)
    assert all(row["equal"] for rank in written["ranks"] for row in rank["rows"])


def test_a_ledger_that_comes_too_late_is_said(make, capsys) -> None:
    pretrain(make("run", {"train.steps": 4}))
    pretrain(make("run", {"train.steps": 5, "train.ledger_step": 2}))
    assert "no ledger: this run goes on after step 4, and train.ledger_step is 2" in capsys.readouterr().out


def test_a_step_that_breaks_off_leaves_no_mode_behind(make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(trainer: Trainer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train_step", broken)
    stopped: list[Ledger] = []
    monkeypatch.setattr(Ledger, "__exit__", lambda self, *error: stopped.append(super(Ledger, self).__exit__(*error)))
    with pytest.raises(KeyboardInterrupt):
        pretrain(make("run", {"train.ledger_step": 1}))
    assert len(stopped) == 1


def test_a_difference_is_marked() -> None:
    counted, expected = {("data", "all_reduce"): Count(2, 10)}, {("data", "all_reduce"): Count(2, 12), ("x", "send"): Count(1, 1)}
    rows = compare(counted, expected, {"data": 2})
    assert [row["equal"] for row in rows] == [False, False]
    assert [line.endswith("DIFFERS") for line in table(rows)] == [False, True, True]
    assert compare(counted, counted, {"data": 2})[0]["equal"] is True


def test_without_a_formula_the_table_says_so() -> None:
    rows = compare({("data", "all_reduce"): Count(2, 2_000_000)}, None, {"data": 2})
    assert rows[0]["equal"] is None
    assert table(rows)[1].split() == ["data", "all_reduce", "2", "-", "2.000000", "-", "2.000000"]


def test_what_the_router_decides_is_shown_against_an_even_choice() -> None:
    key = "expert", "all_to_all"
    formula = {key: Count(5, 2_000_000, exact=False)}
    rows = compare({key: Count(5, 2_400_000)}, formula, {"expert": 2})
    assert rows[0]["equal"] and table(rows)[1].split()[2:6] == ["5", "5", "2.400000", "2.000000"]
    assert table(rows)[1].endswith("1.200000   x 1.200 of even")
    assert not compare({key: Count(4, 2_000_000)}, formula, {"expert": 2})[0]["equal"]
