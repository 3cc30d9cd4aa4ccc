"""A tape's fullest moments are those found by hand on small tapes, and those of real blocks, counted by the memory meter."""

from __future__ import annotations

import gc
from itertools import product
from typing import Any

import pytest
import torch

from megalm.config.model import ModelConfig
from megalm.models.activations import Setting, block_tape, chunk_of
from megalm.models.registry import build_model
from megalm.models.tape import Profile, Tape
from megalm.parallel.memory_meter import MemoryMeter
from megalm_kernels.linear_cross_entropy import default_chunk


def chain() -> Tape:
    """x (100) -> a (10) -> y (1); each operator needs what it read."""
    tape = Tape(100)
    tape.part = "first"
    tape.add("a", 10, "x", "x", costly=True)
    tape.part = "second"
    tape.add("y", 1, "a", "a")
    return tape


def test_a_chain_by_hand() -> None:
    """Forward: all is kept. Backward: x, and the gradients of x and a."""
    assert chain().profile() == Profile(kept=110, small=110, forward=111, backward=100 + 100 + 10)


def test_what_no_backward_needs_goes_when_it_was_read() -> None:
    for holds, most in (("", 150), ("x", 100 + 50 + 10)):
        tape = Tape(100)
        tape.add("a", 50, "x")
        tape.add("y", 10, "a", holds=holds)
        assert tape.profile().forward == most
        assert tape.profile().kept == 0


def test_work_counts_for_the_time_of_its_operator() -> None:
    tape = Tape(8)
    tape.add("a", 8, "x", "x", work=100, back=1000)
    tape.add("y", 8, "a", work=7)
    assert tape.profile().forward == 8 + 8 + 100
    assert tape.profile().backward == 8 + 8 + 8 + 1000  # x, gradients of a and x; not of y


@pytest.mark.parametrize(("passes", "most"), [(True, 24), (False, 32)])
def test_a_sum_hands_its_gradient_on(passes: bool, most: int) -> None:
    """y = x + m(x). Kept: x. In one memory: gradients of y, m and x, to which m's backward adds in new memory."""
    tape = Tape(8)
    tape.add("m", 8, "x", "x")
    tape.add("y", 8, "x m", passes=passes)
    assert tape.profile().backward == most


def test_a_view_has_no_memory_but_its_gradient_has() -> None:
    tape = Tape(10)
    tape.add("view", 0, "x", gradient=40)
    tape.add("y", 5, "view", "x")
    assert tape.profile() == Profile(kept=10, small=10, forward=15, backward=10 + 40 + 5)


def test_parts_of_one_product_live_as_long_as_the_last() -> None:
    """q and k are turned into copies; v holds the memory of all three."""
    tape = Tape(16)
    tape.split({"q": 8, "k": 2, "v": 2}, "x", "x", back=5)
    tape.add("q.turned", 8, "q")
    tape.add("k.turned", 2, "k")
    tape.add("y", 8, "q.turned k.turned v", "q.turned k.turned v")
    assert tape.profile().kept == 16 + 8 + 2 + 12
    assert tape.profile().forward == 16 + 12 + 8 + 2 + 8
    assert tape.waiting() == 16 + 12  # the input, and the gradients of the parts


@pytest.mark.parametrize(
    ("mode", "parts", "kept", "backward"),
    [("full", (), 100, 210), ("selective", (), 110, 210), ("modules", ("second",), 110, 210), ("modules", ("first",), 110, 210)],
)
def test_recomputation_by_hand(mode: str, parts: tuple[str, ...], kept: int, backward: int) -> None:
    """Selective keeps the costly a, which is read again; a part keeps what it reads. The backward of `a` needs the same."""
    profile = chain().profile(mode, parts)
    assert (profile.kept, profile.backward) == (kept, backward)


def test_a_part_is_made_again_by_itself() -> None:
    """A long middle part: not there until its backward, and not while that of the part behind it runs."""
    tape = Tape(10)
    for part, names in (("first", ("a", "b")), ("second", ("c", "d"))):
        tape.part = part
        for name in names:
            before = tape.operators[-1].makes[0] if tape.operators else "x"
            tape.add(name, 100, before, before)
    every = tape.profile()
    some = tape.profile("modules", ("first", "second"))
    assert (every.kept, some.kept) == (310, 110)  # x a b c; x b
    assert every.backward == 310 + 100 + 100  # gradients of d and c
    assert some.backward == 110 + 100 + 100 + 100  # c again; then the same two. In the first part a again, but b, c are gone
    full = tape.profile("full")
    assert (full.kept, full.backward) == (10, 10 + 300 + 100 + 100)  # all of it again at once


def test_a_second_forward_may_be_the_fullest_moment() -> None:
    tape = Tape(10)
    tape.add("y", 10, "x", "x", work=500)
    assert tape.profile().backward == 10 + 10 + 10
    assert tape.profile("full").backward == 10 + 10 + 500 + 10  # and the gradient of y


def test_small_tensors_are_told_apart() -> None:
    tape = Tape(1 << 20)
    tape.add("y", 8, "x", f"x {tape.keep('scale', (1 << 20) - 1)}")
    assert tape.profile().kept - tape.profile().small == 1 << 20


BLOCKS: dict[str, dict[str, Any]] = {
    "llama": {},
    "bf16": {},
    "gpt": {"architecture": "gpt", "num_kv_heads": 4, "dropout": 0.1},
    "latent": {
        "num_kv_heads": 4, "kv_latent_size": 48, "q_latent_size": 64, "head_dim": 48, "rope_head_dim": 16, "value_head_dim": 32,
    },
    "experts": {"num_experts": 4, "experts_per_token": 2, "expert_ffn_size": 96, "num_shared_experts": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_a_real_block_needs_as_much(name: str) -> None:
    """From the forward's start to its most, what it keeps, and the most of its backward, each counted to the byte."""
    shape = {"hidden_size": 128, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 352, "vocab_size": 8}
    config = ModelConfig(**(shape | BLOCKS[name]))
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    block, samples, length = build_model(config).to(dtype).layers["0"], 2, 256
    model, positions = build_model(config).to(dtype), torch.arange(length)
    for p in block.parameters():
        p.data.normal_(std=0.02)
        p.grad = torch.zeros_like(p)
    rope = model.rope(positions)
    x = torch.randn(samples, length, 128, dtype=dtype, requires_grad=True)
    gradient, meter = torch.ones_like(x), MemoryMeter()
    gc.collect()  # or what other tests left goes in between
    meter.start()
    y = block(x, rope, positions, torch.arange(samples), None)
    kept, forward = meter.now - meter.before, meter.peak - meter.before
    y.backward(gradient)
    meter.stop()
    setting = Setting(dtype.itemsize, samples * length, samples, gradient_bytes=dtype.itemsize)
    tape = block_tape(config, setting, bool(config.num_experts))
    tape.sizes["x"] = tape.gradients["y"] = 0  # which were there before
    profile = tape.profile()
    assert kept == pytest.approx(profile.kept + y.nbytes, rel=0.03)
    assert forward == pytest.approx(profile.forward, rel=0.03)
    assert meter.peak - meter.before == pytest.approx(max(profile.backward + y.nbytes, forward), rel=0.05)


def test_the_loss_is_expected_to_use_the_chunks_that_it_uses() -> None:
    """Both sides know the rule: this floor is without torch."""
    for tokens, size, vocab_size in product((1, 7, 2048, 5000, 65536), (4, 64, 4096), (11, 32768, 131072)):
        assert chunk_of(tokens, size, vocab_size) == default_chunk(tokens, size, vocab_size)
