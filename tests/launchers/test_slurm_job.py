"""The supervisor of a job, with a srun that plays the ranks and a scontrol that only listens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from megalm.config.cluster import SlurmConfig
from megalm.launchers.slurm import client, history, launch
from megalm.launchers.slurm import job as supervisor
from megalm.launchers.slurm.inside import Here
from megalm.runfolder import read_events

# Plays a step: `preflight` answers for the nodes in FAKE/nodes, `task` runs FAKE/ranks with the log folder as argument.
SRUN = """#!{python}
import json, os, runpy, sys
words = sys.argv[1:]
option = lambda name: next(w.partition("=")[2] for w in words if w.startswith(name + "="))
open({folder!r} + "/srun.jsonl", "a").write(json.dumps(words) + "\\n")
if "megalm.launchers.slurm.preflight" in words:
    bad = json.load(open({folder!r} + "/bad.json"))
    lost = [node for node in bad if bad[node] == "lost" and node in option("--nodelist").split(",")]
    if lost:
        sys.exit(f"srun: error: Task launch for StepId=7.0 failed on node {{lost[0]}}: Communication connection failure")
    for node in [w for w in words if w.startswith("--nodes=")][-1].partition("=")[2].split(","):
        if bad.get(node) != "silent":
            print(json.dumps({{"host": node, "problems": [bad[node]] if node in bad else []}}), flush=True)
    sys.exit(0)
sys.argv = ["ranks", option("--log-dir")]
runpy.run_path({folder!r} + "/ranks.py", run_name="__main__")
"""
SCONTROL = """#!{python}
import json, sys
words = sys.argv[1:]
open({folder!r} + "/scontrol.jsonl", "a").write(json.dumps(words) + "\\n")
if words[:2] == ["show", "hostnames"]:
    print("\\n".join(words[2].split(",")))
elif "show" in words:
    print("JobId=7 JobState=" + open({folder!r} + "/state").read() + " ExcNodeList=(null)")
