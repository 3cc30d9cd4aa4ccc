"""The order, the memory and the failures of tools/gpu_round.sh, with a Python that only writes down what it is asked."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest

from megalm_kernels.benchmarks import find_cases
from megalm_kernels.benchmarks.report import Ceilings, Row, complete

ROOT = Path(__file__).resolve().parents[2]
ATTENTION = ["bench-attention-64", "bench-attention-64-causal", "bench-attention-128", "bench-attention-128-causal"]
BENCHMARKS = ["bench-norms", "bench-adam", "bench-pointwise", "bench-loss", "bench-experts", *ATTENTION, "bench-attention-rest"]
TESTS = ["tests-norms", "tests-attention", "tests-attention-features", "tests-rest"]
STEPS = ["install", *TESTS, "cache", *BENCHMARKS, "parity", "step", "collect"]
RECORDER = """#!/usr/bin/env bash
echo "$*" >>"$RECORD"
cat >/dev/null
[ -z "${BREAK:-}" ] || [[ "$*" != *"$BREAK"* ]] || { echo "it broke"; exit 3; }
[[ "$*" != *gpu_report* ]] || mkdir -p "$GPU_ROUND_OUT_SEEN/results"
"""


def load(name: str) -> ModuleType:
    """A script of tools/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu_round(tmp_path):
    """Runs the script with these arguments and variables; the process, and what Python was asked since the last call."""
    python, record, out = tmp_path / "python", tmp_path / "record", tmp_path / "out"
    python.write_text(RECORDER)
    python.chmod(0o755)

    def run(*arguments: str, root: Path = ROOT, **variables: str) -> tuple[subprocess.CompletedProcess[str], str]:
        record.write_text("")
        seen = out / "dry-run" if "--dry-run" in arguments else out
        own = {"PYTHON": str(python), "RECORD": str(record), "GPU_ROUND_OUT": str(out), "GPU_ROUND_OUT_SEEN": str(seen)}
        env = {**os.environ, **own, "GPU_ROUND_SITE": str(tmp_path / "site"), **variables}
        command = ["bash", str(root / "tools" / "gpu_round.sh"), *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        return done, record.read_text()

    return run


def states(text: str) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in text.splitlines())


def test_one_step_after_the_other(gpu_round):
    done, asked = gpu_round()
    assert done.returncode == 0, done.stderr
    assert "--no-index" in asked and "-m pytest" not in asked
    done, asked = gpu_round()
    assert "-m pytest" in asked and "-m gpu" in asked and "--no-index" not in asked
    listed = states(gpu_round("--list")[0].stdout)
    assert list(listed) == STEPS
    assert listed == {"install": "ok", "tests-norms": "ok"} | dict.fromkeys(STEPS[2:], "not run")


def test_all_of_it_and_then_nothing(gpu_round):
    done, asked = gpu_round("--all")
    assert done.returncode == 0, done.stdout + done.stderr
    order = ["--no-index", "-m pytest", "gpu_cache.py", "rms_norm", "fused_adam", "swiglu", "cross_entropy lin", "gpu_parity.py"]
    places = [asked.index(text) for text in [*order, "bench_step.py", "gpu_report.py"]]
    assert places == sorted(places)
    assert asked.count("--device cuda") == len(BENCHMARKS) and "--dry-run" not in asked
    assert set(states(gpu_round("--list")[0].stdout).values()) == {"ok"}
    done, asked = gpu_round("--all")
    assert "every step is done" in done.stdout and not asked


def test_a_step_that_fails_stops_the_round_and_is_run_again(gpu_round):
    done, asked = gpu_round("--all", BREAK="gpu_cache.py")
    assert done.returncode == 1
    assert "it broke" in done.stdout
    assert "cache failed (exit 3)" in done.stderr and "to run it again: " in done.stderr
    assert "rms_norm" not in asked
    assert states(gpu_round("--list")[0].stdout)["cache"] == "failed"
    done, asked = gpu_round()
    assert done.returncode == 0 and "gpu_cache.py" in asked and "-m pytest" not in asked


def test_the_first_command_of_a_step_that_fails_ends_it(gpu_round):
    done, _ = gpu_round("install", BREAK="--target")
    assert done.returncode == 1 and "install failed (exit 3)" in done.stderr


def test_steps_by_name_on_a_machine_that_has_nothing_yet(gpu_round):
    done, asked = gpu_round("parity", "tests-rest")
    assert done.returncode == 0, done.stderr
    assert asked.index("--no-index") < asked.index("gpu_parity.py") < asked.index("-m pytest")


