"""What the config needs to know of this machine, without torch: its GPUs, and whether a launcher started us."""

from __future__ import annotations

import os
from pathlib import Path

from megalm.config.run import RunConfig

_INVISIBLE = ("-1", "NoDevFiles", "none", "void")


def count_gpus() -> int:
    """GPUs that CUDA would show to a process started here."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(list(Path("/dev").glob("nvidia[0-9]*")))
    names = [name.strip() for name in visible.split(",")]
    hidden = next((i for i, name in enumerate(names) if not name or name in _INVISIBLE), len(names))
    return hidden  # CUDA ignores everything behind the first invalid entry


def launched_processes() -> int:
    """World size that torchrun or srun has given this process; 0 where neither has started it."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "0"))
    return tasks if tasks > 1 else 0  # an interactive salloc shell is a step of one task


def uses_cuda(config: RunConfig) -> bool:
    """The run's tensors live on GPUs."""
    return config.cluster.device == "cuda" or (config.cluster.device == "auto" and count_gpus() > 0)


def processes(config: RunConfig) -> int:
    """World size: as set, else as launched, else one per GPU, else what one sample needs."""
    gpus = count_gpus() if uses_cuda(config) else 0
    return config.cluster.num_processes or launched_processes() or gpus or config.parallel.ranks_per_sample


def data_parallel(config: RunConfig) -> int:
    """Ranks that read other samples, at least 1."""
    return max(1, processes(config) // config.parallel.ranks_per_sample)


def replicas(config: RunConfig) -> int:
    """Ranks with the same weights, experts apart."""
    return data_parallel(config) * config.parallel.context_parallel
