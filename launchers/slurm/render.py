"""The text of a job's script. Every value in it is quoted for whoever reads it: sbatch its own lines, bash the others.

What a legal value of a #SBATCH line is, is a rule of megalm/config/slurm_rules.py; here a value that would start a line of
its own is a mistake of ours.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from megalm.launchers.slurm.plan import Job

SCRIPT, LOGS = "job.sh", "logs"


def render(job: Job, submission: str, folder: Path | None = None, python: str = "") -> str:
    """The script. It works as often as it is submitted: sbatch FILE.

    submission: a name that the jobs of one chain share. folder: where the verb's relative paths begin, absolute.
    """
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in directives(job, submission))]
    lines += ["", f"# megalm {job.verb} on {_nodes(job)}. To submit it again: sbatch {_comment(job.run_dir / SCRIPT)}"]
    lines += ["set -euo pipefail", "trap '' USR1 TERM # until the supervisor listens: neither may end this shell"]
    lines += [f"cd {shlex.quote(str(folder or Path.cwd()))}"]
    if job.slurm.setup:
        lines += ["set +u # a file of modules may ask for what is not set", f"source {shlex.quote(job.slurm.setup)}", "set -u"]
    supervisor = [python or sys.executable, "-m", "megalm.launchers.slurm.job", f"--submission={submission}", "--", job.verb]
    lines += ["export PYTHONSAFEPATH=1", f"exec {shlex.join([*supervisor, *job.settings, *job.arguments])}", ""]
    return "\n".join(lines)


def directives(job: Job, submission: str = "") -> list[str]:
    """The options of sbatch. The jobs of a chain have a name of their own: `singleton` makes jobs of one name wait."""
    s, tasks = job.slurm, tasks_per_node(job)
    options = {
        "job-name": f"{s.job_name}-{submission}" if s.chain > 1 and submission else s.job_name,
        "nodes": s.nodes + s.spares,
        "ntasks-per-node": tasks,
        "gpus-per-node": s.gpus_per_node,
        "cpus-per-task": max(1, s.cpus_per_task // tasks) if s.cpus_per_task else 0,
        "time": s.minutes,
        "partition": s.partition,
        "account": s.account,
        "qos": s.qos,
        "constraint": s.constraint,
        "reservation": s.reservation,
        "exclude": s.exclude,
        "signal": f"B:USR1@{s.save_seconds}",
        "output": log_file(job.run_dir, "%j"),
        "open-mode": "append",
    }
    lines = [f"--{name}={quote(value)}" for name, value in options.items() if value]
    lines += ["--requeue" if s.requeue else "--no-requeue"]
    if s.nodes + s.spares > 1:
        lines += ["--wait-all-nodes=1"]
    if s.chain > 1:
        lines += ["--dependency=singleton"]
    return [*lines, *map(quote, s.extra)]


def tasks_per_node(job: Job) -> int:
    """Of the job's allocation."""
    return job.ranks_per_node if job.slurm.launch == "rank" and job.ranks_per_node else 1


def log_file(run_dir: Path, job: str, point: str = "") -> str:
    """As sbatch takes it. `job`, `point` of an array below its folder: what sbatch puts in, such as %j and %a."""
    return "/".join([str(run_dir).replace("%", "%%"), *[point] * bool(point), LOGS, f"slurm-{job}.out"])


def quote(value: object) -> str:
    """As sbatch reads a word of its lines: like a shell's, which double quotes hold together."""
    text = str(value)
    assert text.isprintable() and not set(text) & set("\"'\\$`"), f"a value that the rules should have refused: {text!r}"
    return text if all(char.isalnum() or char in "_.:/=+@%,-" for char in text) else f'"{text}"'


def _nodes(job: Job) -> str:
    nodes = f"{job.slurm.nodes} node{'s' if job.slurm.nodes > 1 else ''}"
    return nodes + (f" and {job.slurm.spares} spare" if job.slurm.spares else "")


def _comment(path: Path) -> str:
    return shlex.quote(str(path))
