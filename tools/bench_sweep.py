"""How long `megalm pretrain -m` takes to submit a sweep: `python tools/bench_sweep.py [--points 4] [--times 5] [--array]`.

With SLURM_CONF set the jobs go to that cluster, with a start time tomorrow, and are cancelled; otherwise to commands that only
say that they have taken them, which leaves our own share. Bound: 2 s; the column cpu is that of the processor's time, which
a busy machine does not stretch. Exit 1: missed, or a start failed.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_report import bounded, describe_machine, headline, line

BOUND = 2.0
_TAKES = '#!/bin/bash\ncase "$*" in *--parsable*) echo $((1000 + RANDOM)) ;;*"show job"*) exit 1 ;; esac\n'
_COMMANDS = ("sbatch", "scontrol", "sinfo", "squeue", "scancel")


def arguments(points: int, array: bool) -> list[str]:
    """Half of the points on one rank, half on two."""
    rates = ",".join(f"{(i + 1) * 1e-4:.4g}" for i in range(max(1, points // 2)))
    words = ["model=tiny", "cluster=slurm", "cluster.device=cpu", "slurm.extra=['--begin=tomorrow']", f"optim.lr={rates}"]
    words += ["hydra.sweep.dir=sweep", f"hydra.launcher.array_from={2 if array else 0}"]
    return [*words, "parallel.tensor_parallel=1,2"] if points > 1 else words


def submit_once(command: list[str], environ: dict[str, str], points: int) -> tuple[float, float]:
    """(seconds from the start of the command to its end, those of the processor), in a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        begun, worked = time.perf_counter(), _worked()
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=300, check=False)
        seconds, worked = time.perf_counter() - begun, _worked() - worked
        jobs = [text.rpartition(" job ")[2].split(";")[0] for text in done.stdout.splitlines() if " job " in text]
        if done.returncode or len(jobs) != points:
            raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        subprocess.run(["scancel", *{job.partition("_")[0] for job in jobs}], env=environ, timeout=60, check=True)
        return seconds, worked


def _worked() -> float:
    """Processor seconds of all commands so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=4, help="an even number, or 1")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--array", action="store_true", help="as arrays")
    options = parser.parse_args()
    environ, where = dict(os.environ), "SLURM"
    with tempfile.TemporaryDirectory() as folder:
        if "SLURM_CONF" not in environ:
            where = "commands that take jobs at once"
            for name in _COMMANDS:
                (Path(folder) / name).write_text(_TAKES)
                (Path(folder) / name).chmod(0o755)
            environ["PATH"] = f"{folder}:{environ['PATH']}"
        words = arguments(options.points, options.array)
        command = [sys.executable, "-m", "megalm.launchers.cli", "pretrain", "-m", *words]
        measured = [submit_once(command, environ, options.points) for _ in range(options.times)]
    seconds, worked = ([each[side] for each in measured] for side in (0, 1))
    row = bounded("sweep", f"{options.points} points to {where}", "submit", seconds, BOUND)
    row.cpu_ratio = statistics.median(worked) / BOUND
    print(describe_machine())
    print(f"{headline()}\n{line(row)}\neach: {', '.join(f'{each:.2f}' for each in seconds)} s")
    return 1 if row.ratio > 1 else 0


if __name__ == "__main__":
    sys.exit(main())
