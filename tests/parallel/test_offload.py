"""Activations that wait on a disk: the same bits, two blocks' worth here at a time, fetched one block ahead, no file left."""

from __future__ import annotations

import dataclasses
import errno
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from megalm.config.layouts import with_layout
from megalm.errors import RunError
from megalm.models.init import initial_value
from megalm.models.registry import build_model
from megalm.parallel import offload as module
from megalm.parallel.offload import Offload, apply_offload
from megalm.parallel.offload_stores import DiskStore
from megalm.parallel.recompute import apply_recompute
from megalm.testing import run_distributed
from tests.parallel.tiny import alone, tiny_config, train

CPU, BLOCKS, PARTS = torch.device("cpu"), 5, ["attention", "mlp", "norms"]


def model_of(offload: Offload | None, mode: str = "none") -> nn.Module:
    config = dataclasses.replace(tiny_config(layers=BLOCKS).model, dropout=0.1)
    model = build_model(config)
    for name, p in model.named_parameters():
        p.data.copy_(initial_value(name, tuple(p.shape), config, 3))
    apply_recompute(model, mode, 2, alone().tensor, PARTS, offload)
    apply_offload(model, offload)
    return model


def losses_of(model: nn.Module, microbatches: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(32, (microbatches, 2, 8), generator=generator)
    return [model(x, None, torch.arange(2)).square().mean() for x in tokens]


def gradients(model: nn.Module, microbatches: int = 3) -> list[Tensor]:
    """All forwards, then all backwards, the first first; twice, because selective recomputation learns in the first step."""
    for _ in range(2):
        model.zero_grad()
        for loss in losses_of(model, microbatches):
            loss.backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("mode", ["none", "full", "selective", "modules"])
def test_the_same_bits_and_no_file_left(mode: str, tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "new" / "folder", CPU)
    model = model_of(Offload(store, smallest=1), mode)
    for a, b in zip(gradients(model), gradients(model_of(None, mode)), strict=True):
        assert torch.equal(a, b)
    assert store.end > 0 and list((tmp_path / "new" / "folder").iterdir()) == []
    free = lambda: sum(size * len(places) for size, places in store.vacant.items())  # noqa: E731
    end = store.end
    gradients(model)
    store.writer.submit(lambda: None).result()
    assert store.end == end == free(), "places are used again, and all are free when nobody wants what is there"


class Halves(nn.Module):
    """A block that keeps two views of one storage: of its second half too."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        a, b = (x * 2).chunk(2, -1)
        return torch.cat((a.sin() * b * scale, (a * b).t().tanh().t()), -1)


def test_views_of_one_storage(tmp_path: Path) -> None:
    found, store = [], DiskStore(tmp_path, CPU)
    for offload in (None, Offload(store, smallest=1)):
        chunk = nn.Module()
        chunk.layers = nn.ModuleDict({str(i): Halves() for i in range(4)})
        apply_offload(chunk, offload)
        x = start = torch.linspace(-1, 1, 24).view(4, 6).requires_grad_()
        for layer in chunk.layers.values():
            x = layer(x, torch.tensor(0.5))
        x.square().sum().backward()
        found.append(start.grad)
    assert torch.equal(*found)


def test_evaluation_stores_nothing(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, CPU)
    with torch.no_grad():
        losses_of(model_of(Offload(store, smallest=1)))
    assert store.end == 0


# --- what happens when, by a store that writes it down ---------------------------------------------------------------


class Recorder:
    """Keeps what it is given in memory, and the order of events: (what, block). A block is known by its sends."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.blocks: dict[int, int] = {}  # shelf -> number
        self.sent: list[tuple[int, StorageWeakRef]] = []
        self.block = -1

    def note(self, what: str, block: int) -> None:
        if (what, block) not in self.events[-1:]:
            self.events.append((what, block))

    def put(self, data: Tensor) -> Any:
        if not self.events or self.events[-1][0] != "send":
            self.block += 1
        self.note("send", self.block)
        self.sent.append((self.block, StorageWeakRef(data.untyped_storage())))
        return _Kept(self, self.block, data.clone())


class _Kept:
    def __init__(self, recorder: Recorder, block: int, copy: Tensor):
        self.recorder, self.block, self.copy = recorder, block, copy

    def settle(self) -> None:
        self.recorder.note("settle", self.block)

    def fetch(self) -> None:
        self.recorder.note("fetch", self.block)

    def take(self) -> Tensor:
        self.recorder.note("take", self.block)
        return self.copy


def test_sent_behind_a_block_and_fetched_one_block_ahead() -> None:
    recorder = Recorder()
    model = model_of(Offload(recorder, smallest=1))
    (loss,) = losses_of(model)
    assert recorder.events == [
        ("send", 0), ("settle", 0), ("send", 1), ("settle", 1), ("send", 2), ("settle", 2), ("send", 3),
    ], "the last block's stay, those of the one before are here still"  # fmt: skip
    gone = {block: all(ref.expired() for at, ref in recorder.sent if at == block) for block in range(4)}
    assert gone == {0: True, 1: True, 2: True, 3: False}
    recorder.events.clear()
    loss.backward()
    assert recorder.events == [("fetch", 2), ("fetch", 1), ("take", 2), ("fetch", 0), ("take", 1), ("take", 0)]


def test_each_storage_once_and_neither_parameters_nor_what_all_blocks_share() -> None:
    recorder = Recorder()
    model = model_of(Offload(recorder, smallest=1))
    loss = sum(losses_of(model, 2))  # the second forward sends the rest of the first
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    sent = [ref.cdata for _, ref in recorder.sent]
    assert len(sent) == len(set(sent)) and not parameters & set(sent)
    for p in model.parameters():  # as ZeRO-3 does between forward and backward
        p.kept, p.data = p.data, torch.empty(0)
    for p in model.parameters():
        p.data = p.kept
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


# --- a disk that does not do what it should --------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"train\.offload_path = [^:]*rule: +cannot write") as caught:
        DiskStore(tmp_path / "file" / "folder", CPU)
    assert "train.offload_path=<another folder>" in str(caught.value)


def failing(call: Callable, after: int, error: int) -> Callable:
    """A system call that fails from its n-th use on."""
    count = iter(range(10**6))

    def fails(*arguments: Any) -> Any:
        if next(count) >= after:
            raise OSError(error, os.strerror(error))
        return call(*arguments)

    return fails


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(Offload(DiskStore(tmp_path, CPU), smallest=1))
    monkeypatch.setattr(os, "pwrite", failing(os.pwrite, 20, errno.ENOSPC))
    with pytest.raises(RunError, match="No space left on device"):
        gradients(model)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(Offload(DiskStore(tmp_path, CPU), smallest=1))
    monkeypatch.setattr(os, "preadv", failing(os.preadv, 3, errno.EIO))
    with pytest.raises(RunError, match=r"cannot read back what was written there: Input/output error"):
        gradients(model)


def test_calls_that_do_a_part_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda handle, data, place: write(handle, data[:100], place))
    monkeypatch.setattr(os, "preadv", lambda handle, data, place: read(handle, [data[0][:100]], place))
    for a, b in zip(gradients(model_of(Offload(DiskStore(tmp_path, CPU), 1))), gradients(model_of(None)), strict=True):
        assert torch.equal(a, b)


