"""Pipeline: draw a schedule and say what it costs, without running it and without torch."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

from megalm.config.parallel import SPLIT_BACKWARD, USUALLY_TWO
from megalm.config.tasks import PipelineConfig, PipelineRun
from megalm.launchers.app import run_verb

if TYPE_CHECKING:
    from megalm.parallel.actions import Schedule
    from megalm.parallel.timeline import Timeline, Times

_LEGEND = "F forward  B backward  I its inputs' half  W its weights' half; small letters: a later chunk; . idle"


def show(config: PipelineRun) -> None:
    """Prints the drawing, bubble and memory, and the table of all schedules; writes the files that are asked for."""
    from megalm.parallel.schedule_check import check_schedule
    from megalm.parallel.schedule_file import write_schedule
    from megalm.parallel.schedule_picture import Panel, draw_text, save_picture, shows_all
    from megalm.parallel.schedules import build_schedule
    from megalm.parallel.timeline import simulate

    parallel, options = config.parallel, config.pipeline
    name, ranks, chunks = parallel.schedule, parallel.pipeline_parallel, parallel.chunks
    schedule = build_schedule(name, ranks, options.num_microbatches, chunks, parallel.schedule_file)
    check_schedule(schedule)
    timeline = simulate(schedule, _times(options).per_chunk(chunks))
    title = f"{name}: {ranks} ranks x {chunks} chunk{'s' if chunks > 1 else ''}, {options.num_microbatches} microbatches"
    width = options.width or shutil.get_terminal_size((100, 24)).columns
    print(f"{title}\n{draw_text(timeline, width, sys.stdout.isatty())}\n{_LEGEND}")
    if not shows_all(timeline, width):
        print("Several actions share a column: a wider terminal, width=400 or output=FILE.svg shows them all.")
    print(_summary(schedule, timeline, config))
    if options.compare:
        print(f"\n{_table(config)}")
    if options.output:
        save_picture(options.output, [Panel(f"{title}: bubble {timeline.bubble:.1%}", timeline)], "pipeline.output")
        print(f"\ndrawn to {options.output}")
    if options.csv:
        write_schedule(schedule, options.csv)
        sizes = f"parallel.pipeline_parallel={ranks} parallel.chunks={chunks}"
        print(f"\nwritten to {options.csv}; run it with parallel.schedule=csv parallel.schedule_file={options.csv} {sizes}")
        print(f"and batch sizes that make {options.num_microbatches} microbatches (pipeline show: num_microbatches=...)")


def _times(options: PipelineConfig) -> Times:
    from megalm.parallel.timeline import Times

    return Times(options.forward_time, options.input_time, options.weight_time)


def _summary(schedule: Schedule, timeline: Timeline, config: PipelineRun) -> str:
    from megalm.parallel.timeline import peaks, published_idle

    name, options, chunks = config.parallel.schedule, config.pipeline, schedule.num_chunks
    times = _times(options).per_chunk(chunks)
    published = published_idle(name, schedule.num_ranks, schedule.num_microbatches, chunks, times)
    said = f"; published: {published / (published + max(timeline.busy)):.1%}" if published is not None else ""
    held = peaks(schedule)
    by_rank = ", ".join(f"{count / chunks:g}" for count in held[:16]) + (", ..." if len(held) > 16 else "")
    return "\n".join(
        [
            f"bubble      {timeline.bubble:.1%} of the step ({timeline.idle:g} of {timeline.makespan:g}){said}",
            f"            {timeline.inner_bubble:.1%} between a rank's first and last action",
            f"activations {max(held) / chunks:g} microbatches of a rank's layers at most (by rank: {by_rank})",
        ]
    )


def _table(config: PipelineRun) -> str:
    """All schedules of the same sizes, the chosen one marked."""
    from megalm.parallel.schedules import SCHEDULES, build_schedule
    from megalm.parallel.timeline import peaks, simulate

    parallel, options = config.parallel, config.pipeline
    head = f"{'chunks':>6}{'step time':>11}{'bubble':>9}{'inside':>9}{'activations':>13}{'sends':>8}  backward"
    lines = [f"  {'schedule':<12}{head}"]
    for name in [*SCHEDULES, *(["csv"] if parallel.schedule == "csv" else [])]:
        chosen = name == parallel.schedule
        chunks = 2 if name in USUALLY_TWO else 1
        if chosen or (name in ("interleaved", "bfs") and parallel.chunks > 1):
            chunks = parallel.chunks
        schedule = build_schedule(name, parallel.pipeline_parallel, options.num_microbatches, chunks, parallel.schedule_file)
        timeline = simulate(schedule, _times(options).per_chunk(chunks))
        sends = sum(a != b for a, b in zip(schedule.ranks_of_stages, schedule.ranks_of_stages[1:], strict=False))
        lines.append(
            f"{'*' if chosen else ' '} {name:<12}{chunks:>6}{timeline.makespan:>11.4g}{timeline.bubble:>9.1%}"
            f"{timeline.inner_bubble:>9.1%}{max(peaks(schedule)) / chunks:>13.4g}{2 * sends:>8}"
            f"  {'in halves' if name in SPLIT_BACKWARD else 'whole' if name != 'csv' else 'as written'}"
        )
    notes = [
        "bubble: idle share of the step. inside: the same between a rank's own first and last action, as the papers on zero",
        "bubble count it. activations: microbatches of a rank's layers held at once, on the worst rank. sends: per microbatch.",
    ]
    return "\n".join([*lines, *notes])


def main() -> None:
    """`megalm pipeline show ...`."""
    run_verb("pipeline", show)


if __name__ == "__main__":
    main()
