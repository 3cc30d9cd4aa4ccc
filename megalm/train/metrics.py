"""Numbers of a step that are not the model's: speed, FLOP/s, MFU, memory."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import torch

from megalm.config.run import RunConfig
from megalm.models.count import count_flops_per_token

# Dense bf16 peak in TFLOP/s by a part of the device's name, most specific first. Source: NVIDIA's data sheets.
_PEAK_TFLOPS = {
    "H200 NVL": 835.5, "H100 NVL": 835.5, "H100 PCIe": 756.0, "H200": 989.4, "H100": 989.4, "A100": 312.0, "L40S": 362.0,
    "B200": 2250.0,
}  # fmt: skip


@dataclass(frozen=True)
class Speed:
    """Of the steps since the last look."""

    seconds_per_step: float
    tokens_per_second: float  # all ranks
    tflops_per_rank: float  # model FLOPs, no recomputation
    mfu: float | None  # of the device's dense bf16 peak; None: peak not known


class SpeedMeter:
    """Measures from look to look."""

    def __init__(self, config: RunConfig, world_size: int, device: torch.device):
        self.tokens_per_step = config.train.global_batch_size * config.data.seq_length
        self.flops_per_token = count_flops_per_token(config.model, config.data.seq_length)
        self.peak_tflops = config.train.device_peak_tflops or _known_peak(device)
        self.world_size, self.steps, self.start = world_size, 0, time.perf_counter()
        self.slow: list[float] = []  # seconds of steps that do not count

    def count_step(self) -> None:
        self.steps += 1

    def pause(self, seconds: float) -> None:
        """Leave out time that was not spent on training (evaluation, checkpoints)."""
        self.start += seconds

    def leave_out(self, seconds: float) -> None:
        """A step, not counted yet, that was slowed down on purpose: it does not count, unless there is no other."""
        self.slow.append(seconds)

    def read(self) -> Speed:
        """Speed since the last call."""
        slow = self.slow if len(self.slow) < self.steps else []
        seconds = max(1e-9, time.perf_counter() - self.start - sum(slow)) / max(1, self.steps - len(slow))
        self.steps, self.start, self.slow = 0, time.perf_counter(), []
        rate = self.tokens_per_step / seconds
        tflops = rate * self.flops_per_token / self.world_size / 1e12
        return Speed(seconds, rate, tflops, tflops / self.peak_tflops if self.peak_tflops else None)


def _known_peak(device: torch.device) -> float:
    """Dense bf16 peak of a GPU we know by name, TFLOP/s; 0 if we do not."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_TFLOPS.items() if part in name), 0.0)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this process has held: on the GPU, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
