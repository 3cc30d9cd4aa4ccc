"""Parity: train the same tiny model on one rank and on other layouts, and compare every number."""

from __future__ import annotations

from megalm.config.run import ParityRun
from megalm.launchers.app import run_verb


def task(config: ParityRun) -> None:
    """Prints the table; exits with 1 if a layout differs."""
    from megalm.train.parity import parity_command

    parity_command(config)


def main() -> None:
    """`megalm parity ...`."""
    run_verb("parity", task)


if __name__ == "__main__":
    main()
