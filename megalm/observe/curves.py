"""Which curves the page of a run shows."""

from __future__ import annotations

from itertools import pairwise

from megalm.observe.chart import Chart, Line, Mark
from megalm.observe.folder import Points, Run
from megalm.observe.parts import Figures
from megalm.observe.starts import Start, Times
from megalm.observe.words import count, duration, short

_SMALL = (  # metric, title, how a value is written, whether the axis starts at 0, style
    ("lr", "Learning rate", short, True, "c"),
    ("grad_norm", "Gradient norm, before clipping", short, False, "d"),
    ("tokens_per_second", "Throughput, tokens/s of all ranks", count, True, "a"),
    ("memory_bytes", "Peak memory of rank 0 so far, GiB", short, True, "b"),
    ("mfu", "Model FLOP utilisation", lambda v: f"{v:.1%}", True, "a"),
    ("valid_bits_per_byte", "Validation, bits per byte", short, False, "b"),
    ("loss_scale", "Loss scale", count, False, "c"),
)
_UNITS = ((172800.0, 86400.0, "days"), (7200.0, 3600.0, "hours"), (180.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


def marks_of(starts: list[Start]) -> list[Mark]:
    """Restarts, at the steps that they went on from."""
    return [
        Mark(after.first_step, f"start {after.attempt} went on from step {after.first_step:,}; before: {before.ending}")
        for before, after in pairwise(starts)
    ]


def loss(figures: Figures, run: Run, parent: Run | None, starts: list[Start]) -> str:
    """Training and validation loss across the page."""
    lines = []
    if parent is not None:
        lines.append(Line("parent, training", parent.column("loss"), "p", smooth=True))
        lines.append(Line("parent, validation", parent.column("valid_loss"), "p", dots=True))
    lines.append(Line("training", run.column("loss"), "a", smooth=True))
    lines.append(Line("validation", run.column("valid_loss"), "b", dots=True))
    caption = "Thick: running median. " if run.column("loss") else ""
    caption += "Red: the run was started again, from that step." if len(starts) > 1 else ""
    return figures.wide(Chart("Loss, nats per token", lines, marks_of(starts), reach=run.step), caption)


def grid(figures: Figures, run: Run, parent: Run | None, starts: list[Start]) -> str:
    """The small ones; what the run did not measure is left out."""
    shown = []
    for key, title, say, from_zero, style in _SMALL:
        if run.column(key):
            noisy = key == "grad_norm"
            theirs = [Line("parent", _scaled(parent, key), "p", smooth=noisy)] if parent is not None else []
            lines = [*theirs, Line("this run", _scaled(run, key), style, dots=key.startswith("valid"), smooth=noisy)]
            chart = Chart(title, lines, marks_of(starts), say_y=say, from_zero=from_zero, reach=run.step)
            shown.append(figures.small(chart))
    return f'<div class="grid">{"".join(shown)}</div>' if shown else ""


def _scaled(run: Run, key: str) -> Points:
    """A metric; bytes as GiB, so that the axis has round numbers."""
    return [(step, value / 2**30) for step, value in run.column(key)] if key == "memory_bytes" else run.column(key)


def clock(figures: Figures, run: Run, starts: list[Start], times: Times) -> str:
    """Steps over the time of day, with the gaps between the starts."""
    chart = clock_chart(run, starts, times)
    return figures.wide(chart, "Only steps that counted. Red: no start was there." if chart.bands else "")


def clock_chart(run: Run, starts: list[Start], times: Times) -> Chart:
    """Time since the first start, in a unit that suits it, and the step that counted then."""
    _, unit, name = next(entry for entry in _UNITS if times.wall >= entry[0])
    known = [*((time, step) for step, time in run.column("time")), *((start.began, float(start.first_step)) for start in starts)]
    points = sorted(((time - times.began) / unit, step) for time, step in known)
    points = [point for point in points if 0 <= point[0] <= times.wall / unit * 1.01]
    gaps = [((a.ended - times.began) / unit, (b.began - times.began) / unit) for a, b in pairwise(starts) if b.began > a.ended]
    marks = [Mark((s.began - times.began) / unit, f"start {s.attempt}, from step {s.first_step:,}") for s in starts[1:]]
    line = [Line("step", points, "a")] if len(points) > 1 else []
    title = f"Steps over {duration(times.wall)}"
    return Chart(title, line, marks, say_y=count, name_x=name, bands=gaps, from_zero=True, reach=times.wall / unit)


def experts(figures: Figures, run: Run, starts: list[Start]) -> str:
    """What the routers did."""
    marks = marks_of(starts)
    loads = [Line("fullest expert", run.column("moe_max_load"), "b"), Line("emptiest", run.column("moe_min_load"), "a")]
    charts = [Chart("Experts' loads, 1 is even", loads, marks, from_zero=True, reach=run.step)]
    for key, title, style in (
        ("moe_dropped", "Share of choices dropped", "b"),
        ("moe_entropy", "Router entropy, nats", "c"),
        ("moe_aux_loss", "Balance loss", "d"),
    ):
        charts.append(Chart(title, [Line("mean of the layers", run.column(key), style)], marks, reach=run.step))
    shown = "".join(figures.small(chart) for chart in charts)
    return f'<div class="grid">{shown}</div>' if shown else ""
