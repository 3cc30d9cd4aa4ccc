"""Tests of the Triton kernels: on a GPU where there is one, else in the interpreter (TRITON_INTERPRET=1), else not at all.

test_interpreter.py, one folder up, starts them in the interpreter: a process runs kernels either there or on a GPU, which
is settled when triton is imported. `pytest -m gpu tests/kernels/device` is the same on a GPU.

Tolerances are not written down but measured: against the same computation in fp64, a kernel may be at most twice as far off
as torch's own operators in the dtype of the inputs (Dao et al. test FlashAttention so), plus what the last bit of fp32 is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ALLOCATORS = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        for item in items:
            if "kernels/device" in str(item.path):
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is full of NaN (integers: of their largest value), so that what a kernel leaves unwritten is seen."""
    for place, name in ALLOCATORS:
        monkeypatch.setattr(place, name, _poisoned(getattr(place, name)))


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(make)
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        x = make(*args, **kwargs)
        if x.device.type == "meta":
            return x
        return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max if x.dtype != torch.bool else True)

    return poisoned


Function = Callable[..., Tensor | Sequence[Tensor]]


@pytest.fixture
def judge() -> Callable[..., None]:
    return compare


def compare(ours: Function, plain: Function, inputs: Sequence[Tensor], floor: float = 1e-6) -> None:
    """Outputs and all gradients of `ours` against `plain` in fp64, measured by the error of `plain` in the inputs' dtype.

    inputs: detached tensors of one floating dtype; every one gets a gradient. `plain` must compute in the dtype it is given.
    floor: allowed error in fp32, as a share of the largest value of that output or gradient.
    """
    exact = run(plain, [x.detach().double() for x in inputs])
    rough = run(plain, [x.detach().clone() for x in inputs])
    first = run(ours, [x.detach().clone() for x in inputs])
    again = run(ours, [x.detach().clone() for x in inputs])
    for name, want in exact.items():
        assert torch.equal(first[name], again[name]), f"{name}: a second run gave other bits"
        check_close(name, first[name], rough[name], want, floor)


def check_close(name: str, ours: Tensor, rough: Tensor, exact: Tensor, floor: float = 1e-6) -> None:
    """The error of `ours` is at most twice that of `rough`, plus `floor` times the largest value."""
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, wanted {tuple(exact.shape)}"
    assert not torch.isnan(ours).any() or torch.isnan(exact).any(), f"{name}: NaN (memory that was never written?)"
    if exact.numel() == 0:
        return
    error, allowed = ((x.double() - exact).abs().max().item() for x in (ours, rough))
    scale = exact.abs().max().item()
    assert error <= 2 * allowed + floor * scale, f"{name}: off by {error:.3g}, torch by {allowed:.3g}, largest {scale:.3g}"


def run(function: Function, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients of the inputs, under a loss in which every element has a weight of its own."""
    leaves = [x.requires_grad_() for x in inputs]
    result = function(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"gradient {i}": g for i, g in enumerate(gradients) if g is not None}
    return found
