"""Run on a SLURM cluster: write the job's script, submit and follow it; and what runs inside the job. No torch."""

from __future__ import annotations


def main() -> None:
    """`megalm slurm ...`."""
    from megalm.launchers.slurm.command import main as command

    command()
