"""The one exception family: what is wrong, the rule it breaks, and the fix. A user's mistake never shows a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """What a process of a run says when it ends; what restarts jobs decides by it (docs/slurm.md)."""

    FINISHED = 0
    FAILED = 1  # another start may well succeed: from the last checkpoint, perhaps on other machines
    REFUSED = 2  # a user's mistake: nothing ran, and the same command will be refused again
    HOPELESS = 3  # the run itself would fail the same way again: do not restart
    SAVED = 75  # asked to stop, everything is saved: the same command goes on from there (EX_TEMPFAIL of sysexits.h)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `key = value`, the rule, what is allowed, and the nearest fix."""

    key: str
    value: object
    rule: str
    allowed: str = ""
    fix: str = ""  # a command line override (`parallel.tensor_parallel=2`) or a command to run

    def __str__(self) -> str:
        lines = [f"{self.key} = {self.value}" if self.value is not None else self.key, f"  rule:    {self.rule}"]
        if self.allowed:
            lines.append(f"  allowed: {self.allowed}")
        if self.fix:
            lines.append(f"  fix:     {self.fix}")
        return "\n".join(lines)


class MegalmError(Exception):
    """Base of every error that a user can mend; the command line prints `str(error)` and exits with `exit_code`."""

    exit_code: int = ExitCode.REFUSED
    kind = "error"

    def __init__(self, *problems: Problem):
        super().__init__(*problems)
        self.problems = list(problems)

    def __str__(self) -> str:
        count = len(self.problems)
        title = f"{self.kind}: {count} problem{'s' if count != 1 else ''}"
        return "\n".join([title, *(f"{i}. {p}" for i, p in enumerate(self.problems, 1))])


class ConfigError(MegalmError):
    """A setting, or a combination of settings, that cannot run."""

    kind = "config error"


class DataError(MegalmError):
    """A corpus, tokenizer or index file that is missing, empty, truncated or of the wrong kind."""

    kind = "data error"


class CheckpointError(MegalmError):
    """A checkpoint that is missing, damaged, or of another model."""

    kind = "checkpoint error"


class RunError(MegalmError):
    """A run that cannot go on: a port in use, a worker that died, a loss that is no longer finite."""

    kind = "run error"
    exit_code: int = ExitCode.FAILED


class HopelessError(RunError):
    """A run that fails the same way whenever it is started again, such as a loss that is no longer finite."""

    exit_code = ExitCode.HOPELESS


@contextmanager
def writing(path: Path, key: str = "train.run_dir") -> Iterator[None]:
    """Around writing files of a run: what the file system refuses (permission, full disk) names the file and the key."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        rule = f"cannot write {where}: {error.strerror or error}"
        fix = f"make room or give permission there, or {key}=<another folder>"
        raise RunError(Problem(key, path, rule, "", fix)) from error
