"""A model trained on Triton kernels, in the interpreter, goes the way of one trained on torch's operators."""

from __future__ import annotations

import pytest

from megalm.train.pretrain import pretrain

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
    losses, norms = {}, {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("TRITON_INTERPRET", "1" if backend == "triton" else "0")
        config = make(backend, {**LAYOUTS[name], "train.steps": STEPS, "optim.lr": 3e-3, "kernels.backend": backend})
        done = command(config)
        assert done.returncode == 0, done.stderr[-3000:]
        (line,) = [line for line in done.stdout.splitlines() if line.strip().startswith("kernels: ")]
        assert f"kernels: {backend} (asked for)" in line
        losses[backend] = [record["loss"] for record in records(config)]
        norms[backend] = [record["grad_norm"] for record in records(config, "grad_norm")]
    assert len(losses["torch"]) == STEPS
    assert losses["triton"] == pytest.approx(losses["torch"], abs=1e-5)
    assert norms["triton"] == pytest.approx(norms["torch"], rel=1e-4)
    different = (losses["triton"], norms["triton"]) != (losses["torch"], norms["torch"])
    assert different, "the same bits everywhere: were the kernels used at all?"


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
