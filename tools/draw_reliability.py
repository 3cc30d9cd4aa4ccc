"""Write docs/reliability.md from what tests and benchmarks have measured: `python tools/draw_reliability.py ROWS... [-o FILE]`.

    MEGALM_RELIABILITY=ROWS python -m pytest -m slurm tests/slurm     each fault that a test makes adds a line to ROWS
    MEGALM_RELIABILITY=ROWS python tools/bench_agent.py kill stop

A line is a Row and the machine that it was measured on. Without the variable nothing is written. A fault that nobody has made
stands in the table too, and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megalm.runfolder import read_events

VARIABLE = "MEGALM_RELIABILITY"
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "reliability.md"
FAULTS = {  # in the table's order: what is done to a run
    "killed rank": "SIGKILL to one rank",
    "stopped rank": "SIGSTOP to one rank: it neither works nor dies",
    "killed agent": "SIGKILL to the supervisor of a node",
    "node power cut": "every process of a node is gone at once",
    "cut cable": "a node's network is gone, its processes are not",
    "time limit": "the signal that slurmctld sends before the limit",
    "preemption signal": "a more urgent job needs the nodes",
    "crash loop": "every start fails",
    "bad node": "a node fails the look before the start",
    "missing node": "a node is off and the controller does not know it yet",
    "full disk": "a checkpoint does not fit",
    "flipped bit": "one bit of a checkpoint is another",
}
# events that say that something has been noticed; a start that comes without one has been noticed by SLURM alone
_NOTICED = {"failed", "stalled", "stopping", "requeued", "restarted", "excluded", "gave_up"}
_HEADS = ("fault", "what is done", "detected in", "recovered in", "lost", "then", "losses", "times")


@dataclass(frozen=True)
class Row:
    """One fault that was made. Times in seconds since then; None: does not apply, such as recovery of what must end."""

    fault: str
    detected: float | None
    recovered: float | None  # until the first step after it was done
    lost: int | None  # steps that were done again
    outcome: str  # what the system did
    identical: bool | None = None  # the losses, with those of a run that nobody disturbed; None: not compared
    source: str = ""  # the test or benchmark

    def __post_init__(self) -> None:
        if self.fault not in FAULTS:
            raise ValueError(f"fault {self.fault!r} is none of {', '.join(FAULTS)}")


class Fault:
    """Make one just before the fault, call `note` when the run has come back; in between the run writes its own files."""

    def __init__(self, fault: str, run_dir: Path, source: str = ""):
        self.fault, self.run_dir, self.source = fault, run_dir, source
        self.began, self.step = time.time(), last_step(run_dir)

    def note(self, outcome: str, identical: bool | None = None, by: str = "") -> Row:
        """Add the line that the run's events and metrics tell. Exact to a step where train.log_every=1.

        by: the kind of event that counts as having noticed; else the first of any kind that tells of something amiss.
        Raises RuntimeError where nothing has been noticed: then it was not this fault that the run met.
        """
        events = [event for event in read_events(self.run_dir) if event["time"] >= self.began]
        noticed = next((event["time"] for event in events if event["kind"] in ({by} if by else _NOTICED)), None)
        start = next((event for event in events if event["kind"] == "started"), None)
        again, lost = None, None
        if start is not None:
            noticed = start["time"] if noticed is None else noticed
            done = [line["time"] for line in _metrics(self.run_dir) if line.get("time", 0.0) >= start["time"]]
            again = min(done, default=None)
            lost = max(0, max(self.step, int(start.get("reached") or 0)) - int(start["step"]))
        if noticed is None:
            raise RuntimeError(f"{self.fault}: nothing in {self.run_dir} tells of it; the last events: {events[-6:]}")
        row = Row(self.fault, self._since(noticed), self._since(again), lost, outcome, identical, self.source)
        append(row)
        return row

    def _since(self, moment: float | None) -> float | None:
        return None if moment is None else moment - self.began


def append(row: Row) -> None:
    """Add a line to $MEGALM_RELIABILITY/rows.jsonl, where that is set. Raises OSError."""
    if VARIABLE in os.environ:
        folder = Path(os.environ[VARIABLE])
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "rows.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({**asdict(row), "time": time.time(), **describe()}) + "\n")


def describe() -> dict[str, Any]:
    """The machine and the versions, in words, and how busy it is. Without torch: reading its version takes no import."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    machine = f"{cores} cores ({platform.machine()}), {memory:.0f} GiB, Linux {platform.release().partition('-')[0]}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    load = round(os.getloadavg()[0], 1)
    return {"machine": machine, "load": load, "versions": f"Python {platform.python_version()}, {packages}"}


