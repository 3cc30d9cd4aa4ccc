"""`megalm parity`: run the same training on one rank and on other layouts, and prove that they compute the same.

Every layout is an ordinary `megalm pretrain` in processes of its own. What is compared comes from what such a run leaves
behind: the checkpoint before the first step, the losses and gradient norms in metrics.jsonl, and the last checkpoint. If a
layout differs, it and one rank run again with `train.record`, and the first module that differs is named. With
`parity.repeat` every layout runs twice, and what the two runs leave behind must be the same to the bit.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml

from megalm.config.layouts import with_layout, with_model
from megalm.config.machine import processes, uses_cuda
from megalm.config.run import ParityRun, RunConfig
from megalm.config.validate import expand_layouts, validate
from megalm.data.indexed import IndexedWriter
from megalm.errors import ConfigError, ExitCode, MegalmError, Problem, RunError
from megalm.log import log
from megalm.parallel.agent import start_workers
from megalm.parallel.forked import Fork
from megalm.parallel.workers import Starter, make_folder, start_process
from megalm.train.comparison import ZERO_GRADIENT, Comparison, compare
from megalm.train.divergence import name_first
from megalm.train.parity_report import Table, header, row, write_report
from megalm.train.repetition import differences

REFERENCE = "single"
PRELOAD = ("torch", "megalm.launchers.compose", "hydra.main", "megalm.train.warm")


@dataclass
class Suite:
    """One model on one rank and on the layouts."""

    model: str
    work: Path
    runs: dict[str, RunConfig]  # by layout, the reference first
    results: list[Comparison]


def parity_command(config: ParityRun, command: str = "megalm parity", start: Starter | None = None) -> None:
    """Run, compare, print a table. Raises RunError (exit 1) naming what differs first and most, if a layout does.

    `start`: how ranks are started; None: forked from one warm process, or on GPUs, which do not survive that, as new ones.
    """
    begin = time.perf_counter()
    suites = build_suites(config)
    work = Path(config.parity.work_dir)
    make_folder(work)
    if not config.data.path:
        write_random_corpus(work / "corpus", config)
    start = start or (start_process if uses_cuda(config) else Fork(PRELOAD))

    def report() -> None:
        """After every layout: a table that is stopped half-way is on file too."""
        if config.parity.report:
            tables = [Table(suite.model, suite.results) for suite in suites if suite.results]
            write_report(config.parity.report.split(","), tables, config, command, time.perf_counter() - begin)

    for suite in suites:
        run_suite(config, suite, start, report)
    if not config.parity.keep:
        clear(work, suites)
    count = sum(len(suite.results) - 1 for suite in suites)
    faults = [
        Problem(f"layout {result.layout}" + f" of {suite.model}" * (len(suites) > 1), None, "; ".join(result.faults))
        for suite in suites
        for result in suite.results
        if result.faults
    ]
    if faults:
        error = RunError(*faults)
        error.kind = "parity error"
        raise error
    again = ", and every run, repeated, equals itself to the bit" if config.parity.repeat else ""
    log(f"{count} layout{'s' * (count != 1)} equal one rank over {config.parity.steps} steps{again}")


def build_suites(config: ParityRun) -> list[Suite]:
    """The runs of every model. Raises ConfigError with everything that is wrong with any of them, before one starts."""
    work, suites, problems = Path(config.parity.work_dir), list[Suite](), list[Problem]()
    for model in config.parity.models or [config.model.architecture]:
        mine = with_model(config, model) if config.parity.models else config
        folder = work / model if len(config.parity.models) > 1 else work
        runs = {name: run_config(mine, name, folder) for name in dict.fromkeys([REFERENCE, *expand_layouts(mine)])}
        problems += [dataclasses.replace(p, key=f"[{name}] {p.key}") for name, run in runs.items() for p in validate(run)]
        suites.append(Suite(model, folder, runs, []))
    if problems:
        raise ConfigError(*problems)
    return suites


def run_config(config: ParityRun, layout: str, folder: Path) -> RunConfig:
    """The training run of one layout, in `folder`. Raises ConfigError if the name cannot be read."""
    try:
        laid_out = with_layout(config, layout)
    except ValueError as error:
        rule = "must be a layout's short name"
        raise ConfigError(
            Problem("parity.layouts", layout, rule, str(error), "for example parity.layouts=[tp2,pp2,dp2_zero3]")
        ) from error
    sections = {f.name: getattr(laid_out, f.name) for f in dataclasses.fields(RunConfig)}
    steps = config.parity.steps
    sections["train"] = dataclasses.replace(
        config.train,
        steps=steps,
        run_dir=str(folder / layout),
        log_every=steps,
        deterministic=config.train.deterministic or config.parity.repeat,
    )
    sections["checkpoint"] = dataclasses.replace(config.checkpoint, save_first=True, keep=0, load="")
    sections["data"] = dataclasses.replace(
        config.data, path=config.data.path or str(Path(config.parity.work_dir) / "corpus")
    )
    return RunConfig(**sections)


def run_suite(config: ParityRun, suite: Suite, start: Starter, report: Callable[[], None]) -> None:
    """Run and compare all layouts of one model, and print a row for each."""
    clear_runs(suite)
    make_folder(suite.work)
    width = max(len(name) for name in suite.runs)
    if len(suite.runs) > 20 or len(config.parity.models) > 1:
        count = len(suite.runs) - 1
        log(f"\n{suite.model}, {count} layout{'s' * (count != 1)}")
    log(header(width))
    for name, run in suite.runs.items():
        begin = time.perf_counter()
        result = Comparison(name, processes(run), 0.0)
        suite.results.append(result)
        try:
            start_layout(run, start)
        except MegalmError as error:
            if name == REFERENCE:
                raise
            result.faults = [f"did not run: {_in_one_line(error)}"]
        result.seconds = time.perf_counter() - begin
        if name != REFERENCE and not result.faults:
            compare(result, suite.work / REFERENCE, suite.work / name, config.parity)
        if result.first_step:
            result.faults.append(name_module(suite, name, result.first_step, start))
        if config.parity.repeat and not result.faults:
            result.faults += repeat(suite, name, start)
        log(row(result, width))
        report()


def repeat(suite: Suite, layout: str, start: Starter) -> list[str]:
    """Run a layout once more; say what is not the same."""
    run, folder = suite.runs[layout], suite.work / f"{layout}-again"
    try:
        start_layout(dataclasses.replace(run, train=dataclasses.replace(run.train, run_dir=str(folder))), start)
    except MegalmError as error:
        return [f"did not run a second time: {_in_one_line(error)}"]
    return differences(suite.work / layout, folder)


def start_layout(run: RunConfig, start: Starter) -> None:
    """Train one layout in its own processes, quietly."""
    path = Path(run.train.run_dir).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(asdict(run), sort_keys=False))
    if start_workers("megalm.launchers.pretrain", [str(path)], run, quiet=True, start=start) != ExitCode.FINISHED:
        raise KeyboardInterrupt  # it was asked to stop, and so are we


def name_module(suite: Suite, layout: str, step: int, start: Starter) -> str:
    """Repeat the reference and the layout, recording a step; say which module differs first."""
    records = []
    for name in (REFERENCE, layout):
        run, folder = suite.runs[name], suite.work / f"{name}-step-{step}"
        train = dataclasses.replace(run.train, run_dir=str(folder), record=str(folder / "record"), record_step=step)
        records.append(folder / "record")
        try:
            if not records[-1].exists():  # the reference may have done it for another layout
                start_layout(dataclasses.replace(run, train=train), start)
        except MegalmError as error:
            return f"could not be repeated to find the module: {_in_one_line(error)}"
    return name_first(records[0], records[1], step, suite.runs[layout].train.precision, ZERO_GRADIENT)


def write_random_corpus(prefix: Path, config: RunConfig) -> None:
    """Documents of random tokens with a skewed distribution, from the data seed: enough for every step."""
    generator = np.random.RandomState(config.data.seed)
    with IndexedWriter(prefix, config.model.vocab_size) as writer:
        for _ in range(64):
            ids = generator.randint(0, config.model.vocab_size, size=(2, 4 * config.data.seq_length)).min(0)
            writer.add_document(ids)


def clear(work: Path, suites: list[Suite]) -> None:
    """Delete what a parity run makes in its folder, and nothing else that may be there."""
    for suite in suites:
        clear_runs(suite)
    for suffix in (".bin", ".idx"):
        (work / "corpus").with_suffix(suffix).unlink(missing_ok=True)
    for folder in (*(suite.work for suite in suites), work):
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def clear_runs(suite: Suite) -> None:
    """Delete the folders and configs of one model's runs, and of their repetitions."""
    for name in suite.runs:
        for folder in (suite.work / name, suite.work / f"{name}-again", *suite.work.glob(f"{name}-step-*")):
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_suffix(".yaml").unlink(missing_ok=True)


def _in_one_line(error: MegalmError) -> str:
    problem = error.problems[0]
    return f"{error.kind}: {problem.key} {problem.value or ''}: {problem.rule}"
