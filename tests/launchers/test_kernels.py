"""megalm kernels explain | compile | bench: plain keys, mistakes found without torch, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.config.kernels import KERNELS
from megalm.config.tasks import KernelsRun
from megalm.errors import ConfigError
from megalm.launchers.check import check
from megalm.launchers.compose import inspect, parse
from megalm.launchers.kernels import bench, compile_kernels, explain
from megalm_kernels import benchmarks, compat, compile_gate

Megalm = Callable[..., subprocess.CompletedProcess]


def look(*arguments: str) -> tuple[KernelsRun, list]:
    return inspect(parse("kernels", list(arguments)))


def config_of(*arguments: str) -> KernelsRun:
    config, problems = look(*arguments)
    assert problems == []
    return config


def test_keys_of_the_subverb_and_of_the_kernels_may_stand_alone() -> None:
    compiled = config_of("compile", "arch=[90]", "ops=[rms_norm,swiglu]", "precompile=true").compile
    assert (compiled.arch, compiled.ops, compiled.precompile) == ([90], ["rms_norm", "swiglu"], True)
    assert config_of("bench", "ops=[swiglu]", "quick=true").bench.ops == ["swiglu"]
    explained = config_of("kernels=torch", "rms_norm=apex", "device=cpu")
    assert (explained.kernels.backend, explained.kernels.rms_norm, explained.explain.device) == ("torch", "apex", "cpu")
    assert parse("kernels", ["device=cpu"]).subverb == "explain"
    assert check("kernels", ["compile", "arch=[80,90,100]"]) == "ok: kernels"


@pytest.mark.parametrize(
    ("arguments", "key", "words"),
    [
        (["compile", "ops=[rms_nrm,rotary]"], "compile.ops", "a list of rms_norm, layer_norm"),
        (["compile", "arch=[91]"], "compile.arch", "a list of 80, 86, 89, 90, 100, 120"),
        (["compile", "arch=90"], "compile.arch", "fix:     'compile.arch=[90]'"),
        (["compile", "arch=[]"], "compile.arch", "fix:     'compile.arch=[80,90,100]'"),
        (["compile", "arch=[90,hopper]"], "compile.arch", "wrong type"),
        (["complie", "arch=[90]"], "complie", "did you mean megalm kernels compile?"),
        (["arch=[90]", "compile"], "compile", "did you mean megalm kernels compile?"),
        (["bench", "precompile=true"], "precompile", "did you mean compile.precompile?"),
        (["explain", "backend=cuda"], "kernels.backend", "not one of the allowed values"),
        (["explain", "attention=torch"], "kernels.attention", "auto, triton, sdpa, cudnn, reference"),
    ],
)
def test_mistakes(arguments: list[str], key: str, words: str) -> None:
    _, problems = look(*arguments)
    assert key in [problem.key for problem in problems]
    assert words in "\n".join(map(str, problems))


def test_mistakes_are_found_without_torch() -> None:
    code = (
        "import sys; from megalm.launchers import kernels; from megalm.launchers.compose import inspect, parse\n"
        "_, problems = inspect(parse('kernels', ['compile', 'ops=[rms_nrm]', 'arch=[7]'])); assert len(problems) == 2\n"
        "assert not {'torch', 'triton', 'megalm_kernels'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr


def test_the_verb_alone_explains(megalm: Megalm) -> None:
    run = megalm("kernels")
    assert run.returncode == 0, run.stderr
    rows = {line.split()[0]: line for line in run.stdout.splitlines() if line}
    assert set(KERNELS) <= set(rows)
    assert "torch    triton: no GPU" in rows["rms_norm"] and "sdpa     triton: no GPU" in rows["attention"]
    assert {"triton", "apex"} <= set(rows)
    assert rows["hopper"].endswith("warp-specialised attention is off: there is no GPU")


def test_explain_as_json(capsys: pytest.CaptureFixture) -> None:
    explain(config_of("explain", "output=json", "rms_norm=torch"))
    said = json.loads(capsys.readouterr().out)
    assert {"operation": "rms_norm", "backend": "torch", "reason": "asked for"} in said["operations"]
    assert said["device"] == "cpu" and {"triton", "apex"} <= set(said)


def test_explain_refuses_what_cannot_run_here() -> None:
    with pytest.raises(ConfigError, match="no GPU is visible here"):
        explain(config_of("device=cuda"))
    with pytest.raises(ConfigError, match="rms_norm cannot run so here: triton: no GPU"):
        explain(config_of("rms_norm=triton"))
    with pytest.raises(ConfigError, match="attention cannot run so here: cudnn: no GPU"):
        explain(config_of("attention=cudnn"))


def test_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compile_kernels(config_of("compile", "arch=[90]", "ops=[l2_norm]", "precompile=true"))
    text = capsys.readouterr().out
    count = sum(line.startswith("l2_norm ") for line in text.splitlines())
    assert count > 0 and f"sm_90: {count} kernels, {count} compiled and 0 already there" in text
    assert text.rstrip().endswith("passed: no spills, no stacks, no overruns")
    assert f"a launch finds them in {tmp_path}" in text
    assert len([*tmp_path.glob("*/*.cubin")]) == count
    compile_kernels(config_of("compile", "arch=[90]", "ops=[l2_norm]", "precompile=true", "output=json"))
    said = json.loads(capsys.readouterr().out)
    assert [row["compiled"] for row in said["rows"]] == [False] * count
    assert said["failures"] == []


def test_a_failure_ends_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    row = compile_gate.Row("norms", "rms_norm bf16", "_rms", "BLOCK=8", 90, failures=("spills registers: 3 loads",))
    monkeypatch.setattr(compile_gate, "run_gate", lambda *arguments: compile_gate.Report([row], ["table x: no specimen"]))
    with pytest.raises(SystemExit) as stopped:
        compile_kernels(config_of("compile"))
    assert stopped.value.code == 1
    text = capsys.readouterr().out
    assert "FAILED  sm_90 rms_norm bf16: _rms (BLOCK=8): spills registers: 3 loads\nFAILED  table x: no specimen" in text
    assert "passed" not in text


def test_compile_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "interpreting", lambda: True)
    with pytest.raises(ConfigError, match="unset TRITON_INTERPRET"):
        compile_kernels(config_of("compile"))
    monkeypatch.setattr(compat, "installed", lambda: False)
    with pytest.raises(ConfigError, match=r"triton, which is not installed\n.*pip install 'triton"):
        compile_kernels(config_of("compile"))


def test_bench_passes_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(benchmarks, "run", lambda *arguments: asked.append(arguments) or len(asked) - 1)
    config = config_of("bench", "ops=[swiglu]", "quick=true", "device=cpu", "peers=[torch,liger]", f"results={tmp_path}")
    bench(config)
    assert asked == [(["swiglu"], "cpu", True, tmp_path, ["torch", "liger"])]
    with pytest.raises(SystemExit, match="1"):  # a measurement failed
        bench(config)
    with pytest.raises(ConfigError, match="no GPU is visible here"):
        bench(config_of("bench", "device=cuda"))
