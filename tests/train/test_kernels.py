"""A model trained on Triton kernels, in the interpreter, goes the way of one trained on torch's operators; what is chosen."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.config.kernels import KernelsConfig
from megalm.train import kernels
from megalm.train.pretrain import pretrain
from megalm_kernels import Choice

STEPS = 4
LAYOUTS = {
    "llama": {},
    "gpt": {"model.architecture": "gpt", "model.dropout": 0.1, "train.recompute": "selective"},
    "split vocabulary, gathered weights": {
        "parallel.tensor_parallel": 2,
        "parallel.sequence_parallel": True,
        "parallel.zero": 3,
        "cluster.num_processes": 4,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_triton_and_torch_train_alike(name: str, make, command, records, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, norms, weights = {}, {}, {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("TRITON_INTERPRET", "1" if backend == "triton" else "0")
        config = make(backend, {**LAYOUTS[name], "train.steps": STEPS, "optim.lr": 3e-3, "kernels.backend": backend})
        done = command(config)
        assert done.returncode == 0, done.stderr[-3000:]
        (line,) = [line for line in done.stdout.splitlines() if line.strip().startswith("kernels: ")]
        assert f"kernels: {backend} (asked for)" in line
        losses[backend] = [record["loss"] for record in records(config)]
        norms[backend] = [record["grad_norm"] for record in records(config, "grad_norm")]
        (manifest,) = Path(config.train.run_dir).rglob("manifest.json")
        weights[backend] = re.findall(r'"crc32": \d+', json.dumps(json.loads(manifest.read_text())["manifest"]["pieces"]))
    assert len(losses["torch"]) == STEPS
    assert losses["triton"] == pytest.approx(losses["torch"], abs=1e-5)
    assert norms["triton"] == pytest.approx(norms["torch"], rel=1e-4)
    assert weights["torch"] and weights["triton"] != weights["torch"], "the same bits everywhere: were the kernels used at all?"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt"])
def test_attention_by_our_kernels_trains_as_by_torch_s(
    architecture: str, make, command, records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps; nothing else differs. llama: two query heads to a key's; gpt: what attention gave is kept, not done again."""
    shape = {"model.hidden_size": 64, "model.head_dim": 32, "model.num_heads": 2, "model.num_kv_heads": 1}
    if architecture == "gpt":
        shape |= {"model.num_kv_heads": 2, "train.recompute": "selective"}
    shape |= {"model.architecture": architecture, "train.micro_batch_size": 4, "train.eval_samples": 4}
    shape |= {"optim.lr": 3e-3, "kernels.backend": "torch"}
    ours = make("triton", {**shape, "kernels.attention": "triton"})
    theirs = make("sdpa", {**shape, "kernels.attention": "sdpa"})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = command(ours)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "triton for attention (asked for)" in done.stdout
    pretrain(theirs)
    losses, norms = {}, {}
    for name, config in (("triton", ours), ("sdpa", theirs)):
        losses[name] = [record["loss"] for record in records(config)]
        norms[name] = [record["grad_norm"] for record in records(config, "grad_norm")]
    assert len(losses["sdpa"]) == 20 and losses["sdpa"][-1] < losses["sdpa"][0] - 0.5
    assert losses["triton"] == pytest.approx(losses["sdpa"], abs=1e-5)
    assert norms["triton"] == pytest.approx(norms["sdpa"], rel=1e-4)
    assert losses["triton"] != losses["sdpa"], "the same bits everywhere: was the kernel used at all?"


@pytest.mark.parametrize(
    ("backend", "device", "facts", "tried"),
    [
        ("triton", "cuda", {"head_dim": 64, "precision": "bf16"}, True),
        ("triton", "cuda", {"head_dim": 128, "precision": "fp16"}, True),
        ("triton", "cuda", {"head_dim": 96, "precision": "bf16"}, False),
        ("triton", "cuda", {"head_dim": 128, "precision": "fp32"}, False),
        ("triton", "cuda", None, False),
        ("sdpa", "cuda", {"head_dim": 128, "precision": "bf16"}, False),
        ("triton", "cpu", {"head_dim": 128, "precision": "bf16"}, False),
    ],
)
def test_the_warp_specialised_attention_is_tried_by_runs_that_may_use_it(
    backend: str, device: str, facts: dict[str, Any] | None, tried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []
    chosen = [Choice("rms_norm", "triton", ""), Choice("attention", backend, "")]
    monkeypatch.setattr(kernels.hopper, "ready", asked.append)
    monkeypatch.setattr(kernels.megalm_kernels, "choose", lambda *rest: chosen)
    assert kernels.choose_kernels(KernelsConfig(), device, facts) == chosen
    assert asked == [torch.device("cuda")] * tried
