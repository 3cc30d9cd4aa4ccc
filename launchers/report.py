"""Report: a run as one HTML page."""

from __future__ import annotations

import time
from pathlib import Path

from megalm.config.tasks import ReportRun
from megalm.errors import writing
from megalm.launchers.app import run_verb
from megalm.runfolder import replace_file


def task(config: ReportRun) -> None:
    """Writes the page, says where. Raises ConfigError if no run has written to a folder, RunError if it cannot be written."""
    from megalm.observe.folder import find_run, read_run
    from megalm.observe.page import render
    from megalm.observe.verdict import is_alive

    options = config.report
    folder = find_run(Path(options.run_dir), "report.run_dir")
    parent = find_run(Path(options.parent), "report.parent") if options.parent else None
    path = Path(options.output or folder / "report.html")
    run = read_run(folder)
    page = render(run, read_run(parent) if parent is not None else None, time.time(), is_alive(run))
    with writing(path, "report.output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, page)
    print(path)


def main() -> None:
    """`megalm report ...`."""
    run_verb("report", task)


if __name__ == "__main__":
    main()
