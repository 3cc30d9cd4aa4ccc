"""The supervisor of a job: runs in the batch script, on the first node.

    python -m megalm.launchers.slurm.job [--submission NAME] -- VERB ARGUMENTS...

It looks at every node, starts the ranks (or an agent per node) by srun, passes on the wish to stop, watches for a stall, and
when they have ended goes back to the queue, leaves out a bad node, or stops. docs/slurm.md tells the rules; `what_next` in
decide.py is their table.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from megalm.config.cluster import SlurmConfig
from megalm.errors import ConfigError, ExitCode, MegalmError, Problem
from megalm.launchers.slurm import client, history
from megalm.launchers.slurm.decide import Action, Decision, Start, what_next
from megalm.launchers.slurm.inside import Here, Wishes, first_error, look_around, name_of, note, say
from megalm.launchers.slurm.plan import Job, read_job
from megalm.runfolder import finished_step


def main() -> None:
    wishes = Wishes()
    at = sys.argv.index("--") if "--" in sys.argv else 0
    options, verb = sys.argv[1:at] if at else [], sys.argv[at + 1 :]
    submission = next((text.partition("=")[2] for text in options if text.startswith("--submission=")), "")
    try:
        if not verb:
            rule = "a verb and its arguments"
            raise ConfigError(Problem("run.sbatch", None, rule, "", "sbatch slurm/run.sbatch pretrain model=tiny"))
        sys.exit(supervise(verb[0], verb[1:], submission, wishes))
    except MegalmError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def supervise(verb: str, arguments: Sequence[str], submission: str, wishes: Wishes) -> int:
    """One start of the job; the exit code of the batch script. Raises MegalmError."""
    here = look_around()
    by_hand = not submission and "SLURM_GPUS_ON_NODE" in os.environ  # its settings say nothing of GPUs
    job = read_job(verb, arguments, len(here.nodes), int(os.environ["SLURM_GPUS_ON_NODE"]) if by_hand else None)
    run_dir, settings = job.run_dir, job.slurm
    submission = submission or f"job-{here.job_id}"
    with history.folder_lock(run_dir):
        mine = {here.key, here.job_id}
        held = history.jobs_of(run_dir)
        history.check_holder(run_dir, sorted(mine), lambda other: client.state_of(other, client.insist) in client.AT_WORK)
        past, code = history.take_up(run_dir, submission, here.key)
        if not mine & set(held):
            history.hold(run_dir, [here.key], os.environ.get("SLURM_SUBMIT_HOST", ""))
        if code is not None:
            say(f"nothing to do: job {past.ended_by} has ended with {name_of(code)}")
            return code
        if past.running:
            _note_lost_start(here, run_dir)
        history.begin(past, run_dir)
        history.write_history(run_dir, submission, past)
    here.log_dir = run_dir / "logs" / f"{here.key}.{here.restart}"
    here.log_dir.mkdir(parents=True, exist_ok=True)
    say(f"job {here.key}, start {past.starts}, on {', '.join(here.nodes)}, from saved step {past.saved_step}: {run_dir}")
    start = Start() if past.failures >= settings.max_failures else run_once(job, here, wishes)
    progressed = history.saved_step(run_dir) > past.saved_step
    start = replace(start, progressed=progressed, finished=_is_finished(job))
    decision = what_next(start, past.failures, past.starts, settings.max_failures, settings.max_starts)
    past.failures, past.running = decision.failures, False
    if decision.action is Action.END and not start.cancelled:
        past.verdict, past.ended_by = decision.code, here.key
    history.write_history(run_dir, submission, past)
    return act(decision, job, here, past, submission)


def _note_lost_start(here: Here, run_dir: Path) -> None:
    """A supervisor that went with its node could not say so. SLURM knows when it put the job back: that is its SubmitTime."""
    when = time.time()
    with suppress(MegalmError, ValueError):
        when = datetime.fromisoformat(client.find_job(here.key).get("SubmitTime", "")).timestamp()
    note(run_dir, "requeued", job=here.key, reason="by SLURM: the start before ended without a word", time=when)


def _is_finished(job: Job) -> bool:
    """A rank may die after the last step is saved: nothing is left to do then."""
    train = getattr(job.config, "train", None)
    return train is not None and finished_step(job.run_dir, train.steps, train.patience) is not None


def run_once(job: Job, here: Here, wishes: Wishes) -> Start:
    """Look at the nodes, start the ranks on the healthy ones, wait for their end."""
    from megalm.launchers.slurm.launch import look_at_nodes, run_step

    bad = look_at_nodes(job, here, wishes)
    for node, why in bad.items():
        say(f"bad node {node}: {why}")
    healthy = [node for node in here.nodes if node not in bad]
    if wishes.any:
        return Start(ExitCode.SAVED, asked=True, cancelled=_is_cancelled(here, wishes))
    if len(healthy) < job.slurm.nodes:
        note(job.run_dir, "failed", job=here.key, bad_nodes=bad)
        return Start(bad_nodes=tuple(bad), all_bad=not healthy)
    if bad:
        note(job.run_dir, "excluded", job=here.key, nodes=sorted(bad), why=bad, spare=True)
    chosen = healthy[: job.slurm.nodes]
    if len(chosen) < len(here.nodes):
        say(f"training on {', '.join(chosen)}; spare: {', '.join(n for n in here.nodes if n not in chosen)}")
    code = run_step(job, here, chosen, wishes)
    said = first_error(here.log_dir) if code not in (ExitCode.FINISHED, ExitCode.SAVED) else ""
    say(f"the ranks have ended: {name_of(code)}" + (f"; {said}" if said else ""))
    timed_out = wishes.any and wishes.is_time_limit(60.0 * job.slurm.minutes, job.slurm.save_seconds)
    cancelled = _is_cancelled(here, wishes)
    return Start(code, asked=wishes.any, timed_out=timed_out, can_save=bool(job.ranks_per_node), cancelled=cancelled)


def _is_cancelled(here: Here, wishes: Wishes) -> bool:
    """Whether TERM came from scancel: a preempted job and one at its time limit go on, one that the user ends does not."""
    if not wishes.end:
        return False
    try:
        return client.was_cancelled(client.find_job(here.key), here.restart)
    except MegalmError:
        return False


def act(decision: Decision, job: Job, here: Here, past: history.History, submission: str) -> int:
    """Do as decided; the exit code of the batch script."""
    say(f"{decision.reason}: {'again' if decision.action is Action.AGAIN else 'the job ends'}")
    if decision.action is Action.END:
        if decision.code not in (ExitCode.FINISHED,):
            how = {"reason": decision.reason, "code": int(decision.code), "cancelled": decision.cancelled}
            note(job.run_dir, "gave_up", job=here.key, **how)
        return decision.code
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the requeue sends it, and what follows needs the time
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    leave_out = [node for node in decision.exclude if node not in past.excluded]
    enough = bool(leave_out) and _is_enough(here, [*past.excluded, *leave_out], job.slurm)
    if enough:
        past.excluded += leave_out
        history.write_history(job.run_dir, submission, past)
    if not job.slurm.requeue:
        say("slurm.requeue=false: the next job of the chain goes on, or the same command submitted again")
        if enough:
            with suppress(MegalmError):
                waiting = [other for other in history.jobs_of(job.run_dir) if client.state_of(other) == "PENDING"]
                _exclude(waiting, past.excluded, leave_out, job.run_dir)
        return decision.code
    answer = client.insist("scontrol", "requeue", here.key)
    if answer.code:
        say(f"cannot go back to the queue: {answer.error}; submit the job again")
        note(job.run_dir, "gave_up", job=here.key, reason=answer.error, code=int(decision.code))
        return decision.code
    note(job.run_dir, "requeued", job=here.key, reason=decision.reason, failures=decision.failures)
    with suppress(MegalmError):  # it is in the queue: that the controller does not answer now must not change the code
        if enough:
            _exclude([here.key], past.excluded, leave_out, job.run_dir)
        elif leave_out:
            say(f"{', '.join(leave_out)} cannot be left out: partition {here.partition} has too few other nodes; later again")
            client.ask("scontrol", "update", f"JobId={here.key}", "StartTime=now+30")
    return decision.code


def _is_enough(here: Here, excluded: Sequence[str], slurm: SlurmConfig) -> bool:
    """Whether the partition has nodes enough for the job without these: otherwise it would wait for ever."""
    with suppress(MegalmError):
        usable = client.usable_nodes(here.partition, slurm.constraint, slurm.gpus_per_node)
        others = usable - {*excluded, *(client.hostnames(slurm.exclude) if slurm.exclude else [])}
        return len(others) >= slurm.nodes + slurm.spares
    return False


def _exclude(jobs: Sequence[str], excluded: Sequence[str], new: Sequence[str], run_dir: Path) -> None:
    """A running job may not change its list: it can only once it is back in the queue, from this script's last seconds."""
    for job in jobs:
        given = client.find_job(job).get("ExcNodeList", "(null)")
        names = sorted({*excluded, *(client.hostnames(given) if given != "(null)" else [])})
        for _ in range(16):
            answer = client.ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(names)}")
            if answer.code == 0:
                say(f"left out of job {job} from now on: {', '.join(names)}")
                note(run_dir, "excluded", job=job, nodes=list(new))
                break
            time.sleep(0.25)
        else:
            say(f"cannot leave out {', '.join(names)} of job {job}: {answer.error}")


if __name__ == "__main__":
    main()
