"""`auto` for attention goes by what was measured on this GPU, by planted tables; what ships is a table too."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm_kernels import dispatch, flash_attention, flash_attention_reference
from megalm_kernels.attention import choice, sdpa

GPU = "NVIDIA H200"
KNOWN = {"head_dim": 128, "precision": "bf16"}
Plant = Callable[..., None]


def row(head_dim: int = 128, seq_length: int = 4096, **changes: Any) -> dict[str, Any]:
    tflops = {"triton": 400.0, "sdpa": 350.0, "cudnn": 520.0, "triton unordered": 900.0, "flex": 1000.0}
    start = {"gpu": GPU, "torch": "2.11.0+cu130", "triton": "3.6.0", "head_dim": head_dim, "causal": True}
    return {**start, "seq_length": seq_length, "direction": "full", "tflops": tflops, "commit": "abc", **changes}


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """plant(rows...): that table, on a machine with that GPU, where everything can run."""
    monkeypatch.setattr(choice, "TABLE", tmp_path / "measured.json")
    monkeypatch.setattr(choice, "installed", {"torch": "2.11.1", "triton": "3.6.2"}.get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(dispatch.compat, "interpreting", lambda: False)
    has = dispatch._registry["attention"]
    here = {name: replace(one, obstacle=lambda device: "") for name, one in has.items()}
    monkeypatch.setattr(dispatch, "_registry", {"attention": here})
    monkeypatch.setattr(dispatch, "_chosen", {})
    return lambda *rows: choice.write(choice.TABLE, rows)


def chosen(**facts: Any) -> tuple[str, str]:
    (found,) = dispatch.choose("auto", "cuda", facts=facts)
    return found.backend, found.reason


def test_without_a_measurement_triton_is_taken(plant: Plant) -> None:
    plant()
    assert chosen() == ("triton", "nothing was measured on this GPU")
    others = row(gpu="NVIDIA A100"), row(torch="2.12.0"), row(triton="3.7.0"), row(direction="forward")
    for other in others:
        plant(other)
        assert chosen() == ("triton", "nothing was measured on this GPU"), other


def test_the_fastest_is_taken_by_the_mean_over_rows(plant: Plant) -> None:
    plant(row())
    assert chosen(**KNOWN) == ("cudnn", f"measured 1.30x triton on {GPU}")
    plant(row(), row(seq_length=512, tflops={"triton": 300.0, "sdpa": 100.0, "cudnn": 100.0}))
    assert chosen(**KNOWN) == ("triton", f"measured 1.52x cudnn on {GPU}")  # sqrt(400 300 / (520 100))
    plant(row(tflops={"triton": 1.0, "sdpa": 1.0}))
    assert chosen() == ("triton", f"measured 1.00x sdpa on {GPU}")
    plant(row(tflops={"cudnn": 1.0, "flex": 2.0}))
    assert chosen(**KNOWN) == ("cudnn", f"measured on {GPU}")


def test_who_failed_at_one_shape_is_not_taken(plant: Plant) -> None:
    plant(row(), row(head_dim=256, tflops={"triton": 200.0, "sdpa": 150.0}))
    assert chosen() == ("triton", f"measured 1.23x sdpa on {GPU}")
    assert chosen(**KNOWN)[0] == "cudnn", "which did all of those that count"


def test_cudnn_only_where_the_calls_to_come_are_known(plant: Plant) -> None:
    """It has neither every head dimension nor fp32, and a call that it does not have would be refused."""
    plant(row())
    for facts in ({}, {"head_dim": 128}, {"precision": "bf16"}):
        assert chosen(**facts) == ("triton", f"measured 1.14x sdpa on {GPU}"), facts
    plant(row(tflops={"triton": 300.0, "sdpa": 350.0, "cudnn": 520.0}))
    assert chosen()[0] == "sdpa"


def test_what_the_calls_to_come_need(plant: Plant) -> None:
    plant(row())
    assert chosen(head_dim=128, precision="bf16")[0] == "cudnn"
    assert chosen(head_dim=128, precision="fp32") == ("sdpa", "fp32, which triton multiplies without tensor cores")
    assert chosen(head_dim=64) == ("triton", "nothing was measured on this GPU")
    assert chosen(head_dim=44) == ("sdpa", "triton: not with head_dim=44")


def test_what_cannot_run_is_passed_over(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(row())
    has = dispatch._registry["attention"]
    monkeypatch.setitem(has, "cudnn", replace(has["cudnn"], obstacle=lambda device: "no cuDNN"))
    assert chosen(**KNOWN) == ("triton", "cudnn: no cuDNN")
    monkeypatch.setitem(has, "triton", replace(has["triton"], obstacle=lambda device: "sm_75"))
    assert chosen(**KNOWN) == ("sdpa", "cudnn: no cuDNN; triton: sm_75")
    (found,) = dispatch.choose("auto", "cpu")
    assert found.backend == "sdpa"


FEATURES: list[dict[str, Any]] = [{"softcap": 2.0}, {"sinks": torch.zeros(4)}, {"dropout_p": 0.5, "seed": 3}]


def test_on_a_cpu_auto_runs_whatever_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    """What torch's own does not have is done by the reference, which is said once for each; by name it is refused."""
    q, k = torch.randn(2, 3, 4, 32).requires_grad_(), torch.randn(2, 3, 2, 32)
    sdpa._say_once.cache_clear()
    with dispatch.use("auto", "cpu", rms_norm="torch"), caplog.at_level("INFO", "megalm_kernels"):
        for features in FEATURES * 2:
            got, want = (f(q, k, k, **features) for f in (flash_attention, flash_attention_reference))
            assert torch.equal(got, want) and got.requires_grad
        flash_attention(q, k, k, window=(1, 0), return_lse=True)
    said = [record.getMessage() for record in caplog.records if "attention" in record.getMessage()]
    assert len(said) == 3
    assert all(f"{name}; reference" in line for name, line in zip(("softcap", "sinks", "dropout"), said, strict=True))
    for names in ({"attention": "sdpa"}, {"attention": "torch"}):
        for features in FEATURES:
            with dispatch.use(**names), pytest.raises(ValueError, match="not there, wanted a call without it"):
                flash_attention(q, k, k, **features)


