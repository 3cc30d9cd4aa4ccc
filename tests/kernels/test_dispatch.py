"""The choice of a kernel: made once, with a reason, and never silently another than asked for."""

import pytest

from megalm_kernels import dispatch


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(dispatch, "_registry", {})
    monkeypatch.setattr(dispatch, "_chosen", {})
    dispatch.register("op", "torch", lambda: "torch")
    dispatch.register("op", "triton", lambda: "triton", lambda device: "" if device == "cuda" else "needs a GPU")


def test_auto_takes_the_first_usable_and_says_why(registry):
    (choice,) = dispatch.choose("auto", "cpu")
    assert (choice.backend, dispatch.implementation("op")()) == ("torch", "torch")
    assert "triton: needs a GPU" in choice.reason
    (choice,) = dispatch.choose("auto", "cuda")
    assert (choice.backend, dispatch.implementation("op")()) == ("triton", "triton")


def test_what_is_asked_for_and_cannot_run_is_an_error(registry):
    with pytest.raises(ValueError, match="needs a GPU"):
        dispatch.choose("triton", "cpu")
    with pytest.raises(ValueError, match="not written"):
        dispatch.choose("apex", "cpu")


def test_every_public_operation_is_registered():
    names = {choice.operation for choice in dispatch.choose("auto", "cpu")}
    assert names == {"cross_entropy", "flash_attention", "fused_adam", "layer_norm", "rms_norm", "rotary", "swiglu"}