def last_step(run_dir: Path) -> int:
    """The newest in metrics.jsonl; 0 where there is none."""
    return max((int(line.get("step", 0)) for line in _metrics(run_dir)), default=0)


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # half written
            continue
    return found


def draw(lines: Sequence[dict[str, Any]]) -> str:
    """The whole document. A measurement that stands in two of the files is one."""
    same = ("time", "fault", "source", "detected", "recovered")
    lines = list({tuple(line[key] for key in same): line for line in lines}.values())
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for fault in FAULTS:
        for line in lines:
            if line["fault"] == fault:
                rows.setdefault((fault, line["outcome"]), []).append(line)
    table = ["| " + " | ".join(_HEADS) + " |", "|" + "---|" * len(_HEADS)]
    for fault, meaning in FAULTS.items():
        outcomes = [(outcome, found) for (name, outcome), found in rows.items() if name == fault]
        for outcome, found in outcomes:
            table.append(_line(fault, meaning, outcome, found))
        if not outcomes:
            table.append(f"| {fault} | {meaning} |  |  |  | not measured |  | 0 |")
    where = sorted({(line["machine"], line["versions"]) for line in lines})
    sources = sorted({line["source"] for line in lines if line["source"]})
    return "\n".join([_TEXT.strip(), "", *table, "", _FOOT.strip(), "", *_measured(where, lines), "", *_made_by(sources), ""])


def _line(fault: str, meaning: str, outcome: str, found: Sequence[dict[str, Any]]) -> str:
    compared = [line["identical"] for line in found if line["identical"] is not None]
    some = "" if len(compared) in (0, len(found)) else f" in the {len(compared)} compared"
    same = "" if not compared else f"identical{some}" if all(compared) else f"{compared.count(False)} of {len(compared)} DIFFER"
    lost = [line["lost"] for line in found if line["lost"] is not None]
    steps = "" if not lost else f"{min(lost)} steps" if min(lost) == max(lost) else f"{min(lost)}-{max(lost)} steps"
    times = [_seconds([line[key] for line in found]) for key in ("detected", "recovered")]
    return f"| {fault} | {meaning} | {times[0]} | {times[1]} | {steps} | {outcome} | {same} | {len(found)} |"


def _seconds(values: Sequence[float | None]) -> str:
    """The median, and the worst where there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    middle = f"{statistics.median(known):.1f} s"
    return middle if len(known) == 1 else f"{middle} (at most {max(known):.1f} s)"


def _measured(where: Sequence[tuple[str, str]], lines: Sequence[dict[str, Any]]) -> list[str]:
    days = sorted({time.strftime("%Y-%m-%d", time.gmtime(line["time"])) for line in lines})
    spread = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}" if days else "never"
    loads = sorted(line["load"] for line in lines if "load" in line)
    busy = f", at a load average of {loads[0]} to {loads[-1]}" if loads else ""
    return [f"Measured {spread}{busy}:", "", *(f"- {machine}; {versions}" for machine, versions in where)]


def _made_by(sources: Sequence[str]) -> list[str]:
    return ["Made by:", "", *(f"- `{source}`" for source in sources)]


_TEXT = """
# What faults cost

Written by `python tools/draw_reliability.py ROWS` from what the tests and benchmarks have measured; not by hand. Each line is
a fault that was made to a real run: real ranks, real agents, and where it says SLURM a real slurmctld and slurmd, over nodes
that are namespaces of one machine.
"""
_FOOT = """
- **detected in**: from the fault until the run's own files (`events.jsonl`) say that something has happened.
- **recovered in**: from the fault until the first training step after it is done. Loading of Python, torch and the checkpoint
  is part of it, and where the job goes back to the queue, so is the queue: the cluster of the tests lets a requeued job wait
  for 5 seconds, and gives up a silent node after 15; a real one often takes 120 and 300.
- **lost**: steps that were done again. A run that is asked to stop saves where it is and loses none.
- **losses**: whether they are those of a run that nobody disturbed, compared bit by bit.
- **times**: how often the fault was made. With several, the median is given, and the worst.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("rows", type=Path, nargs="+", help=f"folders that {VARIABLE} named")
    parser.add_argument("-o", "--output", type=Path, default=DOCUMENT)
    options = parser.parse_args()
    lines = []
    for folder in options.rows:
        path = folder / "rows.jsonl"
        if not path.is_file():
            raise SystemExit(f"{path}: no such file; run the tests with {VARIABLE}={folder}")
        lines += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    options.output.write_text(draw(lines), encoding="utf-8")
    print(options.output)


if __name__ == "__main__":
    main()
