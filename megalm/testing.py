"""Run a function on several ranks over gloo, for tests: `run_distributed(fn, world_size, *args)`."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import queue as queues
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

_PRELOAD = ["torch", "torch.distributed", "numpy"]  # imported once by the fork server, not once per rank


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 120) -> list[Any]:
    """Call `fn(rank, world_size, *args)` in `world_size` processes that form a gloo group; returns the results by rank.

    Raises AssertionError with the first failing rank's traceback, or when a rank does not end in time. `fn` must be
    importable (a module's top-level function); results must be picklable.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_run_rank, args=(fn, rank, world_size, f"{folder}/store", queue, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(queue, processes, world_size, timeout_seconds)
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()


def _collect(queue: Any, processes: list, world_size: int, timeout_seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(results) < world_size:
        try:
            rank, value, error = queue.get(timeout=0.2)
        except queues.Empty:
            dead = [i for i, p in enumerate(processes) if p.exitcode not in (None, 0)]
            if dead or time.monotonic() > deadline:
                waiting = [r for r in range(world_size) if r not in results]
                raise AssertionError(f"ranks {dead or waiting} {'died' if dead else 'did not end in time'}") from None
            continue
        if error:
            for process in processes:
                process.kill()
            raise AssertionError(f"rank {rank} of {world_size} failed:\n{error}")
        results[rank] = pickle.loads(value)  # of a process that this one has started
    return [results[rank] for rank in range(world_size)]


def _run_rank(fn: Callable[..., Any], rank: int, world_size: int, store: str, queue: Any, args: tuple) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu")
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    try:
        # As bytes: a queue would pass tensors as handles into memory of the rank, which has often gone when they are read.
        queue.put((rank, pickle.dumps(fn(rank, world_size, *args)), ""))
        dist.barrier()
        time.sleep(0.3)  # see bootstrap.stop_process_group
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
        raise
