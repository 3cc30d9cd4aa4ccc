"""Kernels: which implementation would run here, whether the GPU kernels compile well, how fast they are."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from megalm.config.machine import count_gpus
from megalm.config.tasks import CompileConfig, KernelsRun
from megalm.errors import ConfigError, Problem, writing
from megalm.launchers.app import run_verb

if TYPE_CHECKING:
    from megalm_kernels.compile_gate import Report


def explain(config: KernelsRun) -> None:
    """Prints what would run for each operation, and why; raises ConfigError if what is asked for cannot run here."""
    _check_device("explain.device", config.explain.device)
    import torch

    from megalm.train.kernels import choose_kernels

    wanted = config.explain.device
    device = wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    choices = choose_kernels(config.kernels, device)
    loss = next(choice for choice in choices if choice.operation == "cross_entropy")
    choices.append(replace(loss, operation="linear_cross_entropy", reason="as cross_entropy"))
    choices.sort(key=lambda choice: choice.operation)
    states = _states(device)
    if config.explain.output == "json":
        print(json.dumps({"device": device, "operations": [asdict(choice) for choice in choices], **states}, indent=2))
        return
    width, runs = (max(len(getattr(choice, name)) for choice in choices) for name in ("operation", "backend"))
    runs = max(runs, 8)  # as wide as the states below
    print(f"{'operation':{width}}  {'runs':{runs}} why (on {device})")
    for choice in choices:
        print(f"{choice.operation:{width}}  {choice.backend:{runs}} {choice.reason}")
    print("\n" + "\n".join(f"{name:8} {state}" for name, state in states.items()))


def _states(device: str) -> dict[str, str]:
    """What there is besides torch, in words."""
    from megalm_kernels import compat
    from megalm_kernels.apex import find_apex
    from megalm_kernels.attention import hopper
    from megalm_kernels.dispatch import triton_obstacle

    found = f"{version('triton')}, {triton_obstacle(device) or 'can run here'}" if compat.installed() else "not installed"
    return {"triton": found, "apex": find_apex().words, "hopper": f"warp-specialised attention is {hopper.state()}"}


def compile_kernels(config: KernelsRun) -> None:
    """Prints a line per compiled kernel and everything that is wrong; exits with 1 if something is."""
    from megalm_kernels import compat

    if not compat.installed():
        rule = "compiling needs triton, which is not installed"
        raise ConfigError(Problem("megalm kernels compile", None, rule, fix="pip install 'triton>=3.6,<3.10'"))
    if compat.interpreting():
        rule = "the interpreter compiles nothing"
        raise ConfigError(Problem("TRITON_INTERPRET", 1, rule, fix="unset TRITON_INTERPRET"))
    from megalm_kernels.compile_gate import table

    begin = time.monotonic()
    report = _run_gate(config.compile)
    seconds = time.monotonic() - begin
    if config.compile.output == "json":
        rows = [asdict(row) for row in report.rows]
        print(json.dumps({"seconds": seconds, "failures": report.failures, "rows": rows}, indent=2))
    else:
        print(table(report.rows))
        print(_summary(report, config.compile, seconds))
    if report.failures:
        sys.exit(1)


def _run_gate(options: CompileConfig) -> Report:
    from tqdm import tqdm

    from megalm_kernels.compile_gate import run_gate
    from megalm_kernels.specimens import NoSpecimen

    with tqdm(unit="kernel", leave=False, disable=None) as bar:  # None: where stderr is no terminal

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            return run_gate(options.arch, options.ops, options.precompile, options.workers, progress)
        except NoSpecimen as error:
            raise ConfigError(Problem("compile.ops", options.ops, str(error), fix="leave ops out")) from error


def _summary(report: Report, options: CompileConfig, seconds: float) -> str:
    from triton import __version__, knobs

    count, compiled = len(report.rows), sum(row.compiled for row in report.rows)
    archs = ", ".join(f"sm_{arch}" for arch in options.arch)
    done = f"{count} kernels, {compiled} compiled and {count - compiled} already there, {seconds:.1f} s"
    lines = ["", f"triton {__version__}, {archs}: {done}"]
    if options.precompile:
        lines.append(f"a launch finds them in {knobs.cache.dir}, given the same versions of triton and megalm and this very path")
    lines += [f"FAILED  {failure}" for failure in report.failures] or ["passed: no spills, no stacks, no overruns"]
    return "\n".join(lines)


def bench(config: KernelsRun) -> None:
    """Prints a table, writes results and pictures into a folder; exits with 1 if a measurement failed."""
    options = config.bench
    _check_device("bench.device", options.device)
    from megalm_kernels.benchmarks import run

    with writing(Path(options.results), "bench.results"):
        code = run(options.ops, options.device, options.quick, Path(options.results), options.peers)
    if code:
        sys.exit(code)


def _check_device(key: str, wanted: str) -> None:
    if wanted == "cuda" and not count_gpus():
        raise ConfigError(Problem(key, wanted, "no GPU is visible here", fix=f"{key}=cpu"))


def main() -> None:
    """`megalm kernels explain | compile | bench ...`."""
    run_verb("kernels", {"explain": explain, "compile": compile_kernels, "bench": bench})


if __name__ == "__main__":
    main()
