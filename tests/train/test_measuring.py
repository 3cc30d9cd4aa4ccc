"""Peak memory of one step: when it is measured, what is left of it, and that what was predicted is within 5 % of it."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.checkpoint.state import RunState
from megalm.config.layouts import with_layout
from megalm.config.model import ModelConfig
from megalm.config.run import RunConfig
from megalm.data.corpus import corpus_of
from megalm.parallel.topology import build_topology
from megalm.testing import run_distributed
from megalm.train import measuring
from megalm.train.build import build_job
from megalm.train.forecast import predict_memory
from megalm.train.hooks import Logging
from megalm.train.measuring import Measuring, compare
from megalm.train.pretrain import pretrain
from megalm.train.trainer import Trainer

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_sp": {"train.recompute": "selective"},
    "pp2_zbh1": {},
    "cp2_ring": {"train.recompute": "full", "kernels.fused_loss": True},
    "dp2_zero3": {"train.precision": "bf16"},  # last: DeepSpeed does not forget all of an engine
}


def report_of(config: RunConfig) -> dict[str, Any]:
    return json.loads(Path(config.train.run_dir, measuring.FILE).read_text())


def test_a_step_that_is_measured_is_not_taken_for_one_that_hangs(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors are counted one by one: the agent is told to be patient."""
    said: list[tuple[str, int]] = []
    monkeypatch.setattr(measuring.heartbeat, "say", lambda phase, step: said.append((phase, step)))
    pretrain(make("run", {"train.steps": 4}))
    assert said == [("measure", 2), ("end", 4)]


def test_the_third_step_is_measured(make, capsys) -> None:
    config = make("run", {"train.steps": 4})
    pretrain(config)
    report = report_of(config)
    (rank,) = report["ranks"]
    assert (report["step"], report["layout"], rank["rank"]) == (3, "single", 0)
    assert rank["predicted"] == predict_memory(config)[0].total
    states = [rank["parts"][name] for name in ("weights", "gradients", "moments")]
    assert rank["measured"] > sum(states) > 0
    sizes = [alive["size"] for alive in rank["alive"]]
    assert sizes == sorted(sizes, reverse=True) and sum(sizes) <= rank["measured"]
    assert re.search(r"step +3  peak memory \S+ GiB on rank 0 of 1, predicted \S+ GiB \([+-]\d+\.\d%\); all ranks: ",
                     capsys.readouterr().out)  # fmt: skip


@pytest.mark.parametrize(("changes"), [{"train.steps": 2}, {"train.steps": 4, "train.memory_step": 0}], ids=["short", "off"])
def test_without_that_step_nothing_is_measured(changes: dict[str, Any], make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "MemoryMeter", None)  # would be called
    config = make("run", changes)
    pretrain(config)
    assert not Path(config.train.run_dir, measuring.FILE).exists()


def test_skipped_steps_do_not_count(make, records) -> None:
    """Before the first update there are no moments, and the prediction has them."""
    config = make("run", {"train.steps": 8, "train.precision": "fp16", "train.loss_scale": 2.0**20, "train.memory_step": 2})
    pretrain(config)
    skipped = [record["skipped"] for record in records(config)]
    assert skipped[0] and not all(skipped)
    updates = [step for step, skip in enumerate(skipped, 1) if not skip]
    assert report_of(config)["step"] == updates[1]


def test_a_run_that_goes_on(make) -> None:
    """Behind the step it leaves the numbers that there are; before it, it measures."""
    config = make("run", {"train.steps": 3, "train.memory_step": 2})
    pretrain(config)
    first = report_of(config)
    config.train.steps = 4
    pretrain(config)
    assert report_of(config) == first
    config.train.steps, config.train.memory_step = 6, 6
    pretrain(config)
    assert report_of(config)["step"] == 6


def test_a_step_that_breaks_off_takes_the_meter_with_it(make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(trainer: Trainer) -> None:
        raise ArithmeticError

    stopped = []
    stop = measuring.MemoryMeter.stop
    monkeypatch.setattr(measuring.MemoryMeter, "stop", lambda meter: (stop(meter), stopped.append(meter))[0])
    config = make("run", {"train.memory_step": 1})
    monkeypatch.setattr(Trainer, "train_step", broken)
    with pytest.raises(ArithmeticError):
        pretrain(config)
    (meter,) = stopped
    known = len(meter.made)
    torch.ones(3) + 1
    assert len(meter.made) == known


def test_a_measured_step_is_not_in_the_speed(make, records, monkeypatch: pytest.MonkeyPatch) -> None:
    """A meter that takes a minute is not in the mean of five steps."""
    clock = [0.0]
    for module in (measuring, __import__("megalm.train.metrics", fromlist=["time"])):
        monkeypatch.setattr(module, "time", type("Clock", (), {"perf_counter": lambda: clock[0], "time": lambda: 0.0}))
    monkeypatch.setattr(measuring, "_report", lambda *_: clock.__setitem__(0, clock[0] + 60))
    step = Trainer.train_step

    def takes_a_second(trainer: Trainer):
        clock[0] += 1
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", takes_a_second)
    config = make("run", {"train.steps": 10, "train.log_every": 5})
    pretrain(config)
    assert [record["seconds_per_step"] for record in records(config, "seconds_per_step")] == [1.0, 1.0]


def test_the_line_names_the_fullest_and_the_furthest_off() -> None:
    ranks = [{"rank": r, "measured": m << 30, "predicted": p * 2**30} for r, m, p in ((0, 4, 4.0), (1, 8, 8.4), (2, 2, 1.0))]
    assert compare(ranks[:2]) == "peak memory 8 GiB on rank 1 of 2, predicted 8.4 GiB (+5.0%)"
    said = "peak memory 8 GiB on rank 1 of 3, predicted 8.4 GiB (+5.0%); furthest off on rank 2, 1 GiB (-50.0%)"
    assert compare(ranks) == said


def measure(rank: int, size: int, configs: list[RunConfig]) -> None:
    """Every run's second step."""
    for config in configs:
        topology, corpus = build_topology(config.parallel, torch.device("cpu")), corpus_of(config)
        logging = Logging([])
        trainer = Trainer(build_job(config, topology, corpus), RunState(data_fingerprint=""), [Measuring(logging), logging])
        trainer.fit()
        del trainer, topology, logging
        gc.collect()


@pytest.mark.dist
def test_predictions_are_within_five_percent(make) -> None:
    configs = []
    for layout, changes in LAYOUTS.items():
        config = make(
            layout, {"train.steps": 2, "train.memory_step": 2, "train.micro_batch_size": 2, "data.seq_length": 256, **changes}
        )
        config.model = ModelConfig(
            vocab_size=1024, hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_length=256
        )
        config = with_layout(config, layout)
        config.train.global_batch_size = 4 * config.data_parallel
        Path(config.train.run_dir).mkdir()
        configs.append(config)
    run_distributed(measure, 2, configs)
    found = {(c.train.run_dir, r["rank"]): r["predicted"] / r["measured"] - 1 for c in configs for r in report_of(c)["ranks"]}
    print(found)
    assert len(found) == 2 * len(LAYOUTS)
    assert max(map(abs, found.values())) < 0.05
