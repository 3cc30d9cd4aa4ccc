"""The two steps of a job: a look at its nodes, and the run itself, each one srun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megalm.errors import ExitCode, MegalmError
from megalm.launchers.slurm import client
from megalm.launchers.slurm.decide import verdict
from megalm.launchers.slurm.health import find_bad, read_reports
from megalm.launchers.slurm.inside import Here, Wishes, note, read_notes, say
from megalm.launchers.slurm.plan import Job
from megalm.parallel.heartbeat_file import BUSY
from megalm.runfolder import read_progress

_POLL_SECONDS = 0.2
_LOOK_SECONDS = 90.0  # for all nodes to answer; srun itself gives up a lost one only after its own time limits
_REMIND_SECONDS = 5.0  # a rank that has just started does not listen yet: the wish to stop is repeated
_ECHO_SECONDS = 3.0  # for the others to say how they ended, after one has failed
_LOST_SECONDS = 30.0  # after it: srun waits for a lost node until the controller gives it up, often 5 minutes
_STALL_SECONDS = 1800.0  # without a step, where cluster.stall_seconds does not say
_REQUEUE_SECONDS = 4.0  # what is needed after the ranks' end, before SLURM kills this process too


def look_at_nodes(job: Job, here: Here, wishes: Wishes) -> dict[str, str]:
    """{bad node: why}. A node that srun cannot reach ends the look for all: it is named, and the others are looked at anew."""
    bad: dict[str, str] = {}
    while True:
        nodes = [node for node in here.nodes if node not in bad]
        lines = _look(job, here, nodes, wishes)
        lost = [node for node in nodes if any(f"failed on node {node}:" in line for line in lines)]
        if not lost:
            reports = read_reports(lines)
            for node in reports:
                if reports[node].deaf:
                    say(f"the link to {node} has not been looked at: {reports[node].deaf}")
            return bad | find_bad(nodes, reports)
        bad |= dict.fromkeys(lost, "srun cannot reach it")
        if len(nodes) - len(lost) < job.slurm.nodes or wishes.any:
            return bad


def _look(job: Job, here: Here, nodes: Sequence[str], wishes: Wishes) -> list[str]:
    """What the nodes' reports and srun have printed. Never in a container: unpacking its image takes minutes the first time."""
    gpus = job.slurm.gpus_per_node if job.cluster.device != "cpu" else 0
    look = [sys.executable, "-m", "megalm.launchers.slurm.preflight", f"--nodes={','.join(nodes)}", f"--port={here.port(1)}"]
    look += [f"--gpus={gpus}", f"--run-dir={job.run_dir}"]
    command = [*srun(nodes, 1, ["--kill-on-bad-exit=0", "--wait=0"]), *look]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, env=_environment(job, here), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + _LOOK_SECONDS
        while process.poll() is None and time.monotonic() < deadline and not wishes.end:
            time.sleep(_POLL_SECONDS / 4)
            if len(read_reports(_answers(out))) == len(nodes):
                deadline = min(deadline, time.monotonic() + 3.0)  # srun's own end
        _end(process)
        lines = _answers(out)
    for line in lines:
        if not line.startswith("{"):
            say(line)
    return lines


def _answers(out: object) -> list[str]:
    """The lines so far."""
    handle = out.fileno()  # type: ignore[attr-defined]
    size = os.fstat(handle).st_size
    return [line for line in os.pread(handle, size, 0).decode(errors="replace").splitlines() if line.strip()]


def run_step(job: Job, here: Here, nodes: Sequence[str], wishes: Wishes) -> int:
    """Start the verb on these nodes and wait for it; the ranks' exit code, all taken together."""
    mode = "plain" if not job.ranks_per_node else job.slurm.launch
    tasks = job.ranks_per_node if mode == "rank" else 1
    options = ["--kill-on-bad-exit=1", "--wait=60", "--open-mode=append", f"--output={_escaped(here.log_dir)}/node-%n.log"]
    given: dict[str, object] = {"head": nodes[0], "port": here.port(0), "nodes": ",".join(nodes), "ranks": job.ranks_per_node}
    given["log-dir"] = here.log_dir
    python = "python" if job.slurm.container else sys.executable
    task = [python, "-m", "megalm.launchers.slurm.task", mode, *(f"--{key}={value}" for key, value in given.items())]
    command = [*srun(nodes, tasks, options), *in_container(job, in_setup(job, [*task, "--", job.verb, *job.arguments]))]
    say(f"starting {len(nodes) * tasks} task{'s' if len(nodes) * tasks > 1 else ''} ({mode}); logs in {here.log_dir}")
    process = subprocess.Popen(command, env=_environment(job, here), stdin=subprocess.DEVNULL)
    stalled = _wait(process, job, here, wishes)
    codes = [int(note["code"]) for note in read_notes(here.log_dir)]
    ended = process.poll()
    if len(codes) < len(nodes) * tasks and ended != 0:
        codes.append(ExitCode.FAILED)  # a task that could not say how it ended
    return ExitCode.FAILED if stalled else verdict(codes)


def srun(nodes: Sequence[str], tasks_per_node: int, options: Sequence[str]) -> list[str]:
    """srun and its options, up to the command."""
    count = len(nodes)
    words = ["srun", f"--nodes={count}", f"--ntasks={count * tasks_per_node}", f"--ntasks-per-node={tasks_per_node}"]
    words += [f"--nodelist={','.join(nodes)}", "--export=ALL", "--distribution=block", *options]
    if int(os.environ.get("SLURM_CPUS_ON_NODE", "1")) < tasks_per_node:
        words += ["--overcommit"]
    return words