def test_a_dry_run_asks_for_no_gpu_and_keeps_its_results_apart(gpu_round):
    done, asked = gpu_round("--dry-run", "--all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert asked.count("--device cpu") == len(BENCHMARKS) and "--device cuda" not in asked
    assert all("--dry-run" in line for line in asked.splitlines() if "gpu_cache.py" in line or "gpu_parity.py" in line)
    assert "needs a GPU" in done.stdout
    assert set(states(gpu_round("--list")[0].stdout).values()) == {"not run"}
    assert set(states(gpu_round("--dry-run", "--list")[0].stdout).values()) == {"ok"}


def test_what_is_installed_is_what_the_checkout_has(gpu_round, tmp_path):
    gpu_round("install")
    assert "--no-index" not in gpu_round("parity")[1]
    os.utime(tmp_path / "site" / "installed", (0, 0))  # older than every file
    assert "--no-index" in gpu_round("parity")[1]


def test_wrong_arguments(gpu_round):
    done, asked = gpu_round("benchmark")
    assert done.returncode == 2 and "no step is called benchmark" in done.stderr and "bench-norms" in done.stderr and not asked
    assert gpu_round("--out")[0].returncode == 2
    done, asked = gpu_round("--fast")
    assert done.returncode == 2 and "unknown option --fast" in done.stderr and not asked


def test_asking_makes_no_folder(gpu_round, tmp_path):
    help_text = gpu_round("--help")[0].stdout
    assert "the next step" in help_text and "GPU_ROUND_COMMIT" in help_text
    assert help_text.endswith("(570).\n")  # the whole comment, and no code
    assert set(states(gpu_round("--list")[0].stdout).values()) == {"not run"}
    assert not (tmp_path / "out").exists()


def test_every_kernel_test_is_in_one_of_the_steps(gpu_round):
    *steps, rest = (gpu_round(step)[1].splitlines()[-1].split() for step in TESTS)
    device = ROOT / "tests/kernels/device"
    files = [argument for step in steps for argument in step if argument.endswith(".py")]
    slow = [device / f"test_{name}.py" for name in ("norms", "cross_entropy", "linear_cross_entropy")]
    assert sorted(files) == sorted(map(str, (*slow, *device.glob("test_attention*.py"))))
    assert all(Path(file).is_file() for file in files)
    assert str(device) in rest
    assert [argument for argument in rest if argument.startswith("--ignore=")] == [f"--ignore={file}" for file in files]
    for name, asked in zip(TESTS, (*steps, rest), strict=True):
        assert asked[-1].endswith(f"/{name}.xml")


def test_the_steps_of_attention_have_every_case_once(gpu_round):
    asked = gpu_round(*ATTENTION, "bench-attention-rest")[1].splitlines()
    lines = [line for line in asked if "megalm_kernels.benchmarks" in line]
    patterns = [line.split("--shapes ")[1].split(" --device")[0] for line in lines if " attention " in line]
    assert len(patterns) == 4 and "attention_packed" in lines[-1]
    for case in find_cases(["attention"], "full"):
        assert sum(bool(re.search(pattern, case.shape)) for pattern in patterns) == 1, case.shape
    assert "--shapes  --device cpu" in gpu_round("--dry-run", ATTENTION[0])[1], "the tiny cases have other dimensions"


def test_where_results_are_committed_and_the_commit_that_they_name(gpu_round, tmp_path):
    copy = tmp_path / "copy"
    (copy / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "gpu_round.sh", copy / "tools")
    for name in ("pyproject.toml", "README.md", "LICENSE", "megalm", "launchers", "conf", "kernels"):
        (copy / name).touch()
    git = ["git", "-C", str(copy), "-c", "user.name=x", "-c", "user.email=x@y"]
    done, asked = gpu_round("collect", root=copy)
    assert done.returncode == 0, done.stderr
    assert "no git checkout" in done.stdout and "--publish" not in asked and asked.rstrip().endswith("--commit unknown")
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (copy / "benchmarks" / "results").mkdir(parents=True)
    (copy / "benchmarks" / "results" / "old.json").touch()  # no difference from the commit
    asked = gpu_round("collect", root=copy)[1]
    table = f"{copy}/kernels/megalm_kernels/attention/measured.json"
    assert asked.rstrip().endswith(f"--commit {head} --publish {copy}/benchmarks/results --table {table}")
    (copy / "kernels").write_text("other")
    assert gpu_round("bench-adam", root=copy)[1].rstrip().endswith(f"--commit {head}+")
    asked = gpu_round("bench-adam", "collect", root=copy, GPU_ROUND_COMMIT="abc")[1]
    assert asked.count("--commit abc") == 2
    assert "--publish" not in gpu_round("--dry-run", "collect", root=copy)[1]


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--frobnicate"], [], ["one", "two"], [""], ["file"]])
def test_the_wheels_ask_for_nothing_before_their_arguments_are_right(arguments, tmp_path):
    (tmp_path / "tools").mkdir()
    for name in ("gpu_wheels.sh", "env.sh"):
        shutil.copy(ROOT / "tools" / name, tmp_path / "tools")
    python, record = tmp_path / "python", tmp_path / "record"
    python.write_text(RECORDER)
    python.chmod(0o755)
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    env = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_DEFAULT_ENV")}
    env |= {"PYTHON": str(python), "RECORD": str(record)}
    command = ["bash", str(tmp_path / "tools" / "gpu_wheels.sh"), *arguments]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    asks = bool(arguments) and arguments[0] in ("--help", "-h")
    assert done.returncode == (0 if asks else 2)
    assert "bash tools/gpu_wheels.sh FOLDER" in (done.stdout if asks else done.stderr)
    assert sorted(tmp_path.rglob("*")) == before


def fill_cache(monkeypatch: pytest.MonkeyPatch, *late: str) -> ModuleType:
    """tools/gpu_cache.py, whose processes only write files: one kernel before the launch, `late` at the launch."""
    tool = load("gpu_cache")

    def run(command: list[str], cache: Path) -> float:
        for name in late if "--launch" in command else ("HASH/rows.cubin",):
            (cache / name).parent.mkdir(exist_ok=True)
            (cache / name).touch()
        return 1.0

    monkeypatch.setattr(tool, "run", run)
    monkeypatch.setattr(tool, "this_arch", lambda: "90")
    return tool


def test_a_kernel_that_the_launch_had_to_compile_is_a_failure_and_named(monkeypatch, tmp_path, capsys):
    assert fill_cache(monkeypatch, "HASH2/swiglu_kernel.cubin").main(["--json", str(tmp_path / "x.json")]) == 1
    assert "FAILED  swiglu_kernel was not compiled before the launch" in capsys.readouterr().err
    assert json.loads((tmp_path / "x.json").read_text())["missed"] == ["HASH2/swiglu_kernel"]
    assert fill_cache(monkeypatch, "HASH2/__triton_launcher.so").main(["--json", str(tmp_path / "x.json")]) == 0
    assert "0 kernels had to be compiled at the launch, which built 1 C libraries with gcc" in capsys.readouterr().out


def test_a_dry_run_of_the_cache_launches_nothing_and_says_so(monkeypatch, tmp_path, capsys):
    assert fill_cache(monkeypatch, "HASH2/x.cubin").main(["--dry-run", "--json", str(tmp_path / "x.json")]) == 0
    out = capsys.readouterr().out
    assert "nothing was launched" in out and "at the launch" not in out
    assert json.loads((tmp_path / "x.json").read_text())["missed"] is None


def test_parity_judges():
    compare = load("gpu_parity").compare
    falling = [5.0, 4.0, 3.0]
    assert compare(falling, falling, 0.0) == {"largest_relative_difference": 0.0, "problem": ""}
    assert compare(falling, [5.0, 4.004, 3.0], 1e-2)["problem"] == ""
    assert compare(falling, [5.0, 4.004, 3.0], 1e-4)["problem"] == "step 2 is 0.001 apart, allowed 0.0001"
    assert compare(falling, [5.0, float("nan"), 3.0], 1e-4)["problem"]
    assert compare(falling, falling[:2], 1e-4)["problem"] == "3 and 2 steps"
    assert compare([5.0, 5.0], [5.0, 5.0], 1e-4)["problem"].startswith("nothing was learned")


def test_the_report_of_a_round(tmp_path, capsys):
    top = Ceilings(4300.0, 790.0, 1, 1)
    base = Row("rms_norm", "8 x 8", "bfloat16", "triton", "forward", "bytes", 10**9, 0, ms_p20=0.9, ms_p50=1.0, ms_p80=1.1)
    failed = Row("rms_norm", "8 x 8", "bfloat16", "liger", "forward", "bytes", 10**9, 0, status="failed", reason="a | b")

    def bench(name: str, date: str, *rows: Row) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        found = {"label": "", "date": date, "machine": {"gpu": "NVIDIA H200"}, "versions": {"torch": "2"}}
        found |= {"ceilings": asdict(top), "absent": [], "rows": [asdict(row) for row in complete(rows, top)]}
        (tmp_path / name / f"{date}.json").write_text(json.dumps(found))

    bench("bench-norms", "2026-01-02T03", base)
    bench("bench-norms", "2026-01-02T04", Row(**{**asdict(base), "ms_p50": 0.5}), failed)
    for name, failures in (("norms", 1), ("rest", 0)):
        suite = f'<testsuites><testsuite tests="7" failures="{failures}" errors="0" skipped="2"/></testsuites>'
        (tmp_path / f"tests-{name}.xml").write_text(suite)
    (tmp_path / "cache.json").write_text(json.dumps({"compiled": 5, "missed": None}))
    (tmp_path / "parity.json").write_text(json.dumps({"largest_relative_difference": 1e-6, "problem": ""}))
    (tmp_path / "steps.txt").write_text("parity failed\nparity ok\n")
    assert load("gpu_report").main([str(tmp_path), "--commit", "abc", "--publish", str(tmp_path / "published")]) == 0
    found = json.loads((tmp_path / "results/nvidia-h200/2026-01-02.json").read_text())
    assert [row["ms_p50"] for row in found["rows"]] == [0.5, None], "the later run counts"
    counts = {"tests": 7, "failures": 1, "errors": 0, "skipped": 2}
    assert found["tests"] == {"tests-norms": counts, "tests-rest": counts | {"failures": 0}}
    assert found["steps"] == {"parity": "ok"} and found["step"] is None and found["commit"] == "abc"
    text = (tmp_path / "results/nvidia-h200/2026-01-02.md").read_text()
    assert "| rms_norm | 8 x 8 | bfloat16 | forward | triton | 0.5000 |" in text and "2000" in text
    assert "failed: a / b" in text and "parity: the same" in text
    assert "tests-norms: 7 tests, 1 failures" in text and "tests-rest: 7 tests, 0 failures" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(columns) == 1, "every line of the table has the same number of cells"
    assert "5 kernels compiled before, nothing was launched" in text
    published = tmp_path / "published" / "nvidia-h200"
    assert (published / "2026-01-02.md").read_text() == text and json.loads((published / "2026-01-02.json").read_text()) == found
    assert f"to be committed: {published}/2026-01-02.json and " in capsys.readouterr().out
    assert "not in the checkout: " in load("gpu_report").publish([], tmp_path / "cache.json" / "gpu")


def test_a_report_of_nothing(tmp_path, capsys):
    assert load("gpu_report").main([str(tmp_path)]) == 1
    assert "has no results of a benchmark" in capsys.readouterr().err


def test_the_table_of_attention_is_brought_up_to_date(tmp_path):
    update = load("gpu_report").update_table
    shape, grouped = "2 x 8192 x 16 x 128 causal", "2 x 8192 x 16/2 x 128 causal"
    start = Row("attention", shape, "bfloat16", "triton", "full", "flops", 10**9, 10**12, ms_p20=1, ms_p50=2, ms_p80=3)
    others = {"torch": 4.0, "sdpa cudnn": 1.0, "flex": 5.0}
    rows = [start, *(replace(start, provider=name, ms_p50=p50) for name, p50 in others.items())]
    rows += [replace(start, shape=grouped, ms_p50=0.1), replace(start, operation="attention_packed", ms_p50=0.1)]
    rows += [replace(start, direction="forward", provider="sdpa cudnn", status="failed", ms_p50=None)]
    found = {"label": "", "commit": "abc", "machine": {"gpu": "NVIDIA H200"}, "versions": {"torch": "2.11", "triton": "3.6"}}
    found["rows"] = [asdict(row) for row in complete(rows, Ceilings(4300.0, 790.0, 1, 1))]
    file = tmp_path / "measured.json"
    file.write_text("[]\n")
    assert update(file, found | {"label": "cpu smoke"}).endswith("cpu smoke") and file.read_text() == "[]\n"
    assert update(file, found) == f"{file}: 1 new rows, 0 kept"
    (row,) = json.loads(file.read_text())
    assert (row["gpu"], row["head_dim"], row["causal"], row["seq_length"], row["direction"]) == (
        "NVIDIA H200", 128, True, 8192, "full",
    )  # fmt: skip
    rates = row["tflops"]
    assert (rates["triton"], rates["sdpa"], rates["cudnn"]) == (500.0, 250.0, 1000.0)
    found["rows"][0]["tflops"] = 600.0
    assert update(file, found) == f"{file}: 1 new rows, 0 kept", "the same problem"
    assert json.loads(file.read_text())[0]["tflops"]["triton"] == 600.0
    found["machine"] = {"gpu": "another"}
    assert update(file, found) == f"{file}: 1 new rows, 1 kept"
