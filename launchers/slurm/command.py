"""`megalm slurm`: write, submit and follow a job."""

from __future__ import annotations

import difflib
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megalm.errors import ConfigError, MegalmError, Problem
from megalm.launchers.app import fail
from megalm.launchers.cli import SUBVERBS
from megalm.launchers.slurm import client, history

_USAGE = """usage: megalm slurm render VERB [FILE.yaml] [key=value ...]
       megalm slurm submit VERB [FILE.yaml] [key=value ...]
       megalm slurm status [RUN | JOB]
       megalm slurm cancel RUN | JOB
       megalm slurm logs   RUN | JOB [--follow]
"""
_NOTE = "\nThe job is described by the keys slurm.*: megalm pretrain --help lists them. RUN is the run's folder."
_FOLLOW_SECONDS = 1.0


def main() -> None:
    """Exits with 2 for a user's mistake."""
    arguments = sys.argv[1:]
    if not arguments or {"--help", "-h"} & set(arguments):
        lines = [f"  {name:7} {line}" for name, line in SUBVERBS["slurm"].items()]
        print("\n".join([_USAGE, *lines, _NOTE]))
        sys.exit(0 if arguments else 2)
    subverb, rest = arguments[0], arguments[1:]
    try:
        if subverb not in SUBVERBS["slurm"]:
            raise ConfigError(_unknown(subverb))
        {"render": _render, "submit": _submit, "status": _status, "cancel": _cancel, "logs": _logs}[subverb](rest)
    except MegalmError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


def _unknown(word: str) -> Problem:
    close = difflib.get_close_matches(word, SUBVERBS["slurm"], 1, 0.5)
    hint = f"; did you mean megalm slurm {close[0]}?" if close else ""
    return Problem(word, None, f"no such subverb{hint}", ", ".join(SUBVERBS["slurm"]), "megalm slurm --help")


def _render(arguments: Sequence[str]) -> None:
    from megalm.launchers.slurm.plan import read_job
    from megalm.launchers.slurm.render import render
    from megalm.launchers.slurm.submit import new_submission

    print(render(read_job(*_verb(arguments, "render")), new_submission()), end="")


def _submit(arguments: Sequence[str]) -> None:
    from megalm.launchers.slurm.submit import submit_verb

    submit_verb(*_verb(arguments, "submit"))


def _verb(arguments: Sequence[str], subverb: str) -> tuple[str, list[str]]:
    if not arguments:
        raise ConfigError(Problem(f"megalm slurm {subverb}", None, "which verb?", "", f"megalm slurm {subverb} pretrain ..."))
    return arguments[0], list(arguments[1:])


def _jobs(target: str) -> list[str]:
    """The jobs that a run's folder or a number names. A folder wins: a sweep's points are folders 0, 1, 2 ..."""
    if _is_number(target):
        return [target]
    jobs = history.jobs_of(Path(target))
    if not jobs:
        raise ConfigError(Problem("RUN", target, "no job has been submitted for this folder", "", "megalm slurm status"))
    return jobs


def _is_number(target: str) -> bool:
    return re.fullmatch(r"\d+(_\d+)?", target) is not None and not Path(target).is_dir()


def _one(arguments: Sequence[str], subverb: str) -> str:
    words = [word for word in arguments if not word.startswith("-")]
    if len(words) != 1:
        command = f"megalm slurm {subverb}"
        raise ConfigError(Problem(command, None, "one run folder or job number", "", f"{command} 123"))
    return words[0]


def _status(arguments: Sequence[str]) -> None:
    """The jobs of a run with the reason why one waits; without an argument, all jobs of this user."""
    if not arguments:
        answer = client.ask("squeue", "--me", "-o", "%.10i %.9P %.20j %.10T %.10M %.5D %R")
        print(answer.out if answer.code == 0 else answer.error, end="")
        return
    for job_id in _jobs(_one(arguments, "status")):
        job = client.find_job(job_id)
        if not job:
            print(f"job {job_id}: SLURM does not know it any more")
            continue
        fields = {"on": "NodeList", "ran": "RunTime", "limit": "TimeLimit"}
        if job["JobState"] == "PENDING":
            fields = {"because": "Reason", "begins": "StartTime"}
        said = {name: job.get(field, "") for name, field in {**fields, "restarts": "Restarts"}.items()}
        shown = ", ".join(f"{name} {value}" for name, value in said.items() if value and value != "(null)")
        print(f"job {job_id}: {job['JobState']}, {shown}")


def _cancel(arguments: Sequence[str]) -> None:
    jobs = _jobs(_one(arguments, "cancel"))
    jobs = [job for job in jobs if client.state_of(job) in client.LIVE] or jobs  # of one it has forgotten scancel fails
    answer = client.ask("scancel", *jobs)
    if answer.code:
        raise ConfigError(Problem("JOB", ", ".join(jobs), f"scancel: {answer.error}", "", "megalm slurm status"))
    print(f"cancelled {', '.join(jobs)}")


def _logs(arguments: Sequence[str]) -> None:
    """The job's own log and rank 0's; --follow waits for more until the job has ended."""
    target = _one(arguments, "logs")
    jobs = _jobs(target)
    folder = _log_folder(target) if _is_number(target) else Path(target) / "logs"
    shown: dict[Path, int] = {}
    while True:
        alive = "--follow" in arguments and any(client.state_of(job) in client.LIVE for job in jobs)
        for job in jobs:
            for path in [folder / f"slurm-{job}.out", *sorted(folder.glob(f"{job}.*/node-0.log"))]:
                _print_new(path, shown)
        if not alive:
            return
        time.sleep(_FOLLOW_SECONDS)


def _log_folder(job: str) -> Path:
    output = client.find_job(job).get("StdOut", "")
    if not output:
        raise ConfigError(Problem("JOB", job, "SLURM does not know it any more", "", "megalm slurm logs RUN_FOLDER"))
    return Path(output).parent


def _print_new(path: Path, shown: dict[Path, int]) -> None:
    """What has been added to a file since the last look."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            if path not in shown:
                print(f"==> {path} <==")
            file.seek(shown.get(path, 0))
            sys.stdout.write(file.read())
            shown[path] = file.tell()
            sys.stdout.flush()
    except OSError:
        return
