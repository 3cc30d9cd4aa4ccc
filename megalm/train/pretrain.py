"""`megalm pretrain` on one rank: join the group, build or resume the job, train, leave."""

from __future__ import annotations

import fcntl
import os
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
import yaml

from megalm.checkpoint.sharded import LATEST, MANIFEST, find_checkpoint, read_manifest, unnamed_checkpoint
from megalm.checkpoint.state import RunState, load_checkpoint, state_of
from megalm.config.fields import flatten
from megalm.config.parallel import layout_name
from megalm.config.run import RunConfig
from megalm.data.corpus import Corpus, corpus_of
from megalm.errors import CheckpointError, ConfigError, ExitCode, Problem, RunError, writing
from megalm.log import close_log, log, open_log, this_rank
from megalm.models.count import count_parameters
from megalm.parallel.bootstrap import be_deterministic, start_process_group, stop_process_group
from megalm.parallel.heartbeat import name_groups
from megalm.parallel.signals import StopRequest
from megalm.parallel.topology import Topology, build_topology
from megalm.parallel.workers import make_folder, note_error, this_attempt
from megalm.train.build import build_job
from megalm.train.counting import Counting
from megalm.train.forecast import describe_memory
from megalm.train.hooks import Checkpointing, Evaluating, Logging, ProgressBar
from megalm.train.kernels import choose_kernels, describe, facts_of
from megalm.train.measuring import Measuring
from megalm.train.progress import Beating, Reporting, note_failure
from megalm.train.pruning import Pruning, leave_result
from megalm.train.record import Recording
from megalm.train.routing import Routing
from megalm.train.stopping import Stopping
from megalm.train.trace import Tracing
from megalm.train.tracking import build_trackers
from megalm.train.trainer import Hook, Trainer
from megalm_kernels import Choice

_HANDOVER_SECONDS = 60.0  # for the start before this one to be gone


def pretrain(config: RunConfig, stop: StopRequest | None = None) -> ExitCode:
    """Train as `config` says, on the ranks that have been started. Raises MegalmError for what a user can mend.

    Returns FINISHED, or SAVED if it was asked to stop. `stop` of a caller who listens already; None: it listens itself.
    """
    if stop is None:
        with StopRequest() as stop:
            return pretrain(config, stop)
    run_dir, lock = Path(config.train.run_dir), None
    try:
        make_folder(run_dir)
        with writing(run_dir):
            lock = lock_folder(run_dir) if this_rank() == 0 else None
            open_log(Path(os.environ.get("MEGALM_LAUNCHER", run_dir / "logs")))
        if config.train.deterministic:
            be_deterministic()
        device = start_process_group(config.cluster, flatten(config))
        config.cluster.num_processes = dist.get_world_size()
        torch.manual_seed(config.train.seed)  # nothing draws from it; what does one day is the same each time
        code = _train(config, run_dir, device, stop)
        stop_process_group()
        return code
    except BaseException as error:
        note_error(error)
        if lock is not None and isinstance(error, Exception):
            note_failure(run_dir, error, this_rank())
        raise
    finally:
        close_log()
        if lock is not None:
            lock.close()