"""
NOTE = "import json, os, pathlib, signal, sys, time\nlogs = pathlib.Path(sys.argv[1])\n" + (
    "def note(*codes):\n"
    "    for i, code in enumerate(codes):\n"
    "        (logs / f'exit-{i}.json').write_text(json.dumps({'task': i, 'code': code, 'step': '1'}))\n"
)


ROOT = Path(__file__).parents[2]
SUBMITTED = (sys.executable, "-m", "megalm.launchers.slurm.job", "--submission=s", "--")


class Play:
    """A run folder, fake commands, and a supervisor to start."""

    def __init__(self, folder: Path):
        self.folder, self.run_dir = folder, folder / "run"
        self.environ: dict[str, str] = {}
        sinfo = "#!/bin/sh\nprintf 'n1 idle\\nn2 mix\\nn3 idle\\n'\n"
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "sinfo": sinfo, "scancel": "#!/bin/sh\n"}.items():
            (folder / name).write_text(text.format(python=sys.executable, folder=str(folder)))
            (folder / name).chmod(0o755)
        (folder / "state").write_text("RUNNING")
        self.bad()

    def bad(self, **nodes: str) -> None:
        (self.folder / "bad.json").write_text(json.dumps(nodes))

    def ranks(self, text: str) -> None:
        (self.folder / "ranks.py").write_text(NOTE + text)

    def start(
        self,
        *arguments: str,
        restart: int = 0,
        nodes: str = "n1,n2",
        command: tuple[str, ...] = SUBMITTED,
        stdout: Any = subprocess.PIPE,
    ) -> subprocess.Popen:
        given = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": nodes, "SLURM_JOB_PARTITION": "train", "SLURM_CPUS_ON_NODE": "8"}
        environ = {**os.environ, **given, "PATH": f"{self.folder}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
        if restart:
            environ["SLURM_RESTART_COUNT"] = str(restart)
        settings = ["model=tiny", "parallel=tp2", "slurm.launch=rank", "cluster.device=cpu", f"train.run_dir={self.run_dir}"]
        environ |= {"SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": sys.executable, **self.environ}
        words = [*command, "pretrain", *settings, *arguments]
        return subprocess.Popen(words, env=environ, cwd=self.folder, stdout=stdout, stderr=subprocess.STDOUT, text=True)

    def run(self, *arguments: str, restart: int = 0, nodes: str = "n1,n2") -> tuple[int, str]:
        process = self.start(*arguments, restart=restart, nodes=nodes)
        out, _ = process.communicate(timeout=60)
        return process.returncode, out

    def calls(self, name: str) -> list[list[str]]:
        path = self.folder / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def requeues(self) -> int:
        return self.calls("scontrol").count(["requeue", "7"])

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.run_dir) if event["kind"] == kind]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    return Play(tmp_path)


@pytest.mark.parametrize(
    ("codes", "exit_code", "requeues"),
    [([0, 0], 0, 0), ([75, 75], 75, 1), ([1, -9], 1, 1), ([2, -15], 2, 0), ([-9, 3], 3, 0)],
)
def test_how_the_ranks_end_decides(codes: list[int], exit_code: int, requeues: int, play: Play) -> None:
    play.ranks(f"note(*{codes})\nsys.exit(1 if max({codes}) not in (0, 75) else 0)")
    code, out = play.run()
    assert (code, play.requeues()) == (exit_code, requeues), out
    assert len(play.calls("srun")) == 2


def test_the_first_error_is_shown(play: Play) -> None:
    """The cause, not its echo on the other rank."""
    play.ranks(
        "for rank, when in ((0, 2.0), (1, 1.0)):\n"
        "    problem = {'key': f'key{rank}', 'value': 'x', 'rule': 'broken', 'allowed': '', 'fix': ''}\n"
        "    note_ = {'traceback': '', 'rank': rank, 'time': when, 'kind': 'run error', 'exit_code': 1, 'problems': [problem]}\n"
        "    (logs / f'error-rank-{rank}.json').write_text(json.dumps(note_))\nnote(1, 1)\nsys.exit(1)"
    )
    _, out = play.run()
    assert "FAILED (1); run error on rank 1:\nkey1 = x" in out and "key0" not in out


def test_the_step_is_started_as_it_must_be(play: Play) -> None:
    play.ranks("note(0, 0)")
    play.run(f"slurm.setup={play.folder}/modules.sh")
    look, step = play.calls("srun")
    assert {"--kill-on-bad-exit=0", "--wait=0", "--nodes=2", "--ntasks=2"} <= set(look)
    assert {"--kill-on-bad-exit=1", "--wait=60", "--open-mode=append", "--export=ALL", "--nodelist=n1,n2"} <= set(step)
    assert f"--output={play.run_dir}/logs/7.0/node-%n.log" in step
    at = step.index("bash")
    assert step[at + 1] == "-c" and step[at + 4] == f"{play.folder}/modules.sh"
    port = next(int(word.partition("=")[2]) for word in step if word.startswith("--port="))
    assert 20000 <= port < 26000


def test_the_script_by_hand(play: Play) -> None:
    """sbatch --nodes=3 slurm/run.sbatch pretrain ...: it trains on the nodes that it was given."""
    play.ranks("note(0, 0, 0)")
    settings = ("parallel=single", "train.global_batch_size=12", "slurm.processes_per_node=1")
    process = play.start(*settings, nodes="n1,n2,n3", command=("bash", str(ROOT / "slurm" / "run.sbatch")))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert "--nodelist=n1,n2,n3" in play.calls("srun")[1] and "slurm.nodes=3" in play.calls("srun")[1]
    assert (play.run_dir / "slurm" / "history-job-7.json").exists()


def test_an_element_of_an_array_goes_by_the_name_that_megalm_slurm_logs_looks_for(play: Play) -> None:
    play.environ = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    play.ranks("note(75, 75)")
    play.run()
    assert f"--output={play.run_dir}/logs/5_2.0/node-%n.log" in play.calls("srun")[1]
    assert history.jobs_of(play.run_dir) == ["5_2"] and ["requeue", "5_2"] in play.calls("scontrol")


def test_a_container_is_an_option_of_srun(play: Play) -> None:
    play.ranks("note(0, 0)")
    play.run("slurm.container=docker://nvcr.io/nvidia/pytorch:26.01", "slurm.container_mounts=/data:/data")
    look, step = play.calls("srun")
    assert not any(word.startswith("--container") for word in look), "an image that is not there yet takes minutes"
    assert look[look.index("-m") - 1] == sys.executable
    assert {"--container-image=docker://nvcr.io/nvidia/pytorch:26.01", "--container-mounts=/data:/data"} <= set(step)
    assert step[step.index("-m") - 1] == "python", "the image's own"
    play.run()
    plain = play.calls("srun")[3]
    assert not any(word.startswith("--container") for word in plain) and plain[plain.index("-m") - 1] == sys.executable


def test_a_container_by_apptainer_is_around_a_task(play: Play) -> None:
    play.ranks("note(0, 0)")
    image, mounts = "images/megalm.sif", "/data:/data,/scratch:/scratch"
    given = (f"slurm.container={image}", "slurm.container_tool=apptainer", f"slurm.container_mounts={mounts}")
    play.run(*given, f"slurm.setup={play.folder}/modules.sh")
    look, step = play.calls("srun")
    at = step.index("apptainer")
    assert step[at : at + 5] == ["apptainer", "exec", f"--bind={mounts}", image, "bash"]
    assert "apptainer" not in look and not any(word.startswith("--container") for word in [*look, *step])


def test_a_crash_loop_stops(play: Play) -> None:
    play.ranks("note(1, 1)\nsys.exit(1)")
    ends = [play.run("slurm.max_failures=3", restart=i)[0] for i in range(3)]
    assert (ends, play.requeues()) == ([1, 1, 1], 2)
    assert play.events("gave_up")[0]["reason"].startswith("3 failed starts in a row")
    history.hold(play.run_dir, ["6", "7"], "login")
    past = history.read_history(play.run_dir, "s")
    past.ended_by = "6"
    (play.folder / "state").write_text("FAILED")
    history.write_history(play.run_dir, "s", past)
    code, out = play.run()
    assert code == 1 and "job 6 has ended with FAILED" in out, "the next job of a chain does nothing"


def test_a_start_that_saves_begins_a_new_row(play: Play) -> None:
    play.ranks(
        "from megalm.runfolder import *\n"
        "run = logs.parents[1]\nold = read_progress(run)\n"
        "write_progress(run, Progress(5, 9, (old.saved_step if old else 0) + 1, time.time()))\nnote(1, 1)\nsys.exit(1)"
    )
    for i in range(5):
        play.run("slurm.max_failures=1", restart=i)
    assert play.requeues() == 5


def test_a_supervisor_that_went_with_its_node_is_told_of_by_the_next(play: Play) -> None:
    """SLURM says when it put the job back."""
    play.ranks("os.kill(os.getppid(), signal.SIGKILL)")
    play.run("slurm.max_failures=3")
    (play.folder / "state").write_text("RUNNING SubmitTime=2026-01-01T10:00:00")
    play.ranks("note(0, 0)")
    assert play.run(restart=1)[0] == 0
    (event,) = play.events("requeued")
    assert event["time"] == datetime(2026, 1, 1, 10).timestamp() and "without a word" in event["reason"]
    assert history.read_history(play.run_dir, "s").starts == 2


def test_what_was_accepted_once_is_not_refused_for_good(play: Play) -> None:
    """A file system that one node has not mounted: the second start may well find it, on other nodes."""
    play.ranks("note(1, 1)\nsys.exit(1)")
    play.run()
    play.ranks("note(2, 2)\nsys.exit(2)")
    assert (play.run(restart=1)[0], play.requeues()) == (1, 2)
    assert history.read_history(play.run_dir, "s").failures == 2


def test_a_log_without_room_changes_nothing(play: Play) -> None:
    """The disk that the job's log lies on is full."""
    play.ranks("note(75, 75)")
    with open("/dev/full", "w") as full:
        process = play.start(stdout=full)
    assert (process.wait(60), play.requeues()) == (75, 1)


