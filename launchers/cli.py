"""The `megalm` command: finds the verb, imports only what that verb needs."""

from __future__ import annotations

import difflib
import importlib
import sys

from megalm import __version__

VERBS = {
    "prepare": "Turn text into indexed tokens and a tokenizer.",
    "pretrain": "Train a language model, on one process or a cluster.",
    "generate": "Continue a prompt with a trained model.",
    "check": "Report everything that is wrong with a command line, without running it.",
    "doctor": "Look at this machine: versions, devices, network, disk; what is missing and how to mend it.",
    "parity": "Prove that layouts compute what one rank computes.",
    "pipeline": "Draw a pipeline schedule, with its bubble and its memory, and compare all of them.",
    "kernels": "The GPU kernels: which would run here and why, whether they compile well, how fast they are.",
    "status": "How a run is doing, from its folder: step, loss, speed, time to go, restarts, last events.",
    "report": "Write a run as one HTML page: curves, time, memory, events, config, and what differs from a parent run.",
    "sweep": "What came of the points of a sweep: table, pictures, the best one as a command.",
    "slurm": "Run a verb as a job of a SLURM cluster, and follow it.",
}
SUBVERBS = {  # of a verb; the first is meant where none is typed
    "pipeline": {"show": "Draw the schedule and say what it costs."},
    "kernels": {
        "explain": "Which implementation of each operation would run here, and why.",
        "compile": "Compile every kernel for every architecture, without a GPU; exit 1 if one spills registers.",
        "bench": "Time every operation beside its peers.",
    },
    "sweep": {"report": "Table, slices, parallel coordinates, and the best point as a command."},
    "slurm": {
        "render": "Print the script of the job.",
        "submit": "Submit it; cluster=slurm on the verb's own command line does the same.",
        "status": "What SLURM says of the jobs of a run, or of all of yours.",
        "cancel": "End the jobs of a run.",
        "logs": "What the jobs of a run have printed.",
    },
}


def usage() -> str:
    """The text of `megalm --help`."""
    verbs = "\n".join(f"  {verb:9} {line}" for verb, line in VERBS.items())
    return f"usage: megalm VERB [FILE.yaml] [key=value ...]\n\n{verbs}\n\nmegalm VERB --help shows the options of a verb."


def main() -> None:
    """Entry point of the console script."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("--help", "-h", "help"):
        print(usage())
    elif verb in ("--version", "version"):
        print(f"megalm {__version__}")
    elif verb in VERBS:
        sys.argv[:] = [f"megalm {verb}", *sys.argv[2:]]
        importlib.import_module(f"megalm.launchers.{verb}").main()
    else:
        close = difflib.get_close_matches(verb, VERBS, 1, 0.5)
        hint = f" Did you mean {close[0]}?" if close else ""
        print(f"megalm: unknown verb {verb!r}.{hint}\n\n{usage()}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
