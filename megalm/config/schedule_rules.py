"""The rules about pipeline schedules: they need no more of a config than its section `parallel`."""

from __future__ import annotations

from megalm.config.fields import assign
from megalm.config.fixes import Rule
from megalm.config.parallel import CHUNKED, TWO_CHUNKS
from megalm.config.tasks import PipelineRun
from megalm.errors import Problem

_PP, _CHUNKS, _SCHEDULE, _FILE = (
    f"parallel.{name}" for name in ("pipeline_parallel", "chunks", "schedule", "schedule_file")
)

RULES: tuple[Rule, ...] = (
    Rule(
        "chunks_schedule",
        (_CHUNKS, _SCHEDULE),
        f"{_CHUNKS} > 1 needs {_SCHEDULE}={', '.join(CHUNKED[:-1])} or {CHUNKED[-1]}",
        lambda c: c.parallel.chunks == 1 or c.parallel.schedule in CHUNKED,
        lambda c: [(_CHUNKS, 1), (_SCHEDULE, "interleaved")],
    ),
    Rule(
        "interleaved_chunks",
        (_SCHEDULE, _CHUNKS),
        f"{_SCHEDULE}=interleaved needs {_CHUNKS} > 1: with one chunk it is 1f1b",
        lambda c: c.parallel.schedule != "interleaved" or c.parallel.chunks > 1,
        lambda c: [(_SCHEDULE, "1f1b"), (_CHUNKS, 2)],
    ),
    Rule(
        "two_chunks",
        (_SCHEDULE, _CHUNKS),
        f"{_SCHEDULE}={' and '.join(TWO_CHUNKS)} need {_CHUNKS}=2: the model goes down the ranks and back up",
        lambda c: c.parallel.schedule not in TWO_CHUNKS or c.parallel.chunks == 2,
        lambda c: [(_CHUNKS, 2), (_SCHEDULE, "interleaved"), (_SCHEDULE, "1f1b")],
    ),
    Rule(
        "chunks_stages",
        (_CHUNKS, _PP),
        f"{_CHUNKS} > 1 needs {_PP} > 1",
        lambda c: c.parallel.chunks == 1 or c.parallel.pipeline_parallel > 1,
        lambda c: [(_CHUNKS, 1), (_PP, 2)],
    ),
    Rule(
        "schedule_file_given",
        (_SCHEDULE, _FILE),
        f"{_SCHEDULE}=csv needs {_FILE}; `megalm pipeline show {_SCHEDULE}=1f1b csv=FILE` writes one to start from",
        lambda c: c.parallel.schedule != "csv" or bool(c.parallel.schedule_file),
        lambda c: [(_FILE, "schedule.csv"), (_SCHEDULE, "1f1b")],
    ),
    Rule(
        "schedule_file_used",
        (_FILE, _SCHEDULE),
        f"{_FILE} has an effect with {_SCHEDULE}=csv only",
        lambda c: not c.parallel.schedule_file or c.parallel.schedule == "csv",
        lambda c: [(_SCHEDULE, "csv"), (_FILE, "")],
    ),
)


def picture_problems(config: PipelineRun) -> list[Problem]:
    """A picture's file says by its name what it is."""
    output = config.pipeline.output
    if output.endswith((".svg", ".png")) or not output:
        return []
    return [Problem("pipeline.output", output, "must end in .svg or .png", fix=assign("pipeline.output", f"{output}.svg"))]
