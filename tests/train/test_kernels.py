"""A model trained on Triton kernels, in the interpreter, goes the way of one trained on torch's operators."""

from __future__ import annotations

import pytest

STEPS = 5


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt"])
def test_triton_and_torch_train_alike(architecture: str, make, command, records, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"model.architecture": architecture, "model.dropout": 0.1, "train.steps": STEPS, "optim.lr": 3e-3}
    losses, norms = {}, {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("TRITON_INTERPRET", "1" if backend == "triton" else "0")
        config = make(backend, changes | {"kernels.backend": backend})
        done = command(config)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"kernels: {backend} for" in done.stdout or f"kernels: {backend} (" in done.stdout
        losses[backend] = [record["loss"] for record in records(config)]
        norms[backend] = [record["grad_norm"] for record in records(config, "grad_norm")]
    assert len(losses["torch"]) == STEPS
    assert losses["triton"] == pytest.approx(losses["torch"], abs=1e-5)
    assert norms["triton"] == pytest.approx(norms["torch"], rel=1e-4)
    assert losses["triton"] != losses["torch"], "the same bits: were the kernels used at all?"