def test_the_file_is_closed_with_the_model(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, CPU)
    model, handle = model_of(Offload(store, smallest=1)), store.handle
    losses_of(model)
    del model, store
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)


# --- several ranks ----------------------------------------------------------------------------------------------------

CASES = [("tp2_sp", "llama", "none"), ("pp2_zbv", "llama", "selective"), ("dp2_zero3_microbatch", "gpt", "none")]


def _layouts(rank: int, size: int, folder: Path) -> list[str]:
    """Short runs with and without; what differs."""
    faults, module.SMALLEST_OFFLOADED = [], 512
    for layout, architecture, recompute in CASES:
        values = dataclasses.asdict(with_layout(tiny_config(), layout).parallel)
        results = []
        for where, mode in (("none", "none"), ("disk", recompute)):
            config = tiny_config(architecture, layers=4, batch=4, **values)
            config.train.recompute, config.train.offload_activations, config.train.offload_path = mode, where, str(folder)
            trained = train(config, steps=2)
            results.append((trained.losses, trained.norms, trained.weights()))
            same = all(torch.equal(value, results[0][2][name]) for name, value in results[-1][2].items())
            if results[-1][:2] != results[0][:2] or not same:
                faults.append(f"{layout} {mode}: {results[-1][:2]} != {results[0][:2]}")
    return faults


@pytest.mark.dist
def test_the_same_bits_on_several_ranks(tmp_path: Path) -> None:
    assert run_distributed(_layouts, 2, tmp_path) == [[], []]
    assert list(tmp_path.iterdir()) == []
