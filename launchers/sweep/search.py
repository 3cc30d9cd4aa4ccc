"""A search over settings with Optuna: draw points, run them, tell what came of them, end the bad ones early.

All that is known is in SWEEP_DIR/optuna.journal and in the points' folders. A search that was killed finds the points that
were at work then, runs them again (each goes on from its checkpoint) and draws the rest. Only this process knows Optuna.
"""

from __future__ import annotations

import fcntl
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megalm.config.run import ROOTS
from megalm.errors import ConfigError, ExitCode, Problem, writing
from megalm.launchers.sweep.point import Point, SweepCommand
from megalm.launchers.sweep.settings import check
from megalm.launchers.sweep.space import Dimension, read_space
from megalm.runfolder import PRUNE, read_result

JOURNAL, STUDY = "optuna.journal", "megalm"


def search(arguments: Sequence[str], settings: Any, launcher: Any, sweep: SweepCommand, folder: str) -> float | None:
    """The lowest loss found. `settings`: see hydra_plugins/megalm_optuna.py. Raises ConfigError, KeyboardInterrupt."""
    optuna = _optuna()
    check("megalm_optuna", **{key: value for key, value in vars(settings).items() if key != "_target_"})
    fixed, space = read_space(arguments, ROOTS[sweep.verb])
    root = Path(folder).absolute()
    with writing(root, "hydra.sweep.dir"):
        root.mkdir(parents=True, exist_ok=True)
    with _alone(root):
        study = _open_study(optuna, root, settings, space)
        while batch := _next_trials(optuna, study, settings, space):
            overrides = [[*fixed, *(d.override(trial.params[d.key]) for d in space)] for trial in batch]
            watcher = Watcher(study, dict(zip(map(tuple, overrides), batch, strict=True)))
            launcher.watch = watcher if settings.pruner != "none" else None
            for trial, place in zip(batch, _launch(launcher, overrides, batch[0].number), strict=True):
                _tell(optuna, study, trial, place)
        return _say_best(optuna, study, space, sweep, root)


