"""Doctor: look at this machine and say what is missing."""

from __future__ import annotations

import sys

from megalm.config.tasks import DoctorRun
from megalm.launchers.app import run_verb


def task(config: DoctorRun) -> None:
    """Prints one row per finding; exits with 1 if something that megalm needs is missing."""
    from megalm.doctor import examine_machine, render

    rows = examine_machine()
    print(render(rows, config.doctor.output))
    if any(row.state == "missing" for row in rows):
        sys.exit(1)


def main() -> None:
    """`megalm doctor ...`."""
    run_verb("doctor", task)


if __name__ == "__main__":
    main()
