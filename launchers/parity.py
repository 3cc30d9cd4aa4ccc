"""Parity: train the same tiny model on one rank and on other layouts, and compare every number."""

from __future__ import annotations

import shlex
import sys

from megalm.config.run import ParityRun
from megalm.launchers.app import run_verb


def main() -> None:
    """`megalm parity ...`."""
    command = shlex.join(["megalm", "parity", *sys.argv[1:]])  # before run_verb puts Hydra's view of it there

    def task(config: ParityRun) -> None:
        """Prints the table; exits with 1 if a layout differs."""
        from megalm.train.parity import parity_command

        parity_command(config, command)

    run_verb("parity", task)


if __name__ == "__main__":
    main()
