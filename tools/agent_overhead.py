"""What the agent and the heartbeats cost a step, for bench_agent.py: counted, and measured in turns.

Counted: the price of a stamp as a collective pays it, times the collectives of a step; and the CPU seconds of the agent's
process, which it may take from a rank. That is exact on a busy machine too.

Measured: three runs of the same training, one under the agent and two without, take turns of some seconds: two are stopped
(SIGSTOP) while the third computes. So a slow minute of the machine slows all three; a round's ratios are of neighbours in
time. The ratio of the two runs without an agent says how far such a ratio is to be trusted.
"""

from __future__ import annotations

import random
import signal
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent_runs import Run, children, cpu_seconds, environ_of, last_step, lines_of, ranks_of, run_config, running, send

from megalm.parallel.heartbeat import Heartbeat
from megalm.parallel.heartbeat_file import Slate, read_pulse

ARMS = ("agent", "plain", "plain again")
_WARM_STEPS = 5
_MANY = 10**6


def stamp_seconds() -> float:
    """What a stamped collective costs more than a bare one. The fastest of many short rounds each: undisturbed ones."""
    slate = Slate("overhead")

    def all_reduce(tensor: object, group: object = None) -> None:
        return None

    heart = Heartbeat(slate.path)
    heart.rows[None] = heart.file.add_group("data 0-1")
    stamped, best = heart.wrap(all_reduce), [1.0, 1.0]
    for _ in range(200):
        for which, function in enumerate((stamped, all_reduce)):
            begin = time.perf_counter()
            for _ in range(500):
                function(0)
            best[which] = min(best[which], (time.perf_counter() - begin) / 500)
    return best[0] - best[1]


@dataclass
class Arm:
    """One of the runs that take turns."""

    run: Run
    turns: list[float] = field(default_factory=list)  # seconds per step
    cpu: float = 0.0  # of the ranks, in all turns
    agent_cpu: float = 0.0
    seconds: float = 0.0
    steps: int = 0

    def turn(self, seconds: float) -> None:
        """Go on for so long; nobody else computes."""
        own = [process.pid for process in self.run.processes]
        agents = [pid for pid in own if children(pid)]
        ranks = [pid for pid in self.run.pids() if pid not in agents]
        before = [sum(map(cpu_seconds, pids)) for pids in (ranks, agents)]
        begin, step = time.time(), last_step(self.run.folder)
        send([*ranks, *agents], signal.SIGCONT)
        time.sleep(seconds)
        send([*agents, *ranks], signal.SIGSTOP)
        end, lines = time.time(), lines_of(self.run.folder)
        times = [line["time"] for line in lines if begin <= line["time"] <= end]
        self.turns.append((times[-1] - times[0]) / (len(times) - 1))
        self.cpu += sum(map(cpu_seconds, ranks)) - before[0]
        self.agent_cpu += sum(map(cpu_seconds, agents)) - before[1]
        self.seconds += end - begin
        self.steps += lines[-1]["step"] - step


def overhead(folder: Path, corpus: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """All of it, printed. Turns of `seconds` should hold ten steps or more."""
    with ExitStack() as stack:
        arms = {}
        for name in ARMS:
            config = run_config(folder / name.replace(" ", "-"), _MANY, corpus, save_every=0)
            run = stack.enter_context(running(config, supervised=name == ARMS[0]))
            run.wait_for_step(_WARM_STEPS)
            arms[name] = Arm(run)
            send(list(reversed(run.pids())), signal.SIGSTOP)  # the agent first, that it may not wonder
        order, chance = list(ARMS), random.Random(0)
        for number in range(rounds):
            chance.shuffle(order)
            for name in order:
                arms[name].turn(seconds)
            if number % 10 == 9:
                print(f"  {number + 1:>3} rounds  " + _share("with an agent", _ratios(arms, *ARMS[:2])), flush=True)
        agent = arms[ARMS[0]]
        beat = Path(environ_of(ranks_of(agent.run.processes[0].pid)[0])["MEGALM_HEARTBEAT"])
        pulse = read_pulse(beat)
    collectives = sum(one.sequence for one in pulse.collectives) / pulse.step
    stamp, step = stamp_seconds(), statistics.median([turn for name in ARMS[1:] for turn in arms[name].turns])
    cpu = [arms[name].cpu / arms[name].steps for name in ARMS]
    result: dict[str, Any] = {
        "step_seconds": step,
        "stamp_microseconds": stamp * 1e6,
        "collectives_per_step": collectives,
        "stamps_share": collectives * stamp / step,
        "agent_core_share": agent.agent_cpu / agent.seconds,
        "rank_cpu_ratio": cpu[0] / cpu[1],
        "rank_cpu_ratio_of_nothing": cpu[2] / cpu[1],
        "ratios": _ratios(arms, *ARMS[:2]),
        "ratios_of_nothing": _ratios(arms, *ARMS[:0:-1]),
    }
    counted = result["stamps_share"] + result["agent_core_share"]  # as if all that the agent takes were a rank's loss
    result["counted_share"], result["one_percent_from_seconds"] = counted, _smallest_step(result)
    _print(result)
    return result


def _ratios(arms: dict[str, Arm], first: str, second: str) -> list[float]:
    return [a / b for a, b in zip(arms[first].turns, arms[second].turns, strict=True)]


def _smallest_step(result: dict[str, Any]) -> float:
    """Seconds of a step with as many collectives whose stamps and agent come to 1 %."""
    return result["collectives_per_step"] * result["stamp_microseconds"] * 1e-6 / (0.01 - result["agent_core_share"])


def _share(what: str, ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{what} {middle - 1:+.2%} (quartiles {low - 1:+.1%} to {high - 1:+.1%}, {len(ratios)} rounds)"


def _print(result: dict[str, Any]) -> None:
    step, least = (result[key] * 1e3 for key in ("step_seconds", "one_percent_from_seconds"))
    count, stamp = result["collectives_per_step"], result["stamp_microseconds"]
    print(f"  counted   {count:.0f} collectives in a step of {step:.0f} ms, {stamp:.2f} us each: {result['stamps_share']:.3%}")
    print(f"            the agent {result['agent_core_share']:.2%} of a core")
    print(f"            together {result['counted_share']:.2%}; 1 % in a step of {least:.0f} ms")
    print("  measured  " + _share("a step takes", result["ratios"]))
    print("            " + _share("and of two runs without an agent one takes", result["ratios_of_nothing"]))
    ratios = (result["rank_cpu_ratio"] - 1, result["rank_cpu_ratio_of_nothing"] - 1)
    print("            CPU seconds of the ranks per step {:+.1%}, without an agent {:+.1%}".format(*ratios), flush=True)
