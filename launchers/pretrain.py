"""Pretrain: train a language model. Starts its own workers, unless torchrun or srun has started this process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megalm.config.run import RunConfig
from megalm.errors import MegalmError
from megalm.launchers.app import job_arguments, run_verb

MODULE = "megalm.launchers.pretrain"


def main() -> None:
    """`megalm pretrain ...`."""
    typed = sys.argv[1:]  # before run_verb puts Hydra's view of them there

    def task(config: RunConfig) -> None:
        from megalm.parallel.workers import in_worker, start_workers

        if in_worker():
            work(config)
            return
        cluster, logs = config.cluster, Path(config.train.run_dir, "logs")
        arguments = job_arguments(typed, config)
        start_workers(MODULE, arguments, cluster.num_processes, logs, cluster.port, cluster.threads)

    run_verb("pretrain", task)


def work(config: RunConfig) -> None:
    """One rank. Under our own launcher an error becomes a note, which the launcher shows once for all ranks."""
    from megalm.parallel.workers import note_error
    from megalm.train.pretrain import pretrain

    try:
        pretrain(config)
    except Exception as error:
        note_error(error)
        if "MEGALM_LAUNCHER" in os.environ:
            sys.exit(error.exit_code if isinstance(error, MegalmError) else 1)
        raise


if __name__ == "__main__":
    main()