def test_starts_are_capped(play: Play) -> None:
    play.ranks("note(75, 75)")
    assert [play.run("slurm.max_starts=2", restart=i)[0] for i in range(2)] == [75, 1]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_the_wish_to_stop_reaches_the_ranks(number: int, play: Play) -> None:
    """They are reminded: one that has just started may not have listened yet."""
    play.ranks(
        "wishes = []\nsignal.signal(signal.SIGUSR1, lambda *_: wishes.append(1))\n(logs / 'ready').touch()\n"
        "while len(wishes) < 2:\n    time.sleep(.05)\nnote(75, 75)"
    )
    process = play.start("slurm.save_seconds=60")
    end = time.monotonic() + 30
    while not (play.run_dir / "logs/7.0/ready").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, play.requeues()) == (75, 1), out
    assert history.read_history(play.run_dir, "s").failures == 0


@pytest.mark.parametrize(("minutes", "failures", "end"), [(1, 1, ""), (60, 0, ""), (60, 1, "now")])
def test_a_start_that_saves_nothing_by_its_time_limit_counts(minutes: int, failures: int, end: str, play: Play) -> None:
    """One that was preempted before it could save does not. Newer SLURMs say when the job's time is over."""
    play.ranks("print('up', flush=True)\ntime.sleep(60)")
    play.environ = {"SLURM_JOB_END_TIME": str(int(time.time()))} if end else {}
    process = play.start(f"slurm.minutes={minutes}", "slurm.save_seconds=10")
    assert process.stdout is not None
    while "up" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert (play.requeues(), history.read_history(play.run_dir, "s").failures) == (1, failures), out
    assert ("had saved nothing by its time limit" in out) is bool(failures)


