"""Questions to SLURM by its own commands, each with a time limit: a controller that is down keeps a client waiting."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from megalm.errors import ConfigError, MegalmError, Problem, RunError

_SECONDS = 60.0  # a busy controller may take long; one that is down has been given up by then
LIVE = {
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING",
    "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "PREEMPTED", "RESV_DEL_HOLD",
}  # fmt: skip
AT_WORK = LIVE - {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_SECRET = re.compile(  # not PWD, TOKENIZERS_, NCCL_IB_PKEY, GIT_AUTHOR_, XAUTHORITY, SSH_AUTH_SOCK, SSH_ASKPASS
    r"^(?!(OLD)?PWD$).*(TOKEN(?!IZER)|SECRET|CREDENTIAL|CONNECTION_STRING|(?<!ASK)PASS|PWD|(^|_)PAT(_|$)|"
    r"(?<!_P)KEYS?(_|\d|$)|AUTH(?!OR_|ORITY|_SOCK$))",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Answer:
    """How a command ended, and what it printed."""

    code: int
    out: str
    error: str


def ask(*command: str, seconds: float = _SECONDS, environ: Mapping[str, str] | None = None) -> Answer:
    """Run one of SLURM's commands. Raises ConfigError where it is not installed, RunError where it does not answer."""
    if shutil.which(command[0]) is None:
        rule = f"SLURM's {command[0]} is not on the PATH"
        fix = "run this on a login node of the cluster, or write the script with megalm slurm render"
        raise ConfigError(Problem(command[0], None, rule, "", fix))
    try:
        done = subprocess.run(
            command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        rule = f"no answer within {seconds:.0f} s: {' '.join(command[:4])}"
        raise RunError(Problem(command[0], None, rule, "", "see with scontrol ping whether the controller is up")) from error
    return Answer(done.returncode, done.stdout, done.stderr.strip())


def insist(*command: str, times: int = 20, seconds: float = 15.0) -> Answer:
    """`ask` again while the controller does not answer: it is restarted now and then, and a job must not die of that."""
    for left in reversed(range(times)):
        try:
            answer = ask(*command)
        except RunError:
            if not left:
                raise
        else:
            if not left or not re.search(r"contact slurm controller|timed out|Connection refused", answer.error, re.IGNORECASE):
                return answer
        time.sleep(seconds)
    raise AssertionError("times is at least 1")


def kill_seconds() -> float:
    """Between TERM and KILL, as this cluster is set; 30 by default, and where the controller does not tell."""
    with suppress(MegalmError):
        found = re.search(r"^KillWait\s*=\s*(\d+)", ask("scontrol", "show", "config", seconds=10.0).out, re.MULTILINE)
        return float(found[1]) if found else 30.0
    return 30.0


def find_job(job_id: str, asking: Callable[..., Answer] = ask) -> dict[str, str]:
    """{field: value} of a job as scontrol, or where that has forgotten it sacct, knows it; empty where neither does.

    asking: `ask`, or `insist`.
    """
    answer = asking("scontrol", "--oneliner", "show", "job", job_id)
    if answer.code == 0 and "JobState=" in answer.out:
        line = answer.out.splitlines()[0]
        return dict(re.findall(r"(?:^| )([A-Za-z/:_]+)=(\S*)", line))
    with suppress(MegalmError):  # a cluster without accounting, or whose database does not answer
        answer = ask("sacct", "-nXP", "-o", "State,NodeList,ExitCode", "-j", job_id)
        fields = answer.out.strip().split("|") if answer.code == 0 else []
        if len(fields) == 3 and fields[0]:
            return {"JobState": fields[0].split()[0], "NodeList": fields[1], "ExitCode": fields[2]}
    return {}


def state_of(job_id: str, asking: Callable[..., Answer] = ask) -> str:
    """RUNNING, PENDING ...; empty for a job that nobody knows any more."""
    return find_job(job_id, asking).get("JobState", "")


def was_cancelled(job: Mapping[str, str], restarts: int) -> bool:
    """Whether a job that got TERM in its start number `restarts` was ended by its user: `job` as `find_job` tells it.

    While its processes are still there SLURM says COMPLETING of a job that was cancelled, preempted, at its time limit or
    put back to the queue: what the other three leave behind tells them from the first.
    """
    state = job.get("JobState", "")
    if state != "COMPLETING":
        return state.startswith("CANCELLED")
    if int(job.get("Restarts", "0")) > restarts or job.get("PreemptTime", "None") != "None":
        return False
    limit = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", job.get("TimeLimit", ""))
    try:
        ran = datetime.fromisoformat(job["EndTime"]) - datetime.fromisoformat(job["StartTime"])
    except (KeyError, ValueError):
        return True
    if limit is None:  # UNLIMITED
        return True
    days, hours, minutes, seconds = (int(part or 0) for part in limit.groups())
    return ran < timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


def hostnames(nodelist: str) -> list[str]:
    """`n[1-2],m3` -> n1, n2, m3. Raises RunError."""
    answer = ask("scontrol", "show", "hostnames", nodelist)
    if answer.code or not answer.out.split():
        raise RunError(Problem("SLURM_JOB_NODELIST", nodelist, f"cannot be read: {answer.error}", "", "scontrol ping"))
    return answer.out.split()


def usable_nodes(partition: str, constraint: str = "", gpus: int = 0) -> set[str]:
    """Nodes of a partition ("": all) that are not down, drained or being so.

    constraint: features they have, joined by &; what says more than that leaves none out. gpus: that each has.
    """
    answer = ask("sinfo", "-h", "-N", "-o", "%N %t %f %G", *([f"--partition={partition}"] if partition else []))
    wanted = set(constraint.split("&")) if re.fullmatch(r"[\w.&-]+", constraint) else set()
    found = set()
    for line in answer.out.splitlines():
        node, state, features, devices = [*line.split(), "", "", "", ""][:4]
        has = sum(map(int, re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", devices)))
        if re.fullmatch(r"(idle|mix|alloc|comp|resv|plnd)[^*\w]?", state) and wanted <= set(features.split(",")) and has >= gpus:
            found.add(node)
    return found


def kinds_of_nodes(partition: str) -> str:
    """What the nodes of a partition ("": all) have: `8 CPUs gpu:2 feature,...`, each kind once; empty where sinfo is silent."""
    answer = ask("sinfo", "-h", "-o", "%c CPUs %G %f", *([f"--partition={partition}"] if partition else []))
    return "; ".join(sorted({line.replace("(null)", "").strip() for line in answer.out.splitlines()} - {""}))


def partitions() -> list[str]:
    """Names of the partitions; the empty list where sinfo does not tell."""
    answer = ask("sinfo", "-h", "-o", "%R")
    return sorted(set(answer.out.split())) if answer.code == 0 else []


def without_secrets(environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """(the environment that sbatch may store, the names that were left out). SLURM keeps a job's environment on disk."""
    secret = sorted(name for name in environ if _SECRET.match(name))
    return {name: value for name, value in environ.items() if name not in secret}, secret


def sbatch(script: Path, environ: Mapping[str, str]) -> str:
    """Submits it; the job's number. Raises RunError."""
    answer = ask("sbatch", "--parsable", str(script), environ=environ)
    number = answer.out.strip().split(";")[0]
    if answer.code or not number.isdigit():
        raise RunError(Problem("sbatch", None, f"refused: {answer.error or answer.out.strip()}", "", f"sbatch {script}"))
    return number


def job_key(environ: Mapping[str, str] | None = None) -> str:
    """This job as scontrol takes it. In an array the last element's id is that of the whole array: 22_5, not 22."""
    environ = os.environ if environ is None else environ
    if "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ["SLURM_JOB_ID"]