def _launch(launcher: Any, overrides: list[list[str]], number: int) -> list[Path | None]:
    """Runs points; their folders, None for one whose settings do not go together: an answer too, to a search."""
    try:
        return [Path(job.working_dir) for job in launcher.launch(overrides, initial_job_idx=number)]
    except ConfigError as error:
        if len(overrides) > 1:
            return [place for i, own in enumerate(overrides) for place in _launch(launcher, [own], number + i)]
        print(error, file=sys.stderr, flush=True)
        return [None]


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        rule = "Optuna 5 must be installed"
        raise ConfigError(Problem("hydra/sweeper", "megalm_optuna", rule, "", "pip install 'megalm[sweep]'")) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One search at a time in a folder. Raises ConfigError."""
    with open(root / ".lock", "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            rule = "another search is at work there"
            fix = "another hydra.sweep.dir, or wait for its end"
            raise ConfigError(Problem("hydra.sweep.dir", root, rule, "", fix)) from error
        except OSError:  # some network file systems have no locks
            pass
        else:
            _mend(root / JOURNAL)
        yield


def _mend(journal: Path) -> None:
    """What a search leaves that was killed, or had a full disk, while it wrote: its lock, and a line without an end.

    Optuna would wait for the lock for half a minute, and write the next line behind the half one: that could not be read.
    """
    journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)
    with suppress(FileNotFoundError), open(journal, "r+b") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)


def _open_study(optuna: Any, root: Path, settings: Any, space: Sequence[Dimension]) -> Any:
    """The study of this folder, new or as it was left. Raises ConfigError if it draws from something else."""
    backend = optuna.storages.journal.JournalFileBackend(str(root / JOURNAL))
    try:
        storage = optuna.storages.JournalStorage(backend)
        study = optuna.create_study(study_name=STUDY, storage=storage, direction="minimize", load_if_exists=True)
    except OSError:
        raise
    except Exception as error:  # whatever Optuna meets while it reads
        rule = f"this is not a journal of Optuna: {error}"
        fix = f"mv {root / JOURNAL} {root / JOURNAL}.broken: points that are drawn again keep their results"
        raise ConfigError(Problem("hydra.sweep.dir", root / JOURNAL, rule, "", fix)) from error
    drawn = {d.key: str(d.distribution()) for d in space}
    before = study.user_attrs.get("space", drawn)
    if before != drawn:
        rule = f"the search in {root} draws {json.dumps(before)}"
        raise ConfigError(Problem("hydra.sweep.dir", root, rule, "", "another hydra.sweep.dir, or the same intervals"))
    study.set_user_attr("space", drawn)
    seed = settings.seed + len(study.get_trials(deepcopy=False))  # a search that goes on must not draw the same again
    samplers = {
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        "tpe": lambda: optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=settings.startup, constant_liar=settings.at_once > 1
        ),
    }
    pruners = {
        "none": optuna.pruners.NopPruner,
        "median": lambda: optuna.pruners.MedianPruner(settings.startup, settings.warmup_steps),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=1, max_resource="auto"),
    }
    study.sampler, study.pruner = samplers[settings.sampler](), pruners[settings.pruner]()
    return study


def _next_trials(optuna: Any, study: Any, settings: Any, space: Sequence[Dimension]) -> list[Any]:
    """First those that were at work when the search was killed or stopped, then new ones; empty when all are done."""
    left: list[Any] = []
    for frozen in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        if set(frozen.params) == {d.key for d in space}:
            left.append(optuna.trial.Trial(study, frozen._trial_id))
        else:  # killed while it was drawn
            study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)
    if left:
        return left[: settings.at_once]
    known = len([t for t in study.get_trials(deepcopy=False) if set(t.params) == {d.key for d in space}])
    count = min(settings.at_once, settings.trials - known)
    return [study.ask({d.key: d.distribution() for d in space}) for _ in range(count)]


class Watcher:
    """Called while points run: reports their losses to Optuna, and asks the points that it gives up to end."""

    def __init__(self, study: Any, trials: dict[tuple[str, ...], Any]) -> None:
        self.study, self.trials = study, trials

    def __call__(self, points: Sequence[Point]) -> None:
        for point in points:
            trial = self.trials.get(tuple(point.overrides))
            if trial is None or point.status not in ("running", "submitted") or (point.folder / PRUNE).exists():
                continue
            known = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
            for step, loss in losses(point):
                if step in known:
                    continue
                trial.report(loss, step)
                if step < point.config.train.steps and trial.should_prune():
                    (point.folder / PRUNE).touch()
                    break


def losses(point: Point) -> list[tuple[int, float]]:
    """(step, validation loss) so far; where nothing is evaluated the mean training loss of each `log_every` steps."""
    train = point.config.train
    name = "valid_loss" if train.eval_every else "loss"
    try:
        lines = (point.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found: list[tuple[int, float]] = []
    for line in lines:
        try:
            record = json.loads(line)
            found.append((int(record["step"]), float(record[name])))
        except (ValueError, KeyError, TypeError):
            continue  # of the other kind, or half written
    if train.eval_every:
        return found
    every = train.log_every
    full = [found[end - every : end] for end in range(every, len(found) + 1) if found[end - 1][0] % every == 0]
    return [(part[-1][0], sum(loss for _, loss in part) / every) for part in full]


def _tell(optuna: Any, study: Any, trial: Any, folder: Path | None) -> None:
    """What came of a point; one that has ended without a result has failed. After Ctrl-C nothing is told: all stay open."""
    result, states = read_result(folder) if folder is not None else None, optuna.trial.TrialState
    trial.set_user_attr("folder", str(folder or ""))
    if result is None:
        study.tell(trial, state=states.FAIL)
    elif result.status == "pruned":
        if not study.get_trials(deepcopy=False)[trial.number].intermediate_values:
            trial.report(result.value, result.step)
        study.tell(trial, state=states.PRUNED)
    else:
        study.tell(trial, result.value)


def _say_best(optuna: Any, study: Any, space: Sequence[Dimension], sweep: SweepCommand, root: Path) -> float | None:
    trials = study.get_trials(deepcopy=False)
    count = {state.name.lower(): sum(t.state == state for t in trials) for state in optuna.trial.TrialState}
    print(", ".join(f"{number} {name}" for name, number in count.items() if number), flush=True)
    done = [t for t in trials if t.state == optuna.trial.TrialState.COMPLETE]
    if not done:
        return None
    best = min(done, key=lambda t: t.value)
    settings = " ".join(d.override(best.params[d.key]) for d in space)
    print(f"best: {best.value:.4f} with {settings} ({best.user_attrs.get('folder', '')})", flush=True)
    print(f"megalm sweep report {root}", flush=True)
    # a loss that is not finite is an answer too, to a search
    sweep.failures[:] = [error for error in sweep.failures if error.exit_code != ExitCode.HOPELESS]
    return float(best.value)