def in_container(job: Job, command: list[str]) -> list[str]:
    """The end of srun's command line: pyxis adds options to srun, apptainer runs the command and hands signals on."""
    image, mounts = job.slurm.container, job.slurm.container_mounts
    if not image:
        return command
    if job.slurm.container_tool == "pyxis":
        return [f"--container-image={image}", *([f"--container-mounts={mounts}"] if mounts else []), *command]
    gpus = ["--nv"] if job.slurm.gpus_per_node and job.cluster.device != "cpu" else []
    return ["apptainer", "exec", *gpus, *([f"--bind={mounts}"] if mounts else []), image, *command]


def in_setup(job: Job, command: list[str]) -> list[str]:
    """The command, after the site's own file where there is one. It replaces the shell: signals must reach it."""
    if not job.slurm.setup:
        return command
    return ["bash", "-c", "trap '' USR1 USR2; source \"$1\"; shift; exec \"$@\"", "setup", job.slurm.setup, *command]


def _environment(job: Job, here: Here) -> dict[str, str]:
    environ = {**os.environ, "MEGALM_TOKEN": here.token}
    if "SLURM_CPUS_PER_TASK" in environ:  # since 22.05 srun does not take it over by itself
        environ.setdefault("SRUN_CPUS_PER_TASK", environ["SLURM_CPUS_PER_TASK"])
    return environ


def _escaped(folder: Path) -> str:
    """srun replaces %t and the like in a file's name."""
    return str(folder).replace("%", "%%")


def _wait(process: subprocess.Popen, job: Job, here: Here, wishes: Wishes) -> bool:
    """Until srun has ended. Whether the run had stalled, and was killed."""
    reminded, failed, killed, stepped, since = 0.0, 0.0, False, False, time.monotonic()
    seen: tuple[int, int] | None = None
    limit, kill_seconds = _stall_seconds(job), client.kill_seconds()
    while process.poll() is None:
        time.sleep(_POLL_SECONDS)
        now = time.monotonic()
        failed = failed or (now if _has_failed(here) else 0.0)
        if failed and not killed and now - failed > _ECHO_SECONDS:
            _kill_step(here)
            killed = True
        if failed and now - failed > _LOST_SECONDS:
            say("a task has failed and the step does not end: a node may be lost")
            _end(process)
            return False
        if wishes.any and now - reminded > _REMIND_SECONDS:
            if not reminded:
                say("asked to stop: the ranks save and leave")
                note(job.run_dir, "stopping", job=here.key)
            process.send_signal(signal.SIGUSR1)
            reminded = now
        if wishes.any and now > _deadline(job, wishes, kill_seconds):
            say("not saved in time: back to the last checkpoint")
            _end(process)
            return False
        progress = read_progress(job.run_dir)
        state = (progress.step, progress.saved_step) if progress else (0, 0)
        if state != seen:
            stepped = stepped or (seen is not None and state[0] > seen[0])  # a start begins by going back to its checkpoint
            seen, since = state, now
        patience = limit if stepped else limit + job.cluster.rendezvous_seconds  # until all have met and loaded
        patience += job.cluster.timeout_seconds if (here.log_dir / BUSY).exists() else 0.0
        if limit and now - since > patience and not wishes.any:
            say(f"no step for {patience:.0f} s: the ranks write their stacks and are ended")
            note(job.run_dir, "stalled", job=here.key, step=state[0], seconds=patience)
            process.send_signal(signal.SIGUSR2)
            time.sleep(2.0)
            if silent := [path.stem for path in sorted(here.log_dir.glob("stacks-rank-*.txt")) if not path.stat().st_size]:
                say(f"stopped, or in a call that does not end: {', '.join(silent).replace('stacks-', '')} wrote nothing")
            _end(process)
            return True
    return False


def _has_failed(here: Here) -> bool:
    codes = [int(note["code"]) for note in read_notes(here.log_dir)]
    return bool(codes) and verdict(codes) not in (ExitCode.FINISHED, ExitCode.SAVED)


def _kill_step(here: Here) -> None:
    """After a rank has failed the others have nothing left to save, and SLURM would give them KillWait to do it."""
    step = next((note["step"] for note in read_notes(here.log_dir)), None)
    if step is not None:
        with suppress(MegalmError):  # else srun ends it, later
            client.ask("scancel", "--signal=KILL", f"{here.key}.{step}", seconds=10.0)


def _stall_seconds(job: Job) -> float:
    """With agents, which watch every rank, this is the last resort only. 0: the verb has no steps."""
    if not job.ranks_per_node:
        return 0.0
    said = job.cluster.stall_seconds
    if job.slurm.launch == "rank":
        return said or _STALL_SECONDS
    return max(_STALL_SECONDS, 10 * said)


def _deadline(job: Job, wishes: Wishes, kill_seconds: float) -> float:
    """By when the ranks must have saved; afterwards there is only time to go back to the queue."""
    ends = [wishes.save + max(5.0, job.slurm.save_seconds - 15.0)] if wishes.save else []
    return min([*ends, *([wishes.end + max(2.0, kill_seconds - _REQUEUE_SECONDS)] if wishes.end else [])])


def _end(process: subprocess.Popen) -> None:
    """srun ends its tasks when it gets TERM; and is killed where that does not help."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