RAN = "StartTime=2026-01-01T10:00:00 TimeLimit=1-01:00:00 EndTime="


@pytest.mark.parametrize(
    ("state", "requeues"),
    [
        ("CANCELLED", 0),
        (f"COMPLETING Restarts=0 PreemptTime=None {RAN}2026-01-01T10:05:00", 0),
        (f"COMPLETING Restarts=0 PreemptTime=None {RAN}Unknown", 0),
        (f"COMPLETING Restarts=0 PreemptTime=None {RAN.replace('1-01:00:00', 'UNLIMITED')}2026-02-01T10:05:00", 0),
        (f"COMPLETING Restarts=0 PreemptTime=None {RAN}2026-01-02T11:00:20", 1),  # at its time limit
        (f"COMPLETING Restarts=0 PreemptTime=2026-01-01T10:04:00 {RAN}2026-01-01T10:05:00", 1),
        (f"COMPLETING Restarts=1 PreemptTime=None {RAN}2026-01-01T10:05:00", 1),  # SLURM itself has put it back
        ("RUNNING", 1),
    ],
)
def test_only_scancel_is_the_users_wish_to_end_it(state: str, requeues: int, play: Play) -> None:
    """TERM comes for other reasons too, and while the ranks are there SLURM says COMPLETING for all of them."""
    (play.folder / "state").write_text(state)
    play.ranks("signal.signal(signal.SIGUSR1, lambda *_: (note(75, 75), sys.exit(0)))\nprint('up', flush=True)\ntime.sleep(60)")
    process = play.start()
    assert process.stdout is not None
    while "up" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert play.requeues() == requeues, out
    assert ("cancelled: the job ends" in out) is not bool(requeues)
    assert [event["cancelled"] for event in play.events("gave_up")] == [True] * (1 - requeues)


