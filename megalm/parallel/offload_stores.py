"""Where activations wait: pinned memory of the host, or a file that has no name. Both take bytes and give them back."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megalm.errors import Problem, RunError, writing

_KEY = "train.offload_path"


class Away(Protocol):
    """Bytes that were sent away."""

    def settle(self) -> None:
        """Wait until they are stored. Raises RunError if they cannot be."""
        ...

    def fetch(self) -> None:
        """Begin to bring them back; call once, before `take`."""
        ...

    def take(self) -> Tensor:
        """The bytes (N,) uint8, on the device that they came from. Raises RunError if they cannot be read."""
        ...


class Store(Protocol):
    """Where bytes are sent."""

    def put(self, data: Tensor) -> Away:
        """Begin to store (N,) uint8. The caller keeps the data until it has settled, unless nobody wants it any more."""
        ...


class HostStore:
    """Pinned memory. Copies run on two streams of their own, one for each direction, which the hardware does at once."""

    def __init__(self, device: torch.device):
        self.out, self.back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def put(self, data: Tensor) -> _InHost:
        return _InHost(self, data)


class _InHost:
    def __init__(self, store: HostStore, data: Tensor):
        self.store, self.device = store, data.device
        self.host = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)  # torch keeps such memory for the next one
        store.out.wait_stream(torch.cuda.current_stream(data.device))  # which computes the data
        data.record_stream(store.out)  # a backward that comes first may let go of it before it is copied
        with torch.cuda.stream(store.out):
            self.host.copy_(data, non_blocking=True)
            self.stored = store.out.record_event()

    def settle(self) -> None:
        """Without it, the host would run ahead and ask for the memory of many blocks at once."""
        self.stored.synchronize()  # sync

    def fetch(self) -> None:
        """The memory is the computing stream's, so the copy waits for all that was launched there: one block ahead, not more."""
        self.here = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
        self.here.record_stream(self.store.back)
        self.store.back.wait_stream(torch.cuda.current_stream(self.device))
        self.store.back.wait_event(self.stored)
        with torch.cuda.stream(self.store.back):
            self.here.copy_(self.host, non_blocking=True)
            self.there = self.store.back.record_event()

    def take(self) -> Tensor:
        torch.cuda.current_stream(self.device).wait_event(self.there)
        here = self.here
        del self.here
        return here


class DiskStore:
    """A file in `folder`, which loses its name when it is made: however the process ends, its space is free again.

    One thread writes and one reads. Places in the file are used again by what has the same size, as activations have.
    """

    def __init__(self, folder: Path, device: torch.device):
        with writing(folder, _KEY):
            folder.mkdir(parents=True, exist_ok=True)
            file: Any = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  open for as long as the run
        self.folder, self.handle = folder, file.fileno()
        self.host = HostStore(device) if device.type == "cuda" else None
        self.writer, self.reader = (ThreadPoolExecutor(1, f"offload-{name}") for name in ("write", "read"))
        self.vacant: defaultdict[int, list[int]] = defaultdict(list)  # size -> places
        self.end = 0
        self.close = weakref.finalize(self, _close, file, self.writer, self.reader)

    def put(self, data: Tensor) -> _OnDisk:
        size = data.numel()
        if self.vacant[size]:
            place = self.vacant[size].pop()
        else:
            place, self.end = self.end, self.end + size
        return _OnDisk(self, data, place)


class _OnDisk:
    def __init__(self, store: DiskStore, data: Tensor, place: int):
        self.store, self.place, self.size, self.device = store, place, data.numel(), data.device
        staged = store.host.put(data) if store.host is not None else None
        self.written = store.writer.submit(_write, store.handle, data if staged is None else staged, place)
        weakref.finalize(self, _vacate, self.written, store.vacant[self.size], place).atexit = False

    def settle(self) -> None:
        with writing(self.store.folder, _KEY):
            self.written.result()

    def fetch(self) -> None:
        self.settle()
        self.being_read = self.store.reader.submit(_read, self.store.handle, self.size, self.place, self.device.type == "cuda")

    def take(self) -> Tensor:
        try:
            data = self.being_read.result()
        except OSError as error:
            rule = f"cannot read back what was written there: {error.strerror or error}"
            raise RunError(Problem(_KEY, self.store.folder, rule, "", f"{_KEY}=<a folder on another disk>")) from error
        del self.being_read
        return data.to(self.device, non_blocking=True)


def _write(handle: int, data: Tensor | _InHost, place: int) -> None:
    if isinstance(data, _InHost):
        data.settle()
        data = data.host
    rest = data.numpy().data
    while rest:
        done = os.pwrite(handle, rest, place)  # may be a part only: 2 GiB at the most
        rest, place = rest[done:], place + done


def _read(handle: int, size: int, place: int, pinned: bool) -> Tensor:
    data = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    rest = data.numpy().data
    while rest:
        done = os.preadv(handle, [rest], place)
        if done == 0:
            raise OSError(None, "the file ends too early")
        rest, place = rest[done:], place + done
    return data


def _vacate(written: Future[None], vacant: list[int], place: int) -> None:
    """Nobody wants these bytes any more: the place is free as soon as nothing is being written there."""
    written.cancel()
    written.add_done_callback(lambda _: vacant.append(place))


def _close(file: Any, *threads: ThreadPoolExecutor) -> None:
    for thread in threads:
        thread.shutdown(cancel_futures=True)
    file.close()
