"""Check: every problem of a command line at once, without running it and without torch."""

from __future__ import annotations

import difflib
import sys
from typing import Any

from megalm.errors import ConfigError, MegalmError, Problem
from megalm.launchers.app import fail

_USAGE = "usage: megalm check VERB [FILE.yaml] [group=option ...] [key=value ...]"


def summary(verb: str, config: Any) -> str:
    """One line that says what would run."""
    from megalm.config.machine import uses_cuda
    from megalm.config.parallel import layout_name
    from megalm.config.run import ParityRun, RunConfig

    if isinstance(config, ParityRun):
        return f"ok: {verb} of {', '.join(config.parity.layouts)} against one rank, {config.parity.steps} steps"
    if not isinstance(config, RunConfig):
        return f"ok: {verb}"
    layout = layout_name(config.parallel, config.data_parallel)
    device = "GPU" if uses_cuda(config) else "CPU"
    count = config.cluster.num_processes
    parts = f"{config.data_parallel} copies x {config.num_microbatches} microbatches x {config.train.micro_batch_size}"
    place = f"{count} {device} process{'es' if count > 1 else ''}"
    what = f"ok: {verb} as {layout} on {place}, {config.train.global_batch_size} samples per step = {parts}"
    return "\n".join([what, *_forecast(config)])


def _forecast(config: Any) -> list[str]:
    """Layers per stage and memory of the rank that needs most, a line each."""
    from megalm.config.stage_split import num_stages
    from megalm.train.forecast import describe_memory, layers_per_stage

    split = "+".join(map(str, layers_per_stage(config, num_stages(config))))
    memory = describe_memory(config)
    return [f"stages: {split} layers", memory] if num_stages(config) > 1 else [memory]


def check(verb: str, argv: list[str]) -> str:
    """The summary of a sound command line. Raises ConfigError with all problems of another."""
    from megalm.config.run import ROOTS
    from megalm.launchers.compose import inspect, parse

    if verb not in ROOTS:
        close = difflib.get_close_matches(verb, ROOTS, 1, 0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(Problem(verb, None, f"unknown verb{hint}", ", ".join(ROOTS), _USAGE.removeprefix("usage: ")))
    config, problems = inspect(parse(verb, argv))
    if problems:
        raise ConfigError(*problems)
    return summary(verb, config)


def main() -> None:
    """`megalm check VERB ...`."""
    arguments = sys.argv[1:]
    if not arguments or {"--help", "-h"} & set(arguments):
        print(f"{_USAGE}\n\nPrints `ok` and the layout, or every problem with its rule and fix (exit 2). Runs nothing.")
        sys.exit(0 if arguments else 2)
    try:
        print(check(arguments[0], arguments[1:]))
    except MegalmError as error:
        fail(error)


if __name__ == "__main__":
    main()