def test_a_stalled_run_is_ended(play: Play) -> None:
    play.ranks("signal.signal(signal.SIGUSR2, lambda *_: (logs / 'stacks').touch())\nwhile True:\n    time.sleep(.1)")
    code, out = play.run("cluster.stall_seconds=1", "cluster.rendezvous_seconds=1")
    assert (code, play.requeues()) == (1, 1), out
    assert (play.run_dir / "logs/7.0/stacks").exists(), "stacks first"
    assert play.events("stalled")


@pytest.mark.parametrize("what", ["busy", "back"])
def test_a_run_that_saves_or_starts_again_is_not_stalled(what: str, play: Play) -> None:
    """Saving may take as long as a collective; and going back to the checkpoint is no step: the first one is still to come."""
    play.ranks(
        "from megalm.runfolder import *\nrun = logs.parents[1]\n"
        "tell = lambda step: write_progress(run, Progress(step, 9, 3, time.time()))\n"
        f"back = {what == 'back'}\n"
        "tell(7 if back else 3)\ntime.sleep(1)\ntell(3 if back else 4)\n"
        "back or (logs / 'busy').touch()\ntime.sleep(4)\nnote(0, 0)"
    )
    code, out = play.run("cluster.stall_seconds=2", f"cluster.rendezvous_seconds={20 if what == 'back' else 1}")
    assert code == 0, out


def test_a_bad_node_is_excluded_after_the_requeue(play: Play) -> None:
    play.bad(n2="its disk is full")
    code, out = play.run("slurm.nodes=2")
    assert code == 1 and "bad node n2: its disk is full" in out
    acts = [words for words in play.calls("scontrol") if words[0] in ("requeue", "update")]
    assert acts == [["requeue", "7"], ["update", "JobId=7", "ExcNodeList=n2"]]
    assert history.read_history(play.run_dir, "s").failures == 0


def test_a_node_that_srun_cannot_reach(play: Play) -> None:
    """It ends the step on the others too, which are not to blame; with a spare they are looked at again, and train."""
    play.bad(n2="lost")
    code, out = play.run("slurm.nodes=2")
    assert code == 1 and "bad node n2: srun cannot reach it" in out and "bad node n1" not in out
    assert ["update", "JobId=7", "ExcNodeList=n2"] in play.calls("scontrol")
    play.ranks("note(0, 0)")
    code, out = play.run("slurm.nodes=2", "slurm.spares=1", nodes="n1,n2,n3", restart=1)
    assert code == 0, out
    assert "--nodelist=n1,n3" in play.calls("srun")[-1]


