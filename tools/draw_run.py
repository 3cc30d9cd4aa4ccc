"""Draw docs/images/run.svg: `python tools/draw_run.py [-o FILE]`: a run of three starts, and what its time went into.

The numbers are made up; the chart is the one of `megalm report`, drawn by the same code.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megalm.observe.chart import draw
from megalm.observe.curves import clock_chart
from megalm.observe.folder import Run
from megalm.observe.starts import starts_of, times_of
from megalm.observe.style import STYLE

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "run.svg"
HOUR, EVERY = 3600.0, 100  # seconds; steps between log lines
WIDTH, HEIGHT, FOOT = 900, 300, 40  # pixels; the line below the chart
# (hour at which it began, first step, last step, how it ended, steps of it that counted)
LIVES = (
    (0.0, 0, 10_000, "stopping", 10_000),
    (13.0, 10_000, 17_000, "failed", 15_000),
    (21.0, 15_000, 24_000, "finished", 24_000),
)
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def make_run() -> Run:
    """A step takes 3.6 s: 1,000 steps in an hour."""
    run = Run(Path("example"), finished=True)
    for hour, first, last, kind, counted in LIVES:
        ended = hour + (last - first) / 1000
        run.events.append({"kind": "started", "time": hour * HOUR, "step": first, "attempt": str(len(run.events) // 2)})
        run.events.append({"kind": kind, "time": ended * HOUR, "step": last})
        for step in range(first + EVERY, counted + 1, EVERY):
            run.columns.setdefault("time", []).append((step, (hour + (step - first) / 1000) * HOUR))
            run.columns.setdefault("seconds_per_step", []).append((step, HOUR / 1000))
    return run


def picture() -> str:
    run = make_run()
    starts = starts_of(run)
    times = times_of(run, starts, runs_on=True)
    assert times is not None and times.effective is not None
    chart = draw(clock_chart(run, starts, times), WIDTH, HEIGHT, "run")
    text = (
        f"{times.counted / HOUR:.0f} h of steps that counted in {times.wall / HOUR:.0f} h: effective time {times.effective:.0%}"
    )
    whole = HEIGHT + FOOT
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {whole}" font-family="{FONT}"',
            f' width="{WIDTH}" height="{whole}">',
            f"<style>{STYLE}</style>",
            f'<rect width="{WIDTH}" height="{whole}" rx="10" fill="var(--card)"/>',
            chart.replace("<svg ", f'<svg width="{WIDTH}" height="{HEIGHT}" ', 1),
            f'<text x="54" y="{HEIGHT + 22}" font-size="13">{text}</text>',
            "</svg>\n",
        ]
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Draw the picture of docs/observe.md.")
    parser.add_argument("-o", "--output", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    options.output.write_text(picture(), encoding="utf-8")
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
