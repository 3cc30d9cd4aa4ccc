"""Status: how a run is doing, from its folder alone; once, or again and again."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

from megalm.config.tasks import StatusConfig, StatusRun
from megalm.launchers.app import run_verb
from megalm.observe.folder import find_run, read_run
from megalm.observe.overview import Overview, as_json, as_line, as_text, look
from megalm.observe.verdict import is_alive

_HOME, _END_OF_LINE, _END_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


def task(config: StatusRun) -> None:
    """Prints, and exits with what the run itself would say (errors.ExitCode): 0 it runs or is finished, 1 failed or stalled,
    3 gave up, 75 stopped or waiting. Ctrl-C ends a watch with the same.
    """
    options, seen = config.status, None
    try:
        while seen is None or (options.watch and not seen.verdict.is_over):
            if seen is not None:
                time.sleep(options.seconds)
            again, seen = seen is not None, _look(options)
            _show(options, seen, again)
    except KeyboardInterrupt:
        if seen is None:
            raise
        print()
    except BrokenPipeError:  # `megalm status RUN | head`: nobody reads on, and closing stdout must not complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if seen.verdict.code:
        sys.exit(int(seen.verdict.code))


def _look(options: StatusConfig) -> Overview:
    run = read_run(find_run(Path(options.run_dir), "status.run_dir"), metrics=False)
    return look(run, time.time(), is_alive(run))


def _show(options: StatusConfig, seen: Overview, again: bool) -> None:
    """A terminal is drawn over; a log file gets a line per look."""
    screen = sys.stdout.isatty()
    if options.output == "json":
        print(json.dumps(as_json(seen), default=str, indent=None if options.watch else 1), flush=True)
    elif options.watch and not screen:
        print(as_line(seen), flush=True)
    else:
        text = as_text(seen, options.events, time.time(), screen)
        if options.watch:
            columns, rows = shutil.get_terminal_size()
            first, *rest = text.split("\n")  # the first line has colours in it, which must not be cut
            lines = [first, *(line[:columns] for line in rest[: max(1, rows - 2)])]
            text = (_HOME if again else _HOME + _END_OF_SCREEN) + "".join(f"{line}{_END_OF_LINE}\n" for line in lines)
        print(text, end=_END_OF_SCREEN if options.watch else "\n", flush=True)


def main() -> None:
    """`megalm status ...`."""
    run_verb("status", task)


if __name__ == "__main__":
    main()
