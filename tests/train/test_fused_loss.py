"""The head that computes its own loss: the numbers of the head and the loss one by one, without ever all of the logits."""

from __future__ import annotations

import dataclasses
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import nn

from megalm.checkpoint.state import RunState
from megalm.config.layouts import with_layout
from megalm.config.run import RunConfig
from megalm.data.corpus import open_corpus
from megalm.objectives.language_modeling import causal_loss
from megalm.parallel.schedules import build_schedule
from megalm.parallel.topology import build_topology
from megalm.testing import run_distributed
from megalm.train.build import build_job, build_stage
from megalm.train.fused_loss import apply_fused_loss
from megalm.train.trainer import Trainer
from tests.parallel.tiny import alone, tiny_config

# --- every layout -----------------------------------------------------------------------------------------------------

VOCAB = 301  # one more than the corpus has: the last tensor parallel rank's part is padded
CASES: list[tuple[str, dict[str, Any]]] = [
    ("tp2_sp", {}),
    ("tp2", {"train.precision": "bf16"}),
    ("pp2_zbh1", {"model.architecture": "gpt", "model.tie_embeddings": True}),
    ("dp2_zero3", {}),
    ("dp2_zero2_microbatch", {"train.precision": "bf16"}),
]


def _trained(config: RunConfig, layout: str, fused: bool) -> dict[str, torch.Tensor]:
    """Losses and norms of two steps, the first moments after the first (a tenth of the clipped gradients), an evaluation."""
    config = with_layout(config, layout)
    config.kernels = dataclasses.replace(config.kernels, fused_loss=fused)
    job = build_job(config, build_topology(config.parallel, torch.device("cpu")), open_corpus(config.data, VOCAB))
    trainer = Trainer(job, RunState(), [])
    first = trainer.train_step()
    numbers = {"first loss": first.loss, "norm": first.grad_norm}
    numbers |= {name: job.engine.read(name, "exp_avg").clone() for name in job.engine.parameters}
    numbers |= {"second loss": trainer.train_step().loss, "evaluation": torch.tensor(trainer.evaluate().loss)}
    job.loader.close()
    return numbers


def _layouts(rank: int, size: int, config: RunConfig) -> list[str]:
    """What differs between the two, by layout."""
    faults = []
    for layout, changes in CASES:
        mine = dataclasses.replace(config, model=dataclasses.replace(config.model), train=dataclasses.replace(config.train))
        for key, value in changes.items():
            section, name = key.split(".")
            setattr(getattr(mine, section), name, value)
        limit = 1e-6 if mine.train.precision == "fp32" else 2e-2
        fused, plain = (_trained(mine, layout, fused) for fused in (True, False))
        for name, value in plain.items():
            difference = float((fused[name] - value).abs().max() / value.abs().max().clamp(min=1e-3))
            if not difference <= limit:
                faults.append(f"{layout} {changes}: {name} differs by {difference:.1e} of its largest")
    return faults


@pytest.mark.dist
def test_the_same_numbers_on_every_layout(make) -> None:
    config = make("run", {"train.eval_every": 1, "model.vocab_size": VOCAB, "optim.clip": 0.5})
    assert run_distributed(_layouts, 2, config) == [[], []]


# --- one rank ---------------------------------------------------------------------------------------------------------

TOKENS, WORDS = 3 * 2048, 2000


def head_of(schedule: str = "1f1b", fused: bool = True, precision: str = "fp32") -> nn.Module:
    """One rank's whole model, whose logits are by far its largest tensor."""
    config = tiny_config(layers=1, precision=precision)
    config.model.vocab_size, config.kernels.fused_loss = WORDS, fused
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    chunks = nn.ModuleList([build_stage(config, alone(), 0, 1, dtype)])
    apply_fused_loss(chunks, config, alone(), build_schedule(schedule, 1, 4, 1))
    return chunks[0]


def loss_of(model: nn.Module, fused: bool) -> torch.Tensor:
    tokens = torch.randint(WORDS, (TOKENS // 16, 17), generator=torch.Generator().manual_seed(1))
    x, labels = tokens[:, :-1], tokens[:, 1:].clone()
    labels[::5, 3] = -100
    loss = model(x, labels=labels) if fused else causal_loss(model(x), labels, alone().tensor, WORDS)
    return loss / TOKENS


def peak_bytes(model: nn.Module, fused: bool) -> tuple[int, int]:
    """What forward and backward have in memory at most, beside what there was before; and the largest piece of it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss_of(model, fused).backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes)), max(sizes)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_the_logits_never_exist_all_at_once(schedule: str) -> None:
    logits = TOKENS * WORDS * 4
    fused, plain = head_of(schedule), head_of(fused=False)
    (peak, largest), (plain_peak, plain_largest) = peak_bytes(fused, True), peak_bytes(plain, False)
    print(f"of the logits' size: peak {peak / logits:.2f}, plain {plain_peak / logits:.2f}")
    assert plain_largest == logits and largest < 0.4 * logits, "a third is one chunk's"
    assert peak < plain_peak / 2
    plain.zero_grad()
    loss_of(plain, False).backward()
    for (name, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-5, atol=1e-7), name


def test_gradients_are_kept_only_where_one_loss_is_in_flight_and_not_for_fp16() -> None:
    for schedule, precision, keeps in (("1f1b", "fp32", True), ("gpipe", "fp32", False), ("1f1b", "fp16", False)):
        assert head_of(schedule, True, precision).head.forward.args[-1] is keeps


def test_without_labels_it_is_the_plain_head() -> None:
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(head_of()(tokens), head_of(fused=False)(tokens))
