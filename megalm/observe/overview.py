"""One look at a run: the numbers of `megalm status`, as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megalm.observe.folder import METRICS, Run
from megalm.observe.lines import read_tail
from megalm.observe.starts import Start, starts_of
from megalm.observe.verdict import Verdict, judge, last_sign
from megalm.observe.words import clean, count, duration, moment, number, short, told

_BAR, _STARTS, _LABEL = 40, 8, 13  # columns of the bar; starts that are listed; columns of the names
_COLOURS = {"finished": "32", "running": "32", "pruned": "33", "stopped": "33", "waiting": "33"}  # of the others: red


@dataclass(frozen=True)
class Overview:
    """Where a run is. Seconds, and seconds since the epoch."""

    run: Run
    verdict: Verdict
    starts: list[Start]
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    silent: float | None  # since the last sign of life


def look(run: Run, now: float, alive: bool | None) -> Overview:
    """What there is to say of a run that was read without its metrics: their last lines are enough."""
    tail = [record for record in read_tail(run.folder / METRICS) if number(record.get("step")) is not None]
    for key in ("loss", "tokens_per_second", "seconds_per_step", "time"):
        points = [(float(record["step"]), value) for record in tail if (value := number(record.get(key))) is not None]
        if points:
            run.columns.setdefault(key, points)
    loss = run.progress.get("loss", run.last("loss"))
    speed = run.progress.get("tokens_per_second", run.last("tokens_per_second"))
    sign, verdict, starts = last_sign(run), judge(run, now, alive), starts_of(run)
    left = _seconds_left(run, starts, speed) if verdict.state == "running" else None
    return Overview(run, verdict, starts, loss, speed, left, max(0.0, now - sign) if sign is not None else None)


def _seconds_left(run: Run, starts: list[Start], speed: float | None) -> float | None:
    """By the clock of the last lines of this start, so that evaluation and checkpoints are in; else by the speed of its steps."""
    left = run.steps - run.step
    if left <= 0:
        return None
    since = starts[-1].began if starts else 0.0
    clock = [(step, time) for step, time in run.column("time") if time >= since]
    if len(clock) >= 2 and clock[-1][0] > clock[0][0] and clock[-1][1] > clock[0][1]:
        return left * (clock[-1][1] - clock[0][1]) / (clock[-1][0] - clock[0][0])
    return left * run.tokens_per_step / speed if speed and run.tokens_per_step else None


def as_json(seen: Overview) -> dict[str, Any]:
    """Everything, for a program. Texts are as the files have them."""
    run = seen.run
    return {
        "run": str(run.folder),
        "state": seen.verdict.state,
        "why": seen.verdict.why,
        "exit_code": int(seen.verdict.code),
        "step": run.step,
        "steps": run.steps,
        "saved_step": int(run.progress.get("saved_step", run.checkpoints[-1] if run.checkpoints else 0)),
        "tokens": int(run.progress.get("tokens", 0)),
        "loss": seen.loss,
        "tokens_per_second": seen.tokens_per_second,
        "seconds_left": seen.seconds_left,
        "seconds_since_sign_of_life": seen.silent,
        "restarts": max(0, len(seen.starts) - 1),
        "starts": [asdict(start) for start in seen.starts],
        "checkpoints": run.checkpoints,
        "events": run.events[-100:],
        "reports": [name for name, _ in run.failures],
        "notes": run.notes,
    }


def as_text(seen: Overview, events: int, now: float, colour: bool) -> str:
    """A screen. `events`: how many of the last ones."""
    run, verdict = seen.run, seen.verdict
    state = verdict.state.upper()
    if colour:
        state = f"\x1b[1;{_COLOURS.get(verdict.state, '31')}m{state}\x1b[0m"
    lines = [f"{clean(str(run.folder))}  {state}{': ' + clean(verdict.why) if verdict.why else ''}", "", _bar(run)]
    facts = {
        "loss": short(seen.loss) if seen.loss is not None else "-",
        "speed": f"{count(seen.tokens_per_second)} tokens/s" if seen.tokens_per_second else "-",
        "tokens": count(run.progress["tokens"]) if run.progress.get("tokens") else "-",
        "to go": f"{duration(seen.seconds_left)}, done {moment(now + seen.seconds_left)}" if seen.seconds_left else "-",
        "sign of life": f"{duration(seen.silent)} ago" if seen.silent is not None else "none",
        "checkpoints": _checkpoints(run),
        "restarts": str(max(0, len(seen.starts) - 1)),
    }
    lines += [f"{name:{_LABEL}} {value}" for name, value in facts.items() if value != "-"]
    if seen.starts:
        lines += ["", f"{'start':8}{'at':21}{'steps':20}{'for':14}{'on':18}how it ended", *_start_lines(seen)]
    if run.failures and verdict.state not in ("running", "finished", "pruned"):
        lines += ["", f"what the ranks were doing: {clean(str(run.folder / run.failures[0][0]))}"]
    if events and run.events:
        lines += ["", "last events"]
        lines += [f"  {moment(event['time'])}  {clean(event['kind'], 20):10} {told(event)}" for event in run.events[-events:]]
    return "\n".join([*lines, *(f"note: {clean(note)}" for note in run.notes)])


def as_line(seen: Overview) -> str:
    """For a log, where nobody looks at a screen."""
    run = seen.run
    parts = [seen.verdict.state, f"step {run.step:,} of {run.steps:,}"]
    parts += [f"loss {short(seen.loss)}"] if seen.loss is not None else []
    parts += [f"{count(seen.tokens_per_second)} tokens/s"] if seen.tokens_per_second else []
    parts += [f"{duration(seen.seconds_left)} to go"] if seen.seconds_left else []
    return "  ".join([*parts, clean(seen.verdict.why)]).rstrip()


def _bar(run: Run) -> str:
    share = min(1.0, run.step / run.steps) if run.steps > 0 else 0.0
    full = int(share * _BAR)
    of = f" of {run.steps:,}, {share:.1%}" if run.steps > 0 else ""
    return f"[{'#' * full}{'-' * (_BAR - full)}] step {run.step:,}{of}"


def _checkpoints(run: Run) -> str:
    steps = run.checkpoints or ([int(run.progress["saved_step"])] if run.progress.get("saved_step") else [])
    return ("step " + ", ".join(f"{step:,}" for step in reversed(steps[-5:]))) if steps else "none yet"


def _start_lines(seen: Overview) -> list[str]:
    shown = seen.starts[-_STARTS:]
    lines = [f"... {len(seen.starts) - len(shown)} earlier ones"] if len(shown) < len(seen.starts) else []
    for start in shown:
        last = f"{start.last_step:,}" if start.last_step is not None else "?"
        on = start.hosts[0] + (f" +{len(start.hosts) - 1}" if len(start.hosts) > 1 else "") if start.hosts else ""
        where = f"{f'{start.first_step:,} to {last}':20}{duration(start.seconds):14}{on[:17]:18}"
        lines.append(f"{start.attempt[:7]:8}{moment(start.began):21}{where}{start.ending or 'goes on'}")
    return lines
