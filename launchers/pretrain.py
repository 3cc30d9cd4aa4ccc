"""Pretrain: train a language model. Starts its own workers, unless torchrun or srun has started this process."""

from __future__ import annotations

import os
import sys

from megalm.config.run import RunConfig
from megalm.errors import MegalmError
from megalm.launchers.app import job_arguments, run_verb


def main() -> None:
    """`megalm pretrain ...`."""
    typed = sys.argv[1:]  # before run_verb puts Hydra's view of them there

    def task(config: RunConfig) -> None:
        from megalm.config.machine import processes
        from megalm.data.corpus import corpus_of
        from megalm.parallel.workers import in_worker, start_workers

        if not in_worker():
            corpus_of(config)  # what is wrong with it is said before anything is started or written
        if in_worker() or processes(config) == 1:  # one rank needs no processes of its own
            work(config)
        else:
            start_workers("megalm.launchers.pretrain", job_arguments(typed, config), config)

    run_verb("pretrain", task)


def work(config: RunConfig) -> None:
    """One rank. Under our own launcher an error has become a note, which the launcher shows once for all ranks."""
    from megalm.train.pretrain import pretrain

    try:
        pretrain(config)
    except Exception as error:
        if "MEGALM_LAUNCHER" not in os.environ:
            raise
        sys.exit(error.exit_code if isinstance(error, MegalmError) else 1)


if __name__ == "__main__":
    main()
