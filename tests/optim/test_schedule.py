"""The learning rate at the corners of its five shapes, and between them."""

from __future__ import annotations

import math

import pytest

from megalm.config.optim import LR_SCHEDULES, OptimConfig
from megalm.optim.schedule import learning_rate

TOTAL = 100


def rate(step: int, schedule: str = "cosine", **settings: float) -> float:
    defaults = dict(lr=1.0, min_lr=0.1, warmup_steps=10)
    return learning_rate(step, OptimConfig(schedule=schedule, **{**defaults, **settings}), TOTAL)  # type: ignore[arg-type]


EVERY = pytest.mark.parametrize("schedule", LR_SCHEDULES)


@EVERY
def test_warm_up_begins_above_zero_and_ends_at_the_peak(schedule: str) -> None:
    assert [rate(step, schedule) for step in range(10)] == pytest.approx([n / 10 for n in range(1, 11)])


@EVERY
def test_without_warm_up_the_first_step_has_the_peak(schedule: str) -> None:
    assert rate(0, schedule, warmup_steps=0) == 1.0


@EVERY
def test_no_jump_where_the_warm_up_ends(schedule: str) -> None:
    assert 0.94 < rate(10, schedule) <= rate(9, schedule) == 1.0


@EVERY
def test_it_never_rises_after_the_warm_up_nor_falls_below_the_end(schedule: str) -> None:
    rates = [rate(step, schedule) for step in range(9, 3 * TOTAL)]
    assert rates == sorted(rates, reverse=True)
    assert min(rates) >= 0.1


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize(("settings", "end"), [({}, TOTAL), ({"decay_steps": 60}, 60), ({"decay_steps": 160}, 160)])
def test_the_decay_ends_at_its_step_and_stays_there(schedule: str, settings: dict, end: int) -> None:
    assert rate(end - 1, schedule, **settings) > 0.1
    for step in (end, end + 1, 10 * end):
        assert rate(step, schedule, **settings) == pytest.approx(0.1)


def test_cosine() -> None:
    assert rate(10) == 1.0
    assert rate(55) == pytest.approx(0.55)  # halfway
    assert rate(10 + 90 // 3) == pytest.approx(0.1 + 0.9 * 0.75)  # cos 60 degrees = 1/2


def test_linear() -> None:
    assert [rate(step, "linear") for step in (10, 55, 91)] == pytest.approx([1.0, 0.55, 0.19])


def test_constant() -> None:
    assert {rate(step, "constant") for step in (9, 10, 99, 100, 10**6)} == {1.0}


def test_inverse_sqrt() -> None:
    assert rate(9, "inverse_sqrt") == 1.0
    assert rate(39, "inverse_sqrt") == pytest.approx(0.5)  # the 40th step: sqrt(10 / 40)
    assert rate(159, "inverse_sqrt") == pytest.approx(0.25)
    assert rate(10**6, "inverse_sqrt") == 0.1  # the floor
    assert rate(3, "inverse_sqrt", warmup_steps=0) == pytest.approx(0.5)


def test_wsd() -> None:
    assert {rate(step, "wsd") for step in (10, 50, 89, 90)} == {1.0}  # stable until a tenth is left
    assert rate(95, "wsd") == pytest.approx(0.55)
    assert rate(80, "wsd", wsd_decay_steps=40) == pytest.approx(0.55)
    assert rate(60, "wsd", wsd_decay_steps=40) == 1.0
    assert rate(10, "wsd", wsd_decay_steps=95) == 1.0  # a decay that is too long begins after the warm-up
    assert rate(15, "wsd", decay_steps=20) == 1.0 > rate(19, "wsd", decay_steps=20)


@pytest.mark.parametrize("settings", [{"warmup_steps": 100}, {"warmup_steps": 100, "decay_steps": 50}, {"warmup_steps": 200}])
@EVERY
def test_a_warm_up_as_long_as_the_run_divides_by_nothing(schedule: str, settings: dict) -> None:
    for step in (0, 49, 99, 100, 101, 199, 200, 201):
        value = rate(step, schedule, **settings)
        assert math.isfinite(value) and 0 < value <= 1