def lock_folder(run_dir: Path) -> TextIO:
    """Hold the run's folder until the file is closed or the process ends. Raises ConfigError if another run holds it.

    A start after the first, and any in a job, which may be the next of a chain, waits for the one before it, whose processes may
    be on their way out, here or on a machine that a network file system has not given up yet; RunError, which is no refusal, if
    they are not gone in time.
    """
    file = open(run_dir / ".lock", "a+", encoding="utf-8")  # noqa: SIM115  open for as long as the run
    is_first = this_attempt() in ("0", "0.0") and "SLURM_JOB_ID" not in os.environ
    deadline = time.monotonic() + (0.0 if is_first else _HANDOVER_SECONDS)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            file.seek(0)
            owner = file.read().strip()
            file.close()
            rule = f"another run is writing there (process {owner})"
            problem = Problem("train.run_dir", run_dir, rule, "", "another train.run_dir, or wait for its end")
            raise (ConfigError if is_first else RunError)(problem) from error
        except OSError as error:  # some network file systems
            log(f"{run_dir} is not locked ({error.strerror}): do not start a second run there")
            break
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _train(config: RunConfig, run_dir: Path, device: torch.device, stop: StopRequest) -> ExitCode:
    resolved = asdict(config)
    corpus = corpus_of(config)
    source = find_source(config, run_dir)
    if source is not None and _is_finished(config, source):
        return ExitCode.FINISHED
    topology = build_topology(config.parallel, device, timedelta(seconds=config.cluster.timeout_seconds))
    name_groups(topology)
    used = config.kernels.operations()
    choices = choose_kernels(config.kernels, device.type, facts_of(config))
    choices = [choice for choice in choices if choice.operation in used]
    _announce(config, topology, corpus, choices)
    job = build_job(config, topology, corpus, draw=source is None)
    fingerprint = corpus.fingerprint()
    state = RunState(data_fingerprint=fingerprint)
    if source is not None:
        state = load_checkpoint(source, job.engine, resolved["model"])
        state.stopped_early = state.is_out_of_patience(config.train.patience)  # that of now, not of then
        _check_same_data(source, state, config, fingerprint)
        log(f"resumed from {source} at step {state.step}")
    _check_same_start(state, device)
    if topology.rank == 0:
        with writing(run_dir):
            (run_dir / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
            if corpus.tokenizer is not None:  # the run's own copy: a corpus may be made anew, or stay behind
                corpus.tokenizer.save(run_dir / "tokenizer.json")
    logging = Logging(build_trackers(config, resolved, state.step) if topology.rank == 0 else [])
    hooks: list[Hook] = [Counting(), Measuring(logging), Tracing(), ProgressBar(), logging, Evaluating(logging)]
    checkpointing = Checkpointing(resolved, logging)
    reporting = Reporting(logging, checkpointing)
    pruning = Pruning(logging)
    hooks += [Stopping(stop), pruning, checkpointing, reporting, Beating()]
    if config.model.num_experts:
        hooks.insert(hooks.index(logging) + 1, Routing(logging))
    if config.train.record:
        hooks.append(Recording(Path(config.train.record), config.train.record_step))
    trainer = Trainer(job, state, hooks)
    trainer.fit()
    if trainer.interrupted:
        log(f"stopped at step {state.step} of {config.train.steps}, and saved; the same command goes on from there")
        return ExitCode.SAVED
    pruning.finish(trainer)
    if pruning.pruned:
        return ExitCode.FINISHED
    reporting.finish(trainer)
    unigram = corpus.unigram_entropy
    yardstick = f", {_side(logging.recent_loss, unigram)} the corpus's unigram entropy of {unigram:.4f}" if unigram else ""
    log(f"training loss {logging.recent_loss:.4f} nats per token over the last {len(logging.losses)} steps{yardstick}")
    log(f"done: step {state.step} of {config.train.steps}, {state.consumed_tokens:,} tokens; everything is in {run_dir}")
    return ExitCode.FINISHED


def _side(loss: float, unigram: float) -> str:
    """Whether the model knows more than how common each token is."""
    return "well below" if loss < unigram - 0.5 else "below" if loss < unigram else "not yet below"


def find_source(config: RunConfig, run_dir: Path) -> Path | None:
    """The checkpoint to start from: the run folder's own latest, else `checkpoint.load`, else none.

    Raises CheckpointError if there are checkpoints and no word of which is the latest: starting anew would bury them.
    """
    own = run_dir / "checkpoints"
    if (own / LATEST).is_file():
        return find_checkpoint(run_dir)
    if (first := unnamed_checkpoint(own)) is not None:
        return first
    if found := sorted(path.parent.name for path in own.glob(f"step-*/{MANIFEST}")):
        rule = f"must name the checkpoint to go on from; there are {', '.join(found)}"
        raise CheckpointError(Problem(str(own / LATEST), "missing", rule, "", f"echo {found[-1]} > {own / LATEST}"))
    return find_checkpoint(Path(config.checkpoint.load), "checkpoint.load") if config.checkpoint.load else None


def _is_finished(config: RunConfig, source: Path) -> bool:
    """Whether there is nothing left to do; says so."""
    state = state_of(read_manifest(source))
    stopped = state.is_out_of_patience(config.train.patience)
    if state.step < config.train.steps and not stopped:
        return False
    why = ", stopped early" if stopped else ""
    leave_result(config, state)
    log(f"already at step {state.step} of {config.train.steps}{why} ({source}); nothing to do")
    log(f"to train on: a larger {'train.patience' if stopped else 'train.steps'}; to start anew: another train.run_dir")
    return True


def _check_same_start(state: RunState, device: torch.device) -> None:
    """Raise RunError if the ranks did not all find the same checkpoint: their weights would mix without a word."""
    lowest, highest = (torch.tensor(state.step, device=device) for _ in range(2))
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    if int(lowest) != int(highest):
        rule = f"all ranks must start from one checkpoint, and they found steps {int(lowest)} to {int(highest)}"
        raise RunError(Problem("train.run_dir", None, rule, "", "a train.run_dir on a file system that all machines share"))


def _check_same_data(source: Path, state: RunState, config: RunConfig, fingerprint: str) -> None:
    """Raise CheckpointError if sample numbers would mean other samples than before."""
    if state.data_fingerprint != fingerprint:
        rule = f"the run in {source} was trained on other tokens, another split, seed or sequence length"
        raise CheckpointError(
            Problem("data.path", config.data.path, rule, "", "the same data.* as before, or a new train.run_dir")
        )


def _announce(config: RunConfig, topology: Topology, corpus: Corpus, choices: list[Choice]) -> None:
    """One look at what is about to run."""
    model, layout = config.model, layout_name(config.parallel, topology.data.size)
    log(
        f"{model.architecture} {count_parameters(model):,} parameters, {config.train.precision}; layout {layout} on "
        f"{topology.world_size} x {topology.device.type}; microbatches per rank and step: {config.num_microbatches} of "
        f"{config.train.micro_batch_size} x {config.data.seq_length} tokens"
    )
    if corpus.unigram_entropy is not None:
        log(f"corpus: {corpus.indexed.num_tokens:,} tokens, unigram entropy {corpus.unigram_entropy:.4f} nats per token")
    log(describe_memory(config))
    log(f"kernels: {describe(choices)}; pid {os.getpid()}")
