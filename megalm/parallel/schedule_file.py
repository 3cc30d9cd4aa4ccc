"""A user's own schedule: a CSV file with one line per rank, its actions in the order in which it runs them.

A cell is stage, kind, microbatch: `0F3` is the forward of microbatch 3 on stage 0; B is a whole backward, I and W are its
halves (gradients of the inputs, then of the weights). Empty cells are idle time for the reader's eye: what an action
really waits for follows from what it needs. Two ranks, two microbatches, 1F1B:

    0F0,0F1,   ,0B0,   ,0B1
       ,1F0,1B0,1F1,1B1

The cells say where each stage lives: on the rank in whose line it stands. Every rank has `parallel.chunks` stages.
`megalm pipeline show parallel.schedule=... csv=FILE` writes any schedule in this form, to start from.
"""

from __future__ import annotations

import re
from pathlib import Path

from megalm.errors import ConfigError, Problem, writing
from megalm.parallel.actions import Action, Schedule
from megalm.parallel.schedule_check import check_schedule, find_faults

KEY = "parallel.schedule_file"
_CELL = re.compile(r"(\d{1,6})([FBIW])(\d{1,6})")
_REPORTED = 12  # problems; one slip can make hundreds


def read_schedule(path: str, ranks: int, microbatches: int, chunks: int) -> Schedule:
    """The schedule in a file, checked. Raises ConfigError naming the file, the line, the rule and the fix."""
    rows = _read_rows(path)
    _check_sizes(path, rows, ranks, microbatches)
    schedule = Schedule(ranks, chunks, microbatches, rows, _placement(path, rows, chunks))
    faults = find_faults(schedule)
    _raise(path, [(f"line {fault.rank + 1}: {fault.text}", _mend(fault.text)) for fault in faults])
    try:
        check_schedule(schedule)
    except ValueError as error:
        fix = "in the line of each such rank, move the action behind what it needs, or what it needs forward in its own line"
        raise ConfigError(Problem(KEY, path, f"{error} (rank r is line r + 1)", fix=fix)) from error
    return schedule


def write_schedule(schedule: Schedule, path: str) -> None:
    """Write a schedule so that `read_schedule` reads it. Raises RunError if the file cannot be written."""
    with writing(Path(path), "pipeline.csv"):
        Path(path).write_text("".join(",".join(map(str, actions)) + "\n" for actions in schedule.actions))


def _read_rows(path: str) -> tuple[tuple[Action, ...], ...]:
    """The actions of every line; empty lines at the end do not count."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(Problem(KEY, path, f"cannot read this file: {reason}", fix=f"{KEY}=<a CSV file>")) from error
    rows, faults = [], []
    for number, line in enumerate(text.rstrip().splitlines(), 1):
        cells = [cell.strip() for cell in line.split(",")]
        found = {cell: _CELL.fullmatch(cell) for cell in cells if cell}
        faults += [
            (f"line {number}: cannot read cell {cell[:20]!r}; a cell is stage, kind, microbatch: 0F3, 2I1, 2W1, 1B0", "")
            for cell, match in found.items()
            if match is None
        ]
        matches = [match for cell in cells if (match := found.get(cell))]
        rows.append(tuple(Action(match[2], int(match[1]), int(match[3])) for match in matches))
    _raise(path, faults)
    return tuple(rows)


def _check_sizes(path: str, rows: tuple[tuple[Action, ...], ...], ranks: int, microbatches: int) -> None:
    problems = []
    if len(rows) != ranks:
        rule = f"has {len(rows)} lines, and there are {ranks} pipeline ranks: a line is a rank"
        fix = f"parallel.pipeline_parallel={len(rows)}" if rows else f"a file with {ranks} lines"
        problems.append((rule, fix))
    number = 1 + max((action.microbatch for row in rows for action in row), default=-1)
    if rows and number != microbatches:
        rule = f"has {number} microbatches, and a step has {microbatches}"
        fix = f"a file for {microbatches}; or a train.global_batch_size (pipeline show: num_microbatches) that makes {number}"
        problems.append((rule, fix))
    _raise(path, problems)


def _placement(path: str, rows: tuple[tuple[Action, ...], ...], chunks: int) -> tuple[int, ...]:
    """The rank of every stage."""
    owner: dict[int, int] = {}
    faults: list[tuple[str, str]] = []
    for rank, row in enumerate(rows):
        for stage in dict.fromkeys(action.stage for action in row):
            other = owner.setdefault(stage, rank)
            if other != rank:
                rule = f"line {rank + 1}: stage {stage} is on line {other + 1} too; a stage lives on one rank"
                faults.append((rule, "all cells of a stage in one line"))
    _raise(path, faults)
    stages = len(rows) * chunks
    counts = [sum(1 for rank in owner.values() if rank == r) for r in range(len(rows))]
    fix = f"parallel.chunks={counts[0]}" if len(set(counts)) == 1 and counts[0] else f"{chunks} in every line"
    faults += [
        (f"line {rank + 1}: has {count} stages, and parallel.chunks is {chunks}", fix)
        for rank, count in enumerate(counts)
        if count != chunks
    ]
    _raise(path, faults)
    absent = [stage for stage in range(stages) if stage not in owner]
    if absent:
        wrong = max(owner)
        rule = f"line {owner[wrong] + 1}: stage {wrong} is there and stage {absent[0]} is not; stages are 0 to {stages - 1}"
        _raise(path, [(rule, "number the stages along the model from 0, without gaps")])
    return tuple(owner[stage] for stage in range(stages))


def _mend(text: str) -> str:
    if text.endswith("is missing"):
        return f"add {text.split()[0]} to this line"
    return "remove one of the two" if "twice" in text or "in halves" in text else "put it later in the line"


def _raise(path: str, faults: list[tuple[str, str]]) -> None:
    """ConfigError with one problem for each (rule, fix), if there are any."""
    if not faults:
        return
    problems = [Problem(KEY, path, rule, fix=fix) for rule, fix in faults[:_REPORTED]]
    if len(faults) > _REPORTED:
        problems.append(Problem(KEY, path, f"and {len(faults) - _REPORTED} more of the kind"))
    raise ConfigError(*problems)
