"""Pretrain: train a language model. Starts its own workers, unless torchrun or srun has started this process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megalm.config.run import RunConfig
from megalm.errors import ExitCode, MegalmError
from megalm.launchers.app import job_arguments, run_verb
from megalm.parallel.signals import StopRequest


def main() -> None:
    """`megalm pretrain ...`. Exits with ExitCode.SAVED if it was asked to stop and has saved."""
    from megalm.parallel.workers import in_worker

    typed = sys.argv[1:]  # before run_verb puts Hydra's view of them there
    stop = StopRequest()
    if in_worker():
        stop.listen()  # from now on: the default action of USR1 would end a rank that is still importing

    def task(config: RunConfig) -> None:
        from megalm.config.machine import processes
        from megalm.data.corpus import corpus_of
        from megalm.parallel.agent import start_workers

        if not in_worker():
            if _nothing_left(config):
                return
            corpus_of(config)  # what is wrong with it is said before anything is started or written
        if in_worker() or (processes(config) == 1 and not config.cluster.max_restarts):
            work(config, stop)  # one rank needs no process of its own, unless somebody is to start it again
        else:
            _end(start_workers("megalm.launchers.pretrain", job_arguments(typed, config), config, stop=stop.listen()))

    try:
        run_verb("pretrain", task)
    finally:
        stop.ignore()


def work(config: RunConfig, stop: StopRequest) -> None:
    """One rank. Under our own launcher an error has become a note, which the launcher shows once for all ranks."""
    from megalm.train.pretrain import pretrain

    try:
        code = pretrain(config, stop.listen())
    except Exception as error:
        if "MEGALM_LAUNCHER" not in os.environ:
            raise
        sys.exit(error.exit_code if isinstance(error, MegalmError) else ExitCode.FAILED)
    _end(code)


def _end(code: ExitCode) -> None:
    if code != ExitCode.FINISHED:
        sys.exit(code)


def _nothing_left(config: RunConfig) -> bool:
    """Whether the run folder says that this run has reached its goal; says so."""
    from megalm.runfolder import finished_step

    step = finished_step(Path(config.train.run_dir), config.train.steps, config.train.patience)
    if step is not None:
        print(f"already at step {step} of {config.train.steps} ({config.train.run_dir}); nothing to do", flush=True)
        print("to train on: a larger train.steps; to start anew: another train.run_dir", flush=True)
    return step is not None


if __name__ == "__main__":
    main()
