"""Writing and submitting a job, with commands of SLURM that only write down how they were called."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megalm.config import slurm_rules
from megalm.errors import ConfigError, RunError
from megalm.launchers import app
from megalm.launchers.slurm import client, command, history, plan
from megalm.launchers.slurm.plan import Job, read_job
from megalm.launchers.slurm.render import directives, render
from megalm.launchers.slurm.submit import submit, submit_verb

TINY = ["model=tiny", "cluster.device=cpu"]
ATTACKS = [
    "x; touch pwn", "x\n#SBATCH --uid=0", "$(touch pwn)", "`touch pwn`", "x\ntouch pwn", "--wrap=touch pwn", "x y", 'x" y',
    "\x00",
]  # fmt: skip
# Writes its arguments and environment down; answers with what the files beside it hold.
FAKE = """#!{python}
import json, os, pathlib, sys
here = pathlib.Path(__file__)
with open(here.parent / "calls.jsonl", "a") as file:
    file.write(json.dumps({{"name": here.name, "argv": sys.argv[1:], "environ": dict(os.environ)}}) + "\\n")
key = "-test" if "--test-only" in sys.argv else ""
answer = here.parent / (here.name + key + ".json")
out, error, code = json.loads(answer.read_text()) if answer.exists() else ("", "", 0)
print(out, end="")
print(error, end="", file=sys.stderr)
sys.exit(code)
"""


class Fake:
    """The commands, and what they were called with."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("sbatch", "scontrol", "sinfo", "squeue", "scancel"):
            (folder / name).write_text(FAKE.format(python=sys.executable))
            (folder / name).chmod(0o755)
        self.answers("sbatch", out="41\n")
        self.answers("scontrol", error="Invalid job id specified", code=1)

    def answers(self, name: str, out: str = "", error: str = "", code: int = 0) -> None:
        (self.folder / f"{name}.json").write_text(json.dumps([out, error, code]))

    def calls(self, name: str) -> list[dict]:
        path = self.folder / "calls.jsonl"
        calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in calls if call["name"] == name]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    (tmp_path / "bin").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return Fake(tmp_path / "bin")


def job(*arguments: str) -> Job:
    return read_job("pretrain", [*TINY, *arguments])


def test_the_script_asks_for_what_the_job_needs() -> None:
    made = job(
        "parallel=tp2_pp2", "slurm.nodes=2", "slurm.spares=1", "slurm.partition=train,urgent", "slurm.cpus_per_task=16",
        "slurm.constraint='[a100|h100]'", "slurm.exclude='n[3-5],n9'", "slurm.minutes=90", "slurm.extra=['--mail-type=END']",
        "slurm.account=lab-7", "slurm.qos=high", "slurm.reservation=r1",
    )  # fmt: skip
    lines = directives(made)
    assert {
        "--nodes=3", "--ntasks-per-node=1", "--cpus-per-task=16", "--partition=train,urgent", '--constraint="[a100|h100]"',
        '--exclude="n[3-5],n9"', "--time=90", "--signal=B:USR1@120", "--requeue", "--open-mode=append", "--wait-all-nodes=1",
        "--mail-type=END", "--account=lab-7", "--qos=high", "--reservation=r1", "--job-name=megalm",
    } <= set(lines)  # fmt: skip
    assert made.ranks_per_node == 2 and made.world_size == 4
    by_rank = directives(job("parallel=tp2_pp2", "slurm.nodes=2", "slurm.launch=rank", "slurm.cpus_per_task=16"))
    assert {"--ntasks-per-node=2", "--cpus-per-task=8"} <= set(by_rank)


def test_ranks_follow_the_gpus_that_are_asked_for() -> None:
    """On a login node without a GPU: 16 ranks, and rules that look for GPUs are content."""
    gpus = ["slurm.nodes=2", "slurm.gpus_per_node=8", "kernels.rms_norm=triton"]
    made = read_job("pretrain", ["model=tiny", "train.global_batch_size=64", *gpus])
    assert (made.ranks_per_node, made.world_size, made.config.data_parallel) == (8, 16, 16)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ or not os.environ["CUDA_VISIBLE_DEVICES"]
    with pytest.raises(ConfigError, match="must be a multiple"):
        read_job("pretrain", ["model=tiny", "slurm.nodes=3", "parallel.tensor_parallel=2", "slurm.processes_per_node=1"])