def test_auto_compiles_what_another_has_to_do() -> None:
    """Into one graph, though it is said."""
    q = torch.randn(1, 3, 2, 32)
    run = torch.compile(lambda q: flash_attention(q, q, q, softcap=2.0), fullgraph=True, backend="aot_eager")
    with dispatch.use("auto", "cpu"):
        torch.testing.assert_close(run(q), flash_attention(q, q, q, softcap=2.0))


def test_what_is_asked_for_does_not_look_at_the_table(plant: Plant) -> None:
    plant(row())
    (found,) = dispatch.choose("torch", "cuda")
    assert (found.backend, found.reason) == ("torch", "asked for")
    (found,) = dispatch.choose("auto", "cuda", {"attention": "reference"})
    assert (found.backend, found.reason) == ("reference", "asked for")


def test_the_table_that_ships_can_be_read(tmp_path: Path) -> None:
    rows = choice.read(choice.TABLE)
    choice.write(tmp_path / "again.json", rows)
    assert (tmp_path / "again.json").read_text() == choice.TABLE.read_text()
    choice.write(tmp_path / "one.json", [row(), row(head_dim=64)])
    assert choice.read(tmp_path / "one.json") == [row(), row(head_dim=64)]
    (tmp_path / "bad.json").write_text(json.dumps([{"gpu": GPU}]))
    with pytest.raises(ValueError, match=r"bad\.json: a row has the fields gpu, wanted causal, commit"):
        choice.read(tmp_path / "bad.json")


def test_rows_from_a_benchmark() -> None:
    def measured(provider: str, tflops: float | None, **changes: Any) -> dict[str, Any]:
        start = {"operation": "attention", "shape": "4 causal", "dtype": "bfloat16", "direction": "full", "status": "ok"}
        return {**start, "provider": provider, "tflops": tflops, **changes}

    def read_shape(shape: str) -> dict[str, Any] | None:
        return {"head_dim": 64, "causal": True, "seq_length": 4, "batch": 2} if shape.endswith("causal") else None

    rows = [
        measured("triton", 10.04), measured("torch", 9.0), measured("sdpa cudnn", 12.0), measured("flex", 5.0),
        measured("sdpa flash", None, status="failed"), measured("triton", 3.0, direction="forward"),
        measured("triton", 1.0, shape="packed"), measured("triton", 1.0, operation="decode"),
        measured("triton", 1.0, dtype="float32"),
    ]  # fmt: skip
    results = {"commit": "abc", "machine": {"gpu": GPU}, "versions": {"torch": "2.11.0+cu130", "triton": "3.6.0"}, "rows": rows}
    full, forward = choice.rows_from(results, read_shape)
    assert full == row(64, 4, tflops={"triton": 10.0, "sdpa": 9.0, "cudnn": 12.0, "flex": 5.0})
    assert (forward["direction"], forward["tflops"]) == ("forward", {"triton": 3.0})
