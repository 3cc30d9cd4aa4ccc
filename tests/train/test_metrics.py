"""Speed from a clock that the test holds; peaks by name."""

from __future__ import annotations

import pytest
import torch

from megalm.models.count import count_flops_per_token
from megalm.train import metrics
from megalm.train.metrics import SpeedMeter, peak_memory_bytes


class Clock:
    now = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: Clock.now)
    Clock.now = 100.0
    return Clock()


def test_speed_since_the_last_look(make, clock: Clock) -> None:
    config = make("run", {"train.device_peak_tflops": 1e-6})
    meter, flops = SpeedMeter(config, 4, torch.device("cpu")), count_flops_per_token(config.model, 16)
    for seconds, steps, pause in ((8.0, 4, 0.0), (3.0, 2, 2.0)):
        for _ in range(steps):
            meter.count_step()
        Clock.now += seconds
        meter.pause(pause)
        speed, each = meter.read(), (seconds - pause) / steps
        assert speed.seconds_per_step == pytest.approx(each)
        assert speed.tokens_per_second == pytest.approx(4 * 16 / each)
        assert speed.tflops_per_rank == pytest.approx(4 * 16 / each * flops / 4 / 1e12)
        assert speed.mfu == pytest.approx(speed.tflops_per_rank / 1e-6)


@pytest.mark.parametrize(("steps", "expected"), [(1, 9.0), (3, 1.0)])
def test_a_slow_step_counts_only_where_there_is_no_other(make, clock: Clock, steps: int, expected: float) -> None:
    meter = SpeedMeter(make(), 1, torch.device("cpu"))
    meter.leave_out(9.0)
    for seconds in (9.0, 1.0, 1.0)[:steps]:
        Clock.now += seconds
        meter.count_step()
    assert meter.read().seconds_per_step == pytest.approx(expected)
    meter.count_step()
    Clock.now += 4
    assert meter.read().seconds_per_step == pytest.approx(4)


def test_without_a_peak_there_is_no_mfu(make, clock: Clock) -> None:
    meter = SpeedMeter(make(), 1, torch.device("cpu"))
    meter.count_step()
    Clock.now += 1
    assert meter.read().mfu is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("Some new device", 0.0),
    ],
)
def test_peaks_by_name(name: str, peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert metrics._known_peak(torch.device("cuda", 0)) == peak


def test_memory_is_what_this_process_holds() -> None:
    assert 50 * 2**20 < peak_memory_bytes(torch.device("cpu")) < 2**40