def test_nodes_are_not_excluded_until_none_is_left(play: Play) -> None:
    """Three nodes in the partition, two needed, one excluded before: the second bad one must be waited for."""
    past = history.History(starts=1, excluded=["n3"])
    history.hold(play.run_dir, ["7"], "login")
    history.write_history(play.run_dir, "s", past)
    play.bad(n2="silent")
    code, out = play.run("slurm.nodes=2", restart=1)
    assert code == 1 and "cannot be left out" in out
    assert ["update", "JobId=7", "StartTime=now+30"] in play.calls("scontrol")


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({}, 4),  # of six one is bad, one is drained
        ({"exclude": "c1,c2"}, 2),
        ({"constraint": "fast"}, 2),
        ({"constraint": "fast&big"}, 1),
        ({"constraint": "fast|big"}, 4),  # not judged
        ({"gpus_per_node": 4}, 2),
        ({"gpus_per_node": 8}, 1),
    ],
)
def test_only_nodes_that_the_job_could_take_are_counted(
    settings: dict[str, Any], left: int, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ["bad idle fast gpu:8", "c1 idle slow (null)", "c2 mix- big (null)", "off drain fast gpu:8", "lost idle* fast gpu:8"]
    rows += ["g1 idle fast,big gpu:a100:4(S:0-1),shard:64", "g2 alloc fast gpu:a100:4(S:0),gpu:h100:4(S:1)"]
    (play.folder / "sinfo").write_text("#!/bin/sh\nprintf '" + "\\n".join(rows) + "'\n")
    monkeypatch.setenv("PATH", f"{play.folder}:{os.environ['PATH']}")
    here = Here("7", "7", 0, ["bad"], "train")
    assert supervisor._is_enough(here, ["bad"], SlurmConfig(nodes=left, **settings))
    assert not supervisor._is_enough(here, ["bad"], SlurmConfig(nodes=left, spares=1, **settings))


def test_if_all_nodes_are_bad_it_is_not_their_fault(play: Play) -> None:
    play.bad(n1="run_dir is full", n2="run_dir is full")
    assert [play.run("slurm.max_failures=2", restart=i)[0] for i in range(2)] == [1, 1]
    assert play.requeues() == 1 and not [w for w in play.calls("scontrol") if w[0] == "update"]


def test_spare_nodes_stand_in(play: Play) -> None:
    play.bad(n1="no GPU")
    play.ranks("note(0, 0)")
    code, out = play.run("slurm.nodes=2", "slurm.spares=1", nodes="n1,n2,n3")
    assert code == 0, out
    assert "--nodelist=n2,n3" in play.calls("srun")[1]
    assert "--head=n2" in play.calls("srun")[1]


def test_a_run_that_another_job_writes_is_refused(play: Play) -> None:
    history.hold(play.run_dir, ["6"], "login")
    code, out = play.run()
    assert (code, len(play.calls("srun"))) == (2, 0) and "another job writes this run: job 6" in out


def test_where_requeue_is_off_the_code_says_how_it_went(play: Play) -> None:
    play.ranks("note(75, 75)")
    assert play.run("slurm.requeue=false")[0] == 75
    assert play.requeues() == 0


class Silence:
    """A controller that is down: its commands take longer than is waited for, but for the first ones of `said`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, said: dict[str, str] | None = None):
        self.said, self.asked, self.up = said or {}, 0, False
        monkeypatch.setattr(client.shutil, "which", str)
        monkeypatch.setattr(client.subprocess, "run", self.run)
        monkeypatch.setattr(client.time, "sleep", self.wait)

    def run(self, command: tuple[str, ...], timeout: float, **_: Any) -> subprocess.CompletedProcess:
        self.asked += 1
        if not self.up:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 0, self.said.get(command[0], ""), "")

    def wait(self, seconds: float) -> None:
        self.up = seconds > 1.0


def test_a_controller_that_does_not_answer_ends_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two starts and after a rank has died, each question has an answer to go by without it."""
    silence = Silence(monkeypatch)
    here = Here("7", "7", 0, ["n1", "n2"], "train", log_dir=tmp_path)
    (tmp_path / "exit-0.json").write_text('{"code": 1, "step": "0"}')
    launch._kill_step(here)
    assert client.kill_seconds() == 30.0
    assert not supervisor._is_enough(here, ["n1"], SlurmConfig())
    supervisor._note_lost_start(here, tmp_path)
    assert next(read_events(tmp_path))["kind"] == "requeued"
    assert silence.asked == 4


def test_who_holds_the_folder_is_asked_until_there_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Silence(monkeypatch, {"scontrol": "JobId=6 JobState=RUNNING"})
    assert client.state_of("6", client.insist) == "RUNNING"


def test_a_bad_node_is_left_out_of_the_rest_of_a_chain(play: Play) -> None:
    """Else each of its jobs may get that node, and be gone in seconds."""
    history.hold(play.run_dir, ["7", "8"], "login")
    (play.folder / "state").write_text("PENDING")
    play.bad(n2="its disk is full")
    assert play.run("slurm.nodes=2", "slurm.requeue=false", "slurm.chain=2")[0] == 1
    assert ["update", "JobId=8", "ExcNodeList=n2"] in play.calls("scontrol") and not play.requeues()
    assert history.read_history(play.run_dir, "s").excluded == ["n2"]


def test_a_bad_setting_ends_it_before_anything_starts(play: Play) -> None:
    code, out = play.run("model.hidden_size=7")
    assert code == 2 and "Traceback" not in out and not play.calls("srun")
