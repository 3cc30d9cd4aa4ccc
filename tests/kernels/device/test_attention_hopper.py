"""The warp-specialised forward on a GPU of sm_90. In the interpreter, which knows no Gluon, only that it is left alone there.

tests/kernels/test_attention_hopper.py executes the same kernel in Python.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalm_kernels import compat
from megalm_kernels.attention import hopper
from megalm_kernels.attention.hopper_trial import CASES, Case, find_fault, make
from megalm_kernels.device.attention_hopper import forward

HERE = not compat.interpreting() and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HERE, reason="a Gluon kernel for sm_90, which the interpreter cannot run")


@pytest.mark.timeout(600)
def test_it_passes_its_trial_on_sm_90_and_is_not_used_elsewhere(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper, "_verdicts", {})
    monkeypatch.setattr(compat, "cache_folder", lambda: tmp_path)
    assert hopper.ready(device) == HERE, hopper.state()
    assert len(list(tmp_path.glob("*.json"))) == HERE


@needs_hopper
@pytest.mark.parametrize("case", CASES, ids=str)
def test_formula(case: Case, device: torch.device) -> None:
    assert find_fault(forward, device, [case]) == ""


@needs_hopper
def test_every_number_of_blocks(device: torch.device) -> None:
    """The rings go round another number of times, and end in another buffer."""
    cases = [
        Case((1, 256, keys, 8, 4, channels), causal)
        for keys in range(256, 1280, 128)
        for channels in hopper.HEAD_DIMS
        for causal in (False, True)
    ]
    assert find_fault(forward, device, cases, repeats=2) == ""


@needs_hopper
@pytest.mark.parametrize("channels", hopper.HEAD_DIMS)
@pytest.mark.parametrize("causal", [False, True])
def test_thirty_runs_give_the_same_bits(channels: int, causal: bool, device: torch.device) -> None:
    """Several waves of programs, so that they start and end at all times."""
    inputs = (*make(Case((4, 2048, 2048, 32, 8, channels), causal), device), -1, 0 if causal else -1, channels**-0.5)
    out, lse = forward(*inputs)
    assert not torch.isnan(out).any() and not torch.isnan(lse).any()
    for _ in range(29):
        again = forward(*inputs)
        assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@needs_hopper
def test_rows_of_a_fused_projection(device: torch.device) -> None:
    q, k, v = make(Case((2, 384, 384, 4, 2, 128), True), device)
    fused = torch.cat([x.flatten(2) for x in (q, k, v)], dim=-1)
    parts = [x.unflatten(-1, (-1, 128)) for x in fused.split([512, 256, 256], dim=-1)]
    want, got = forward(q, k, v, -1, 0, 0.1), forward(*parts, -1, 0, 0.1)
    assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])


@needs_hopper
def test_a_graph_replays_it(device: torch.device) -> None:
    inputs = (*make(Case((2, 512, 512, 8, 8, 64), True), device), -1, 0, 0.125)
    want = forward(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = forward(*inputs)
    for x in got:
        x.fill_(torch.nan)
    graph.replay()
    assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])