def test_what_slurm_has_given_wins() -> None:
    """sbatch --nodes=4 slurm/run.sbatch: the settings know nothing of it."""
    made = read_job("pretrain", [*TINY, "parallel=tp2_pp2", "slurm.spares=1", "train.global_batch_size=16"], nodes=5, gpus=0)
    assert (made.slurm.nodes, made.slurm.spares, made.ranks_per_node) == (4, 1, 1)
    assert "slurm.nodes=4" in made.arguments and made.arguments[-1] == "cluster.name=local"


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_gets_into_a_line_of_sbatch(attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file: there, unlike on the command line, a value may hold a line's end and a NUL."""
    monkeypatch.chdir(tmp_path)
    bad = set(slurm_rules.WORDS)
    if set(attack) <= set("x y;touchpwn-=rap"):
        bad.remove("setup")
        made = job(f"slurm.setup='{attack}'")
        assert f"source {shlex.quote(str(tmp_path / attack))}" in render(made, "s"), "a strange name, but a name"
    Path("mine.yaml").write_text(yaml.safe_dump({"slurm": dict.fromkeys(sorted(bad), attack)}))
    with pytest.raises(ConfigError) as caught:
        pytest.fail(render(job("mine.yaml"), "s"))
    assert {f"slurm.{key} is {slurm_rules.WORDS[key][1]}" for key in bad} <= {problem.rule for problem in caught.value.problems}


@pytest.mark.parametrize("attack", ATTACKS[:-1])
def test_nothing_gets_out_of_an_argument(attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bash runs the script; the program gets the argument to the letter, and nothing else has happened."""
    monkeypatch.chdir(tmp_path)
    made = job()
    made.arguments.append(f"tracking.project={attack}")
    python = tmp_path / "my python"
    python.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    python.chmod(0o755)
    script = render(made, "s", folder=tmp_path, python=str(python))
    done = subprocess.run(["bash"], input=script, cwd=tmp_path, capture_output=True, text=True, timeout=20, check=True)
    assert json.loads(done.stdout)[-1] == f"tracking.project={attack}"
    assert not (tmp_path / "pwn").exists()
    head = script.split("\nset -euo")[0]
    assert sum(line.startswith("#SBATCH") for line in script.splitlines()) == head.count("\n#SBATCH") or "\n#SBATCH" in attack
    assert head.count("\n#SBATCH") == len(directives(made)), "sbatch stops reading its lines at the first command"


@pytest.mark.parametrize("folder", ["runs/$(touch pwn)", "runs/a\nb", 'runs/a"b', "runs/`x`", "runs/a'b"])
def test_folders_with_meaning_are_refused(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump({"train": {"run_dir": folder}}))
    with pytest.raises(ConfigError, match="folder of a job"):
        job("mine.yaml")


@pytest.mark.parametrize("text", ["--array=0-9", "--arra=0-9", "--wra=x", "--w=x", "--gpus=8", "--wait", "-a0-9", "--x=a b"])
def test_extra_options_are_none_of_ours_nor_short_for_one(text: str) -> None:
    """sbatch takes an option by its first letters too."""
    with pytest.raises(ConfigError, match=r"slurm\.extra is a list of sbatch's long options"):
        job(f"slurm.extra=['{text}']")
    assert {"--mem=8G", "--exclusive", "--nodelist=n1"} <= set(
        directives(job("slurm.extra=['--mem=8G', '--exclusive', '--nodelist=n1']"))
    )


def test_a_setup_file_at_home(monkeypatch: pytest.MonkeyPatch, fake: Fake, tmp_path: Path) -> None:
    """bash expands no ~ in quotes, and looks for a name without a folder on the PATH."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.sh").touch()
    for setup in ("~/x.sh", "../x.sh"):
        made = job(f"slurm.setup={setup}", "train.run_dir=runs/a")
        (line,) = [line for line in submit(made).script.read_text().splitlines() if line.startswith("source")]
        assert line == f"source {made.slurm.setup}" and Path(made.slurm.setup).is_absolute()
        assert Path(made.slurm.setup).is_file()


def test_a_folder_with_blanks_and_percents() -> None:
    (line,) = [line for line in directives(job("train.run_dir='/runs/my 50% run'")) if line.startswith("--output")]
    assert line == '--output="/runs/my 50%% run/logs/slurm-%j.out"'


def test_submitting(fake: Fake, capsys: pytest.CaptureFixture) -> None:
    submit_verb("pretrain", [*TINY, "train.run_dir=runs/a"])
    test, real = [call["argv"] for call in fake.calls("sbatch")][1:]
    script = Path("runs/a/job.sh").absolute()
    assert test == ["--test-only", str(script)] and real == ["--parsable", str(script)]
    assert json.loads(Path("runs/a/slurm/holder.json").read_text())["jobs"] == ["41"]
    assert "job 41: pretrain on 1 node, ranks: 1" in capsys.readouterr().out
    assert Path("runs/a/logs").is_dir(), "sbatch does not make the folder of its log"
    subprocess.run(["bash", "-n", script], check=True)


SECRET = [
    "WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "X_AUTH", "PGPASSWORD", "DOCKER_AUTH_CONFIG",
    "GITLAB_PRIVATETOKEN", "MYSQL_PWD", "GITHUB_PAT", "SSHPASS", "RCLONE_CONFIG_PASS", "AZURE_STORAGE_CONNECTION_STRING",
    "OPENAI_APIKEY", "GOOGLE_CREDENTIALS", "api_key_2",
]  # fmt: skip
HARMLESS = [
    "KEYBOARD", "TOKENIZERS_PARALLELISM", "PWD", "OLDPWD", "PATH", "LD_LIBRARY_PATH", "NCCL_IB_PKEY", "SSH_AUTH_SOCK",
    "SSH_ASKPASS", "GIT_AUTHOR_NAME", "XAUTHORITY",
]  # fmt: skip


def test_secrets_stay_here(fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    secrets = {name: f"s3cret-{name}" for name in SECRET}
    for name in (*secrets, *HARMLESS):
        monkeypatch.setenv(name, secrets.get(name) or os.environ.get(name, "0"))
    submit_verb("pretrain", [*TINY, "train.run_dir=runs/a"])
    *_, call = fake.calls("sbatch")
    assert not secrets.keys() & call["environ"].keys() and set(HARMLESS) <= call["environ"].keys()
    written = "".join(path.read_text() for path in Path("runs").rglob("*") if path.is_file())
    out = capsys.readouterr().out
    assert "s3cret" not in written + out
    assert all(name in out for name in secrets)


def test_cluster_slurm_submits_instead_of_running(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["cluster=slurm"], ["cluster.name=slurm"], ["mine.yaml"]):
        Path("mine.yaml").write_text("cluster: {name: slurm}\ntrain: {run_dir: runs/from-yaml}\n")
        monkeypatch.setattr(sys, "argv", ["megalm pretrain", *TINY, *arguments])
        app.run_verb("pretrain", lambda config: pytest.fail("it ran"))
    assert len([call for call in fake.calls("sbatch") if "--parsable" in call["argv"]]) == 3
    script = Path("runs/from-yaml/job.sh").read_text()
    assert script.rstrip().endswith("-- pretrain model=tiny cluster.device=cpu mine.yaml cluster.name=local")


def test_other_verbs_are_one_process(fake: Fake) -> None:
    made = read_job("prepare", ["prepare.source=stdlib", "cluster=slurm", "slurm.minutes=30", "slurm.partition=train"])
    assert (made.ranks_per_node, made.arguments, made.slurm.minutes) == (0, ["prepare.source=stdlib"], 30)
    words = shlex.split(render(made, "s").splitlines()[-1])
    verb, *rest = words[words.index("--") + 1 :]
    assert read_job(verb, rest) == made, "the job reads the same"
    with pytest.raises(ConfigError, match="prepare runs on one node"):
        read_job("prepare", ["slurm.nodes=2"])
    with pytest.raises(ConfigError, match=r"slurm\.partition is names"):
        read_job("prepare", ["slurm.partition='a b'"])
    with pytest.raises(ConfigError, match="unknown"):
        read_job("prepare", ["slurm.minuts=2"])
    for verb in ("train", "sweep", "status", "report"):
        with pytest.raises(ConfigError, match="no such verb"):
            read_job(verb, [])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_job("prepare", ["slurm.constraint=[a"])
    assert made.run_dir == read_job("prepare", ["prepare.source=stdlib"]).run_dir, "the same job once more"
    assert made.run_dir != read_job("prepare", ["prepare.source=mine"]).run_dir, "another, that may run beside it"
    with pytest.raises(ConfigError, match="one job is one run"):
        read_job("pretrain", ["-m", "optim.lr=1,2"])


def test_a_chain(fake: Fake) -> None:
    made = job("slurm.requeue=false", "slurm.chain=3", "train.run_dir=runs/a")
    done = submit(made)
    assert done.jobs == ["41"] * 3
    assert {"--no-requeue", "--dependency=singleton"} <= set(directives(made))
    names = [line for text in (render(made, "a1"), render(made, "b2")) for line in text.splitlines() if "--job-name" in line]
    assert names == ["#SBATCH --job-name=megalm-a1", "#SBATCH --job-name=megalm-b2"], "two chains do not wait for one another"
    assert len({call["argv"][-1] for call in fake.calls("sbatch")[2:]}) == 1, "one script: its jobs share a submission"


def test_no_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch is not on the PATH") as caught:
        submit(job("train.run_dir=runs/a"))
    assert "megalm slurm render" in str(caught.value)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("said", "key", "fix"),
    [
        ("invalid partition specified: nope", "slurm.partition", "slurm.partition=train"),
        ("Requested node configuration is not available", "slurm.nodes", "slurm.nodes=2"),
        ("Invalid account or account/partition combination specified", "slurm.account", "slurm.account="),
        ("Invalid feature specification", "slurm.constraint", "slurm.constraint="),
        ("something new", "slurm", "--test-only"),
    ],
)
def test_sbatch_is_asked_first(said: str, key: str, fix: str, fake: Fake) -> None:
    fake.answers("sbatch-test", error=f"sbatch: error: {said}\nallocation failure: {said}", code=1)
    fake.answers("sinfo", out="train\nurgent\n" if key == "slurm.partition" else "n1 idle\nn2 mix\nn3 down*\nn4 idle*\n")
    with pytest.raises(ConfigError) as caught:
        submit(job("train.run_dir=runs/a", "slurm.nodes=3", "slurm.processes_per_node=1", "train.global_batch_size=12"))
    (problem,) = caught.value.problems
    assert (problem.key, said in problem.rule) == (key, True)
    assert fix in problem.fix
    assert not any("--parsable" in call["argv"] for call in fake.calls("sbatch"))


def test_a_node_has_less_than_is_asked_of_it(fake: Fake) -> None:
    """As many nodes as wanted are up: then it is what each should have."""
    said = "Requested node configuration is not available"
    fake.answers("sbatch-test", error=f"allocation failure: {said}", code=1)
    fake.answers("sinfo", out="n1 idle\nn2 mix\n")
    with pytest.raises(ConfigError) as caught:
        submit(job("train.run_dir=runs/a", "slurm.nodes=2", "slurm.processes_per_node=1", "slurm.cpus_per_task=999"))
    (problem,) = caught.value.problems
    assert (problem.key, problem.value) == ("slurm.cpus_per_task", 999) and said in problem.rule
    assert [call["argv"][1:3] for call in fake.calls("sinfo")][-1] == ["-o", "%c CPUs %G %f"]


def test_a_second_job_on_a_folder_is_refused(fake: Fake) -> None:
    submit(job("train.run_dir=runs/a"))
    fake.answers("scontrol", out="JobId=41 JobName=megalm JobState=PENDING Reason=Resources\n")
    with pytest.raises(ConfigError, match="another job writes this run: job 41"):
        submit(job("train.run_dir=runs/a"))
    submit(job("train.run_dir=runs/b"))
    fake.answers("scontrol", out="JobId=41 JobName=megalm JobState=FAILED\n")
    submit(job("train.run_dir=runs/a"))


def test_the_folder_of_another_model_is_refused(fake: Fake) -> None:
    made = job("train.run_dir=runs/a")
    Path("runs/a/checkpoints").mkdir(parents=True)
    Path("runs/a/checkpoints/latest").write_text("step-00000002\n")
    settings = {name: value for name, value in vars(made.config.model).items() if name != "derived"}
    Path("runs/a/config.yaml").write_text(yaml.safe_dump({"model": settings}))
    submit(made)
    Path("runs/a/config.yaml").write_text(yaml.safe_dump({"model": {**settings, "num_layers": 99}}))
    with pytest.raises(ConfigError, match=r"begun with model\.num_layers=99"):
        submit(job("train.run_dir=runs/a"))


def test_a_folder_without_room_is_refused(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalm.launchers.slurm.submit.FREE_BYTES", 1 << 60)
    with pytest.raises(ConfigError, match=r"its disk has \d+ MiB left"):
        submit(job("train.run_dir=runs/a"))
    Path("file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        submit(job("train.run_dir=file/a"))
    assert {call["argv"][0] for call in fake.calls("sbatch")} == {"--version"}


def test_a_missing_setup_file(fake: Fake, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"slurm\.setup"):
        submit(job("slurm.setup=modules.sh"))


def test_a_controller_that_does_not_answer(fake: Fake) -> None:
    (fake.folder / "sinfo").write_text("#!/bin/sh\nexec sleep 30\n")
    with pytest.raises(RunError, match=r"no answer within 0 s"):
        client.ask("sinfo", seconds=0.2)


def test_a_controller_that_comes_back(fake: Fake) -> None:
    """A job must not die because slurmctld is being restarted."""
    (fake.folder / "scontrol").write_text(
        "#!/bin/sh\n[ -e $0.once ] && { echo done; exit 0; }\ntouch $0.once\n"
        "echo 'slurm_requeue error: Unable to contact slurm controller (connect failure)' >&2\nexit 1\n"
    )
    assert client.insist("scontrol", "requeue", "7", seconds=0.01).out == "done\n"
    fake.answers("sbatch", error="Invalid job id", code=1)
    assert client.insist("sbatch", seconds=60).code == 1, "another error is none to wait for"
    fake.answers("sinfo", out="KillTree = x\nKillWait                = 12 sec\n")
    (fake.folder / "sinfo").rename(fake.folder / "scontrol")
    (fake.folder / "sinfo.json").rename(fake.folder / "scontrol.json")
    assert client.kill_seconds() == 12


@pytest.mark.parametrize(
    ("environ", "key"),
    [
        ({"SLURM_JOB_ID": "22"}, "22"),
        ({"SLURM_JOB_ID": "22", "SLURM_ARRAY_JOB_ID": "22", "SLURM_ARRAY_TASK_ID": "5"}, "22_5"),
    ],
)
def test_the_last_element_of_an_array_is_not_the_array(environ: dict[str, str], key: str) -> None:
    assert client.job_key(environ) == key


def test_following(fake: Fake, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    submit(job("train.run_dir=runs/a"))

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["megalm slurm", *words])
        try:
            command.main()
        except SystemExit as error:
            assert error.code == 2
        printed = capsys.readouterr()
        return printed.out + printed.err

    fake.answers("scontrol", out="JobId=41 JobState=PENDING Reason=Resources StartTime=Unknown Restarts=1\n")
    assert "job 41: PENDING, because Resources" in run("status", "runs/a")
    Path("runs/a/logs/slurm-41.out").write_text("from the supervisor\n")
    Path("runs/a/logs/41.0").mkdir()
    Path("runs/a/logs/41.0/node-0.log").write_text("step 1\n")
    assert "from the supervisor" in (out := run("logs", "runs/a")) and "step 1" in out
    assert "cancelled 41" in run("cancel", "runs/a")
    Path("7").mkdir()
    Path("2024_x").mkdir()
    history.hold(Path("7"), ["42"], "n1")
    assert "cancelled 42" in run("cancel", "7") and "cancelled 8_1" in run("cancel", "8_1")
    assert [call["argv"] for call in fake.calls("scancel")] == [["41"], ["42"], ["8_1"]]
    assert all("no job has been submitted" in run(subverb, "2024_x") for subverb in ("status", "cancel", "logs"))
    assert "no job has been submitted" in run("status", "runs/b")
    assert "did you mean megalm slurm submit?" in run("sumbit")
    assert "which verb?" in run("render")
    assert "one run folder or job number" in run("cancel")


def test_of_a_chain_what_is_left_is_cancelled(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """scancel fails for a job that SLURM has forgotten."""
    history.hold(Path("runs/a"), ["41", "42", "43"], "n1")
    monkeypatch.setattr(client, "state_of", lambda job: "" if job == "41" else "PENDING")
    monkeypatch.setattr(sys, "argv", ["megalm slurm", "cancel", "runs/a"])
    command.main()
    assert fake.calls("scancel")[0]["argv"] == ["42", "43"]


def test_rendering_touches_nothing(fake: Fake, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["megalm slurm", "render", "pretrain", *TINY])
    command.main()
    assert capsys.readouterr().out.startswith("#!/bin/bash\n#SBATCH --job-name=megalm\n")
    assert not list(Path.cwd().iterdir()) and not fake.calls("sbatch")


def test_the_environment_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with plan.as_in_job(4, 2):
        assert (os.environ["WORLD_SIZE"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("4", "0,1")
    assert os.environ["RANK"] == "3" and "WORLD_SIZE" not in os.environ


Run = Callable[..., subprocess.CompletedProcess]


def test_the_supervisor_outside_of_a_job(megalm: Run, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "megalm.launchers.slurm.job", "--", "pretrain"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "inside a SLURM job" in done.stderr and "Traceback" not in done.stderr
