"""apex: found by its files and never imported, and its kernels as implementations.

apex itself needs a GPU and a compiler to be installed. So what is found are folders that look like it, and what is called are
stand-ins with the signatures of apex's own functions (csrc/amp_C_frontend.cpp, apex/normalization/fused_layer_norm.py), which
compute in torch and are strict about what they are given. On a GPU with apex the benchmarks run the real ones.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import megalm_kernels as ops
from megalm import doctor
from megalm_kernels import Apex, apex, dispatch, find_apex

FP32, BF16 = torch.float32, torch.bfloat16
NVIDIAS = ["apex/__init__.py", "apex/normalization/fused_layer_norm.py", "apex/optimizers/fused_adam.py"]
COMPILED = ["amp_C.py", "fused_layer_norm_cuda.py"]


def install(folder: Path, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages first on sys.path of which no file may be run."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize(
    ("files", "state", "words"),
    [
        ([], "absent", "not installed"),
        (["apex/__init__.py", "apex/lib/libapex.py"], "wrong package", "another package of that name"),
        (["apex.py"], "wrong package", "apex.py is another package of that name"),
        (NVIDIAS[:2], "wrong package", "not NVIDIA's"),
        (NVIDIAS, "python only", "without its CUDA extensions"),
        (NVIDIAS + COMPILED[:1], "python only", "without its CUDA extensions"),
        (NVIDIAS + COMPILED, "full", "with its CUDA extensions"),
    ],
)
def test_states(files: list[str], state: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, files, monkeypatch)
    if state == "absent":
        monkeypatch.setitem(sys.modules, "apex", None)  # also where it is installed
    found = find_apex()
    assert (found.state, found.folder.startswith(str(tmp_path))) == (state, state != "absent")
    assert words in found.words
    assert not any(sys.modules.get(name) for name in ("apex", "amp_C"))
    monkeypatch.setattr(apex, "_found", find_apex)
    obstacle = apex.apex_obstacle("cuda")
    assert words in obstacle if state != "full" else obstacle == ""
    assert not obstacle.startswith("apex") and apex.apex_obstacle("cpu") == (obstacle or "runs on a GPU only")
    if state != "full":
        with pytest.raises(dispatch.Unavailable, match=f"apex: .*{words}"):
            dispatch.choose("torch", "cpu", {"rms_norm": "apex"})
    (row,) = doctor._apex()
    assert row.state == ("warn" if state in ("wrong package", "python only") else "ok")
    assert ("absent" if state == "absent" else words) in row.detail
    assert ("pip install -v --no-build-isolation ." in row.mend) is (state != "full")
    assert row.mend.startswith("pip uninstall apex") is (state == "wrong package")


def adam_of_apex(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], lr: float, beta1: float, beta2: float, epsilon: float,
    step: int, mode: int, bias_correction: int, weight_decay: float, inv_scale: float = 1.0,
) -> None:  # fmt: skip
    """multi_tensor_adam: g, p of one dtype; m, v in fp32; nothing happens while the flag is up."""
    assert (type(chunk_size), noop_flag.dtype, noop_flag.numel()) == (int, torch.int32, 1)
    assert (type(lr), type(step), mode, bias_correction) == (float, int, 1, 1)
    for g, p, m, v in zip(*tensor_lists, strict=True):
        assert g.dtype == p.dtype and m.dtype == v.dtype == FP32
        if not noop_flag:
            wide = g.float() * inv_scale
            m.lerp_(wide, 1 - beta1)
            v.mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
            update = m / (1 - beta1**step) / (v.sqrt() / math.sqrt(1 - beta2**step) + epsilon) + weight_decay * p.float()
            p.copy_(p.float() - lr * update)


def capturable_adam_of_apex(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], lr: Tensor, beta1: float, beta2: float, epsilon: float,
    step: Tensor, mode: int, bias_correction: int, weight_decay: float, inv_scale: Tensor,
) -> None:  # fmt: skip
    """multi_tensor_adam_capturable: the scalars as tensors of one element."""
    assert (lr.dtype, step.dtype, inv_scale.dtype) == (FP32, torch.int32, FP32)
    assert {x.shape for x in (lr, step, inv_scale)} == {(1,)}
    numbers = (float(lr), beta1, beta2, epsilon, int(step), mode, bias_correction, weight_decay, float(inv_scale))
    adam_of_apex(chunk_size, noop_flag, tensor_lists, *numbers)


def rms_norm_of_apex(
    input: Tensor, weight: Tensor, normalized_shape: Any, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    assert input.dtype == weight.dtype
    return F.rms_norm(input, normalized_shape, weight, eps)


def layer_norm_of_apex(
    input: Tensor, weight: Tensor, bias: Tensor, normalized_shape: Any, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    assert input.dtype == weight.dtype == bias.dtype
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules with apex's names, and the choice of them."""
    functions: dict[str, dict[str, Any]] = {
        "amp_C": {"multi_tensor_adam": adam_of_apex, "multi_tensor_adam_capturable": capturable_adam_of_apex},
        "apex": {},
        "apex.normalization": {},
        "apex.normalization.fused_layer_norm": {
            "fused_rms_norm_affine": rms_norm_of_apex,
            "fused_layer_norm_affine": layer_norm_of_apex,
        },
    }
    for name, members in functions.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    monkeypatch.setattr(apex, "_found", lambda: Apex("full", "/somewhere"))
    with dispatch.use("torch", "cuda", fused_adam="apex", rms_norm="apex", layer_norm="apex"):
        yield


