"""From a verb and its arguments to a job: its settings, its folder, and how many ranks go on a node.

The settings are checked as they will be in the job, not as on the machine that submits: with the job's GPUs, and its ranks.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megalm.config.cluster import ClusterConfig, SlurmConfig
from megalm.config.knobs import section
from megalm.config.run import ROOTS, ParityRun, RunConfig
from megalm.errors import ConfigError, Problem

_READERS = ("status", "report", "sweep")
_HERE = ("cluster=slurm", "cluster.name=slurm")  # said to whoever submits, not to the ranks


@dataclass
class JobConfig:
    """What a verb without these sections can be told about its job."""

    cluster: ClusterConfig = section(ClusterConfig)
    slurm: SlurmConfig = section(SlurmConfig)


@dataclass
class Job:
    """One verb as a SLURM job. Folders are absolute."""

    verb: str
    arguments: list[str]  # of each rank
    slurm: SlurmConfig
    run_dir: Path  # of the run, or a folder for the job's own files
    ranks_per_node: int  # 0: the verb is one process, or starts its own
    config: Any = None  # of the verb
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    settings: list[str] = field(default_factory=list)  # of the job alone: in the script, for a verb that does not know them

    def __post_init__(self) -> None:
        if self.slurm.setup:  # as the shell of whoever submits means it; within quotes bash expands no ~
            self.slurm.setup = str(Path(self.slurm.setup).expanduser().absolute())

    @property
    def world_size(self) -> int:
        """Ranks in all, 1 where the verb has none."""
        return max(1, self.slurm.nodes * self.ranks_per_node)


def is_for_slurm(arguments: Sequence[str]) -> bool:
    """Whether the command line says that the verb is to be submitted: by the last word on it."""
    said = [text for text in arguments if text.startswith(("cluster=", "cluster.name="))]
    return bool(said) and said[-1] in _HERE


def read_job(verb: str, arguments: Sequence[str], nodes: int = 0, gpus: int | None = None) -> Job:
    """The job of a command line. `nodes`, `gpus` per node: what SLURM has given, where the script was submitted by hand.

    Raises ConfigError with all problems.
    """
    if verb not in ROOTS or verb in _READERS:
        rule, allowed = "no such verb, or one that only reads files", ", ".join(name for name in ROOTS if name not in _READERS)
        raise ConfigError(Problem("megalm slurm", verb, rule, allowed, "megalm slurm submit pretrain"))
    if {"-m", "--multirun"} & set(arguments):
        rule = "one job is one run; a sweep submits its own jobs"
        raise ConfigError(Problem("--multirun", None, rule, "", f"megalm {verb} -m hydra/launcher=megalm_slurm ..."))
    typed = [text for text in arguments if text not in _HERE]
    if issubclass(ROOTS[verb], RunConfig):
        return _read_run(verb, typed, nodes, gpus)
    return _read_other(verb, typed)


def _read_run(verb: str, typed: list[str], nodes: int, gpus: int | None) -> Job:
    from megalm.launchers.compose import inspect, parse

    with as_in_job(0, 0):
        config, problems = inspect(parse(verb, typed))
    if config is None:
        raise ConfigError(*problems)
    given = []
    if nodes and nodes != config.slurm.nodes + config.slurm.spares:
        given.append(f"slurm.nodes={max(1, nodes - config.slurm.spares)}")
        config.slurm.nodes = max(1, nodes - config.slurm.spares)
    if gpus is not None and gpus != config.slurm.gpus_per_node:
        given.append(f"slurm.gpus_per_node={gpus}")
        config.slurm.gpus_per_node = gpus
    typed = [*typed, *given, "cluster.name=local"]
    ranks = 0 if isinstance(config, ParityRun) else _ranks_per_node(config)
    with as_in_job(config.slurm.nodes * ranks, config.slurm.gpus_per_node if config.cluster.device != "cpu" else 0):
        config, problems = inspect(parse(verb, typed))
    if not ranks and config is not None:
        problems += _one_node(verb, config.slurm)
    if problems:
        raise ConfigError(*problems)
    return job_of(verb, typed, config)


def examine_in_job(root: type[Any], raw: Mapping[str, Any]) -> tuple[Any, list[Problem]]:
    """As config.load.examine, of a run in the job that it describes itself: with the GPUs and ranks that it will have."""
    from megalm.config.load import examine
    from megalm.config.reader import read

    raw = {**raw, "cluster": {**(raw.get("cluster") or {}), "name": "local"}}
    with as_in_job(0, 0):
        config, problems = read(root, raw)
    if problems:
        return config, problems
    slurm, on_gpus = config.slurm, config.cluster.device != "cpu"
    with as_in_job(slurm.nodes * _ranks_per_node(config), slurm.gpus_per_node if on_gpus else 0):
        return examine(root, raw)


def job_of(verb: str, arguments: list[str], config: RunConfig) -> Job:
    """The job of a checked config that `arguments` would compose: a sweep has both, and composing takes half a second.

    Raises ConfigError for a folder that cannot stand in a script.
    """
    run_dir = Path(config.parity.work_dir if isinstance(config, ParityRun) else config.train.run_dir).absolute()
    check_path(run_dir)
    ranks = 0 if isinstance(config, ParityRun) else _ranks_per_node(config)
    return Job(verb, arguments, config.slurm, run_dir, ranks, config, config.cluster)


def _read_other(verb: str, typed: list[str]) -> Job:
    """A verb whose settings have no section of a job: it is one process on one node."""
    from megalm.config import slurm_rules
    from megalm.config.reader import read
    from megalm.launchers.compose import inspect, parse

    known = ("slurm.", "cluster.")
    own = [text for text in typed if not text.startswith(known)]
    raw: dict[str, dict[str, Any]] = {}
    for text in typed:
        if text.startswith(known):
            key, _, value = text.partition("=")
            group, _, name = key.partition(".")
            try:
                raw.setdefault(group, {})[name] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ConfigError(Problem(key, value, "the value cannot be read", "", f"{key}='\"...\"'")) from error
    job, problems = read(JobConfig, raw)
    with as_in_job(0, job.slurm.gpus_per_node):
        _, found = inspect(parse(verb, own))
    probe: Any = job
    problems += [Problem(r.keys[0], None, r.text) for r in slurm_rules.RULES if not r.holds(probe)]
    problems += found + _one_node(verb, job.slurm)
    if problems:
        raise ConfigError(*problems)
    digest = hashlib.sha256(json.dumps(own).encode()).hexdigest()[:8]  # jobs that do different things do not share a folder
    run_dir = Path("runs", "slurm", f"{verb}-{digest}").absolute()
    check_path(run_dir)
    settings = [text for text in typed if text.startswith(known)]
    return Job(verb, own, job.slurm, run_dir, 0, cluster=job.cluster, settings=settings)


def _ranks_per_node(config: RunConfig) -> int:
    s = config.slurm
    needed = math.ceil(config.parallel.ranks_per_sample / s.nodes)
    return s.processes_per_node or (s.gpus_per_node if config.cluster.device != "cpu" else 0) or needed


def _one_node(verb: str, slurm: SlurmConfig) -> list[Problem]:
    if slurm.nodes + slurm.spares == 1:
        return []
    return [Problem("slurm.nodes", slurm.nodes + slurm.spares, f"{verb} runs on one node", "1", "slurm.nodes=1 slurm.spares=0")]


def check_path(folder: Path, key: str = "train.run_dir") -> None:
    """It stands in a line of the script that sbatch reads, where these characters mean something. Raises ConfigError."""
    if any(char in "\"'\\$`" or not char.isprintable() for char in str(folder)):
        rule = "the folder of a job has no quotes, backslashes, $, ` and control characters in its path"
        raise ConfigError(Problem(key, str(folder), rule, "", f"{key}=runs/mine"))


@contextmanager
def as_in_job(ranks: int, gpus: int) -> Iterator[None]:
    """The rules ask this process how many GPUs and ranks there are: let it answer for a node of the job."""
    given = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}
    if ranks:
        given |= {"RANK": "0", "WORLD_SIZE": str(ranks)}
    hidden = [*given, "RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"]
    before = {name: os.environ.get(name) for name in hidden}
    for name in hidden:
        os.environ.pop(name, None)
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
