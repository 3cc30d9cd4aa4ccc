"""Sweeps: many runs of one verb, each with settings of its own; on this machine or on a cluster, a grid or a search."""

from __future__ import annotations


def main() -> None:
    """`megalm sweep ...`."""
    from megalm.launchers.app import run_verb
    from megalm.launchers.sweep.report import report

    run_verb("sweep", {"report": report})
