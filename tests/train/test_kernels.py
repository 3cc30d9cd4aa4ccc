"""A model trained on Triton kernels, in the interpreter, goes the way of one trained on torch's operators."""

from __future__ import annotations

import pytest

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
        assert f"{backend} (asked for)" in line if backend == "torch" else "triton for cross_entropy, fused_adam, " in line
        losses[backend] = [record["loss"] for record in records(config)]
        norms[backend] = [record["grad_norm"] for record in records(config, "grad_norm")]
    assert len(losses["torch"]) == STEPS
    assert losses["triton"] == pytest.approx(losses["torch"], abs=1e-5)
    assert norms["triton"] == pytest.approx(norms["torch"], rel=1e-4)
    different = (losses["triton"], norms["triton"]) != (losses["torch"], norms["torch"])
    assert different, "the same bits everywhere: were the kernels used at all?"
