"""What supervision costs and gains: `python tools/bench_agent.py [overhead] [kill] [stop] [clean] [--times 10] [--json FILE]`.

    overhead   what the agent and the heartbeats cost a step, counted and measured (agent_overhead.py)
    kill       SIGKILL to one rank of a run, again and again: seconds until the first step after it
    stop       the same with SIGSTOP: seconds until it is found, and until the first step after it
    clean      a run that nothing befalls, for --minutes: how often the agent raised the alarm

Every run is a real `megalm pretrain` of two ranks (agent_runs.py); the faults alternate between them. Where MEGALM_RELIABILITY
is set, each is a line of docs/reliability.md. Exit 1: a run did not come back, did not end well, or a false alarm was raised.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from agent_overhead import overhead
from agent_runs import last_step, ranks_of, run_config, running
from bench_parallel import write_random_tokens
from bench_report import describe_machine, describe_versions
from draw_reliability import Fault

from megalm.runfolder import read_events

STALL_SECONDS = 5.0
FAULTS = {"kill": (signal.SIGKILL, "killed rank"), "stop": (signal.SIGSTOP, "stopped rank")}
ALARMS = ("failed", "stalled", "restarted", "gave_up")


def recover(folder: Path, corpus: Path, what: str, times: int) -> dict[str, Any]:
    """Hit a rank `times` times; seconds until it was found, and until the first step of the next start was done."""
    found, again, (number, name) = list[float](), list[float](), FAULTS[what]
    config = run_config(folder, 10**6, corpus, STALL_SECONDS, save_every=5, keep=2)

    with running(config) as run:
        chance, agent = random.Random(0), run.processes[0].pid
        for turn in range(times):
            resumed = run.wait_for_start(turn + 1)
            run.wait_for_step(resumed + 7)  # it has saved: a new count of restarts
            time.sleep(chance.random() * 0.3)  # anywhere in a step
            fault = Fault(name, folder, f"tools/bench_agent.py {what}")
            os.kill(ranks_of(agent)[turn % 2], number)
            resumed = run.wait_for_start(turn + 2)
            run.wait_for_step(resumed + 1)
            row = fault.note("all ranks start again in place")
            if row.detected is None or row.recovered is None:
                raise SystemExit(f"something else befell the run: {[*read_events(folder)][-6:]}")
            found.append(row.detected)
            again.append(row.recovered)
            line = f"  {turn + 1:>3}  told after {found[-1]:5.1f} s  training after {again[-1]:5.1f} s  from step {resumed}"
            print(line, flush=True)
    return {"times": times, "told_seconds": found, "training_seconds": again}


def clean(folder: Path, corpus: Path, minutes: float) -> dict[str, Any]:
    """A run with checkpoints and the patience of a user who wants to know soon; its alarms."""
    with running(run_config(folder, 10**6, corpus, STALL_SECONDS, save_every=50, keep=2)) as run:
        run.wait_for_step(1)
        deadline = time.monotonic() + 60 * minutes
        while time.monotonic() < deadline:
            run.wait(lambda: True)
            time.sleep(1.0)
        alarms = [event for event in read_events(folder) if event["kind"] in ALARMS]
        steps = last_step(folder)
    print(f"  {minutes:g} minutes, {steps} steps: {len(alarms)} false alarms", flush=True)
    return {"minutes": minutes, "steps": steps, "alarms": alarms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", nargs="*", default=["overhead", "kill", "stop"], help="overhead, kill, stop, clean")
    parser.add_argument("--times", type=int, default=10, help="faults of each kind")
    parser.add_argument("--rounds", type=int, default=40, help="of turns that measure the overhead")
    parser.add_argument("--seconds", type=float, default=3.0, help="of such a turn")
    parser.add_argument("--minutes", type=float, default=20.0, help="of the clean run")
    parser.add_argument("--json", help="write the numbers to this file")
    options = parser.parse_args()
    print(describe_machine())
    results: dict[str, Any] = {"machine": describe_machine(), "versions": describe_versions(None)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_tokens(folder / "corpus")
        for what in options.what:
            print(what, flush=True)
            if what == "overhead":
                results[what] = overhead(folder, folder / "corpus", options.rounds, options.seconds)
            elif what == "clean":
                results[what] = clean(folder / what, folder / "corpus", options.minutes)
            else:
                found = results[what] = recover(folder / what, folder / "corpus", what, options.times)
                for key in ("told_seconds", "training_seconds"):
                    values = sorted(found[key])
                    median, count = statistics.median(values), f"{len(values)} of {options.times}"
                    print(f"  {key}: median {median:.1f}, worst {values[-1]:.1f}, {count}")
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    if results.get("clean", {}).get("alarms"):
        raise SystemExit("a false alarm was raised")


if __name__ == "__main__":
    main()