def adam_tensors(dtype: torch.dtype, grad: torch.dtype, master: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    whole = torch.randn(4, 5)
    tensors = {"param": whole.to(dtype, copy=True), "grad": torch.randn(4, 5).to(grad)}
    tensors |= {"exp_avg": torch.randn(4, 5), "exp_avg_sq": torch.rand(4, 5)}
    return {**tensors, "master": whole} if master else tensors


@pytest.mark.parametrize("scalars", ["host", "device", "skip"])
@pytest.mark.parametrize(
    ("dtype", "grad", "master"), [(FP32, FP32, False), (FP32, BF16, False), (BF16, BF16, False), (BF16, FP32, True)]
)
def test_fused_adam(stand_in: None, dtype: torch.dtype, grad: torch.dtype, master: bool, scalars: str) -> None:
    settings: dict[str, Any] = dict(step=3, lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
    if scalars != "host":
        settings |= dict(grad_scale=torch.tensor(0.5), found_inf=torch.tensor(2.0 if scalars == "skip" else 0.0))
    if scalars == "device":
        settings |= dict(step=torch.tensor(3.0), lr=torch.tensor(1e-2))
    ours, plain = adam_tensors(dtype, grad, master), adam_tensors(dtype, grad, master)
    if scalars == "skip":
        for tensors in (ours, plain):
            tensors["param"] += 1  # not its master rounded
    ops.fused_adam(**ours, **settings)
    ops.fused_adam_reference(**plain, **settings)
    for name in ours:
        rtol, atol = (2**-7, 1e-6) if ours[name].dtype == BF16 else (1e-6, 1e-7)
        rtol, atol = (0, 0) if scalars == "skip" else (rtol, atol)
        torch.testing.assert_close(ours[name], plain[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(remainder=torch.zeros(4, 5, dtype=torch.int16)), "remainder .with kernels.fused_adam=apex. is given"),
        (dict(stochastic_seed=3), "stochastic_seed .with kernels.fused_adam=apex. is given"),
        (dict(grad=torch.zeros(4, 5)), "the dtype of grad .with kernels.fused_adam=apex. is torch.float32"),
    ],
)
def test_what_apex_cannot_do(stand_in: None, change: dict, message: str) -> None:
    tensors: dict[str, Any] = {**adam_tensors(BF16, BF16, False), **change}
    with pytest.raises(ValueError, match=message):
        ops.fused_adam(**tensors, step=1, lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0)


@pytest.mark.parametrize("x_dtype", [FP32, BF16])
@pytest.mark.parametrize("weight_dtype", [FP32, BF16])
@pytest.mark.parametrize("features", [{}, dict(residual=True), dict(residual=True, dropout=0.5, seed=3, zero_centred=True)])
def test_norms(stand_in: None, x_dtype: torch.dtype, weight_dtype: torch.dtype, features: dict) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(6, 8).to(x_dtype), torch.randn(6, 8)
    weight, bias = torch.randn(8).to(weight_dtype), torch.randn(8).to(weight_dtype)
    features = {**features, "residual": residual if features.get("residual") else None}
    for function, operands in ((ops.rms_norm, [weight]), (ops.layer_norm, [weight, bias]), (ops.layer_norm, [weight, None])):
        ours = function(x, *operands, eps=1e-3, **features)
        with dispatch.use("torch", "cpu"):
            plain = function(x, *operands, eps=1e-3, **features)
        pairs = zip(ours, plain, strict=True) if isinstance(ours, tuple) else [(ours, plain)]
        for got, want in pairs:
            torch.testing.assert_close(got, want)
