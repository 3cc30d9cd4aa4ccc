"""Hand a job to SLURM: look at the run's folder, ask sbatch whether it could run, then submit it."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megalm.config.cluster import SlurmConfig
from megalm.config.run import RunConfig
from megalm.errors import ConfigError, Problem, RunError, writing
from megalm.launchers.slurm import client, history
from megalm.launchers.slurm.plan import Job, read_job
from megalm.launchers.slurm.preflight import FREE_BYTES
from megalm.launchers.slurm.render import LOGS, SCRIPT, render


@dataclass
class Submitted:
    """What SLURM has taken: the jobs of a chain in their order, most often one."""

    jobs: list[str]
    script: Path
    kept_back: list[str] = field(default_factory=list)  # names of the environment's secrets, which were not handed over


def submit_verb(verb: str, arguments: Sequence[str]) -> None:
    """Submits, and prints what to look at. Raises MegalmError."""
    job = read_job(verb, arguments)
    done = submit(job)
    chain = f" and {len(done.jobs) - 1} more after it" if len(done.jobs) > 1 else ""
    nodes = f"{job.slurm.nodes} node{'s' * (job.slurm.nodes > 1)}"
    print(f"job {done.jobs[0]}{chain}: {verb} on {nodes}, ranks: {job.world_size}; {done.script}")
    say_kept_back(done.kept_back)
    print(f"megalm slurm logs {job.run_dir} --follow")


def submit(job: Job, submission: str = "", ask: bool = True) -> Submitted:
    """Write the script to the run's folder and submit it. Raises ConfigError or RunError, and leaves no job behind then.

    ask: let sbatch judge it first; a sweep does so for its first point.
    """
    client.ask("sbatch", "--version")  # before anything is written
    check_folder(job)
    with history.folder_lock(job.run_dir):
        history.check_holder(job.run_dir, (), lambda other: client.state_of(other) in client.LIVE)
        script = write_script(job, submission or new_submission())
        environ, secret = client.without_secrets(os.environ)
        if ask:
            ask_whether(job, script, environ)
        jobs: list[str] = []
        for _ in range(max(1, job.slurm.chain)):
            try:
                jobs.append(client.sbatch(script, environ))
            except RunError:
                if jobs:
                    client.ask("scancel", *jobs)
                raise
            history.hold(job.run_dir, jobs, socket.gethostname())
    return Submitted(jobs, script, secret)


def say_kept_back(names: Sequence[str]) -> None:
    """Of variables that were not handed over, if there are any."""
    if names:
        hint = "wandb login, or a slurm.setup file of yours, gives the job its own"
        print(f"not handed to SLURM, which keeps environments on disk: {', '.join(names)} ({hint})", flush=True)


def new_submission() -> str:
    """A name for the jobs of one chain."""
    return secrets.token_hex(4)


def write_script(job: Job, submission: str) -> Path:
    """RUN_DIR/job.sh, and the folder that its log goes to: sbatch makes none."""
    script = job.run_dir / SCRIPT
    with writing(job.run_dir):
        (job.run_dir / LOGS).mkdir(parents=True, exist_ok=True)
        script.write_text(render(job, submission), encoding="utf-8")
        script.chmod(0o755)
    return script


def check_folder(job: Job) -> None:
    """The files that the job needs are there, and its folder is not that of another model. Raises ConfigError."""
    problems = []
    if job.slurm.setup and not Path(job.slurm.setup).is_file():
        rule = "no such file; the nodes read it, so it lies on a disk that they share"
        problems.append(Problem("slurm.setup", job.slurm.setup, rule, "", "slurm.setup="))
    problems += _no_room(job.run_dir)
    problems += _other_run(job.run_dir, job.config) if isinstance(job.config, RunConfig) else []
    if problems:
        raise ConfigError(*problems)


def _no_room(run_dir: Path) -> list[Problem]:
    """What the look at the nodes would find: a folder that cannot be written, or a disk that is all but full."""
    fix = "make room or give permission there, or another train.run_dir"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir) as file:
            file.write(bytes(1 << 16))
        free = shutil.disk_usage(run_dir).free
    except OSError as error:
        return [Problem("train.run_dir", run_dir, f"cannot be written: {error.strerror or error}", "", fix)]
    if free >= FREE_BYTES:
        return []
    return [Problem("train.run_dir", run_dir, f"its disk has {free >> 20} MiB left", f"{FREE_BYTES >> 20} MiB or more", fix)]


def _other_run(run_dir: Path, config: RunConfig) -> list[Problem]:
    """A run that was begun in this folder with another model would be refused by its ranks, hours later."""
    try:
        saved = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        before: dict[str, Any] = saved["model"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return []
    if not (run_dir / "checkpoints" / "latest").exists():
        return []
    fix = "another train.run_dir"
    return [
        Problem(f"model.{key}", value, f"the run in {run_dir} was begun with model.{key}={before[key]}", "", fix)
        for key, value in vars(config.model).items()
        if key in before and before[key] != value and key not in ("dropout", "derived")
    ]


def ask_whether(job: Job, script: Path, environ: dict[str, str]) -> None:
    """Let sbatch judge the script without submitting it. Raises ConfigError naming the key that is at fault."""
    answer = client.ask("sbatch", "--test-only", str(script), environ=environ)
    if answer.code == 0:
        return
    s, said = job.slurm, re.sub(r"(sbatch: error: |allocation failure: )", "", answer.error).replace("\n", "; ")
    rule = f"sbatch would refuse the job: {said}"
    lower = said.lower()
    if "invalid partition" in lower:
        known = client.partitions()
        fix = f"slurm.partition={(known or [''])[0]}"
        raise ConfigError(Problem("slurm.partition", s.partition, rule, ", ".join(known), fix))
    if "node configuration" in lower or "node count" in lower or "more processors" in lower:
        raise ConfigError(_too_much(s, rule))
    for word, key in (("account", "account"), ("qos", "qos"), ("reservation", "reservation"), ("feature", "constraint")):
        if word in lower:
            raise ConfigError(Problem(f"slurm.{key}", getattr(s, key), rule, "", f"slurm.{key}="))
    raise ConfigError(Problem("slurm", None, rule, "", f"sbatch --test-only {script}"))


def _too_much(s: SlurmConfig, rule: str) -> Problem:
    """What there is less of than the job asks for: nodes, or where these would do, what each of them has."""
    count, wanted = len(client.usable_nodes(s.partition)), s.nodes + s.spares
    asked = [key for key in ("gpus_per_node", "cpus_per_task", "constraint", "exclude") if getattr(s, key)]
    if count < wanted or not asked:
        allowed = f"the partition has {count} nodes that are up" if count else ""
        return Problem("slurm.nodes", wanted, rule, allowed, f"slurm.nodes={max(1, count - s.spares)}")
    key, allowed = asked[0], f"nodes of {client.kinds_of_nodes(s.partition)}"
    return Problem(f"slurm.{key}", getattr(s, key), rule, allowed, f"slurm.{key} within what a node has")
