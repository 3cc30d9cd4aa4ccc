"""From arguments to a composed config and all that is wrong with it, before Hydra runs and stops at the first fault."""

from __future__ import annotations

import difflib
import io
import itertools
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from megalm.config.fields import assign, leaves, quote
from megalm.config.layouts import layout_node
from megalm.config.load import examine
from megalm.config.reader import defaults_of, forbidden, known_keys, suggest, unknown_key
from megalm.config.run import ROOTS, ParityRun, RunConfig
from megalm.config.tasks import PipelineRun
from megalm.errors import ConfigError, Problem
from megalm.launchers.cli import SUBVERBS

SEARCH_PATH = "pkg://megalm.conf"
# The run's folder is train.run_dir: Hydra must not make one of its own, nor write a log file where we are, nor turn on
# the chatter of every library (DeepSpeed's probe compilations) by a handler on the root logger.
HYDRA_SETTINGS = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)
MAX_CHECKED_JOBS = 32  # of a sweep, before it starts; every job is checked again when it runs

# Whose keys may stand alone; of any other verb, the sections of the names of its subverb and of itself.
_OWN_SECTION = {"pretrain": "train"}
# The key whose value may stand alone, being a folder: `megalm status RUN`.
_FOLDER = {"status": "status.run_dir", "report": "report.run_dir", "sweep": "sweep.folder"}
Judge = Callable[[type[Any], dict[str, Any]], tuple[Any, list[Problem]]]
_PLAIN_DOLLAR = r"name a key of the config, or write \${...} for the text itself"


@dataclass
class Command:
    """A command line that Hydra would accept, and the problems found while reading it."""

    verb: str
    subverb: str  # of a verb that has some
    options: Namespace
    config_name: str
    overrides: list[Override] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    inspected: dict[frozenset[str], Any] = field(default_factory=dict)  # overrides of a job -> its config, once `inspect` has run

    @property
    def argv(self) -> list[str]:
        """The arguments for Hydra; Hydra's own options are passed on as they were."""
        o = self.options
        flags = [f"--config-name={self.config_name}"] + ["--multirun"] * o.multirun + ["--resolve"] * o.resolve
        flags += ["--hydra-help"] * o.hydra_help + ["--shell-completion"] * o.shell_completion
        named = {
            "config-dir": o.config_dir,
            "config-path": o.config_path,
            "cfg": o.cfg,
            "package": o.package,
            "info": o.info,
        }
        flags += [f"--{name}={value}" for name, value in named.items() if value]
        return flags + [_text(o) for o in self.overrides]


def parse(verb: str, argv: list[str]) -> Command:
    """Reads the arguments of a verb; registers the verb's defaults, a yaml file among the arguments, and layouts."""
    ConfigStore.instance().store(name=f"{verb}_defaults", node=defaults_of(ROOTS[verb]), provider="megalm")
    subverbs = SUBVERBS.get(verb, {})
    typed = argv[:1] if argv and argv[0] in subverbs else []
    subverb, argv = next(iter([*typed, *subverbs]), ""), argv[len(typed) :]
    options, unknown = get_args_parser().parse_known_intermixed_args(argv)
    command = Command(verb, subverb, options, options.config_name or verb)
    command.problems += map(_unknown_flag, unknown)
    if options.experimental_rerun:
        command.problems.append(
            Problem("--experimental-rerun", None, "refused: it unpickles a file", fix="name a yaml file instead")
        )
    if options.config_dir and not Path(options.config_dir).is_dir():
        command.problems.append(Problem("--config-dir", options.config_dir, "no such folder"))
    for text in options.overrides:
        if Path(text).suffix in (".yaml", ".yml") and "=" not in text:
            _use_file(command, Path(text))
        else:
            _add_override(command, text)
    return command


def inspect(command: Command, judge: Judge = examine) -> tuple[Any, list[Problem]]:
    """(typed config of the first job, all problems of the command line, its yaml files and every rule).

    judge: reads and checks what was composed; config.load.examine for a run on this machine.
    """
    setup_globals()
    loader = _loader(command.options)
    problems = list(command.problems)
    overrides = [override for override in command.overrides if _is_sound(override, command, loader, problems)]
    configs = []
    for job in override_lists(overrides):
        config, found = _inspect_job(command, loader, job, judge)
        configs += [config] if config is not None else []
        command.inspected[task_words(job)] = config
        problems += [problem for problem in found if problem not in problems]
    if command.verb == "pretrain":
        problems += _shared_folders([config.train.run_dir for config in configs], overrides)
    return configs[0] if configs else None, problems


def _shared_folders(folders: list[str], overrides: list[Override]) -> list[Problem]:
    """Jobs of a sweep that would resume one another. The default folder is not shared: each job gets its own."""
    shared = next((name for name in folders if folders.count(name) > 1 and name != RunConfig().train.run_dir), None)
    if shared is None:
        return []
    swept = [o.key_or_group for o in overrides if o.is_sweep_override()]
    named = all("." in key for key in swept) and "train.run_dir" not in swept
    fix = assign("train.run_dir", "_".join([shared, *(f"${{{key}}}" for key in swept)])) if named else "leave train.run_dir out"
    return [Problem("train.run_dir", shared, "two jobs of a sweep need two folders", fix=fix)]


def plain(composed: Any) -> tuple[dict[str, Any], list[Problem]]:
    """Hydra's composed config as a nested dict, interpolations resolved, and the problems of those that cannot be."""
    raw: Any = OmegaConf.to_container(composed, resolve=False)
    raw.pop("hydra", None)
    if next(forbidden(raw), None):
        return raw, []  # the reader names them; nothing is resolved, so nothing runs
    try:
        return cast(dict, OmegaConf.to_container(OmegaConf.create(raw), resolve=True)), []
    except OmegaConfBaseException as error:
        return raw, [Problem(str(error.full_key or "config"), None, f"cannot resolve: {_first_line(error)}", fix=_PLAIN_DOLLAR)]


def _use_file(command: Command, path: Path) -> None:
    """Makes a yaml file the primary config. Without a defaults list of its own it is laid over the verb's."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        rule = f"cannot read this file: {error.strerror}"
        command.problems.append(Problem(str(path), None, rule, fix="name an existing yaml file"))
        return
    try:
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except Exception as error:  # PyYAML and OmegaConf raise many kinds, all of them mean this
        command.problems.append(Problem(str(path), None, f"not a yaml mapping: {' '.join(str(error).split())}"))
        return
    if not isinstance(content, dict):
        command.problems.append(Problem(str(path), None, "not a yaml mapping of sections", "section: {key: value}"))
        return
    for group in {*_loader(command.options).list_groups("")} & {*content}:
        if isinstance(content[group], str):
            rule, name = "a group is chosen on the command line or in `defaults:`", content.pop(group)
            command.problems.append(Problem(group, name, rule, fix=assign(group, name)))
    content.setdefault("defaults", [command.verb, "_self_"])
    command.config_name = f"file_{path.stem}"
    ConfigStore.instance().store(name=command.config_name, node=content, provider=str(path))
    command.options.config_dir = command.options.config_dir or str(path.resolve().parent)
    entries = [entry for entry in content["defaults"] if isinstance(entry, dict)]
    layouts = [str(value) for entry in entries for key, value in entry.items() if key.endswith("parallel")]
    _register_layouts(command.options, layouts)


def _unknown_flag(flag: str) -> Problem:
    guess = suggest(flag.partition("=")[0], get_args_parser()._option_string_actions)
    hint = f"; did you mean {guess}?" if guess else ""
    return Problem(flag, None, f"no such option{hint}", fix=guess or "--help")


def _add_override(command: Command, text: str) -> None:
    folder = _FOLDER.get(command.verb, "")
    if folder and ("=" not in text or Path(text).is_dir()) and not text.startswith(("~", "-")):
        if any(override.key_or_group == folder for override in command.overrides):
            command.problems.append(Problem(text, None, f"{folder} has been given already", fix="one folder at a time"))
            return
        text = f"{folder}={text}"
    key, equals, value = text.partition("=")
    known = known_keys(ROOTS[command.verb])
    sections = (command.subverb, _OWN_SECTION.get(command.verb, command.verb))
    own = next((f"{section}.{key}" for section in sections if f"{section}.{key}" in known), "")
    if equals and own:  # `megalm parity steps=20` means parity.steps
        key, text = own, f"{own}={value}"
    elif not equals and not text.startswith("~"):
        command.problems.append(_stray_word(command, text))
        return
    kinds = {name: kind for name, _, kind in leaves(ROOTS[command.verb])}
    if kinds.get(key.lstrip("+")) is str and not command.options.multirun:  # text is what was typed
        text = f"{key}={quote(value)}"
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        rule = "cannot read this value: text that holds , = : { } [ ] or quotes needs quotes"
        command.problems.append(Problem(key, value, rule, fix=assign(key, value)))
        return
    exists = key.lstrip("+~") in known or bool(_names(_loader(command.options), key))
    if override.is_sweep_override() and not command.options.multirun and exists:
        command.problems.append(_stray_sweep(key, value, override))
        return
    if override.key_or_group == "parallel":
        _register_layouts(command.options, _choices(override))
    command.overrides.append(override)


def _stray_word(command: Command, text: str) -> Problem:
    verb, subverbs = command.verb, SUBVERBS.get(command.verb, {})
    rule = "an argument is key=value or a yaml file"
    close = difflib.get_close_matches(text, subverbs, 1)
    if close:  # misspelt, or not right after the verb
        meant = f"megalm {verb} {close[0]}"
        return Problem(text, None, f"{rule}; did you mean {meant}?", ", ".join(subverbs), meant)
    guess = suggest(text, known_keys(ROOTS[verb]))
    hint = f"; did you mean {guess}=...?" if guess else ""
    return Problem(text, None, f"{rule}{hint}", fix=f"megalm {verb} --help")


def _stray_sweep(key: str, value: str, override: Override) -> Problem:
    fix = f"{key}={next(override.sweep_string_iterator(), '')}"
    return Problem(key, value, "several values are a sweep, which needs -m", fix=fix)


def _register_layouts(options: Namespace, names: list[str]) -> None:
    """Every layout has a config, whether or not a yaml file spells it out."""
    spelled_out = _names(_loader(options), "parallel")
    for name in names:
        try:
            node = layout_node(name)
        except ValueError:
            continue  # reported as an unknown option
        if name not in spelled_out:
            ConfigStore.instance().store(group="parallel", name=name, node=node, package="_global_", provider="megalm")


def _text(override: Override) -> str:
    assert override.input_line is not None  # a parsed override always has its text
    return override.input_line


def _choices(override: Override) -> list[str]:
    value = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
    return [str(item) for item in (value if not isinstance(value, str) else [value])]


def _loader(options: Namespace) -> ConfigLoaderImpl:
    search_path = create_config_search_path(options.config_path or SEARCH_PATH)
    if options.config_dir:
        search_path.prepend("command-line", f"file://{Path(options.config_dir).resolve()}", anchor="schema")
    return ConfigLoaderImpl(config_search_path=search_path)


def _names(loader: ConfigLoaderImpl, group: str) -> list[str]:
    """The configs of a group. Hydra's own get_group_options copies the whole repository first: 10 ms each time."""
    return list(loader.repository.get_group_options(group, ObjectType.CONFIG))


def _is_sound(override: Override, command: Command, loader: ConfigLoaderImpl, problems: list[Problem]) -> bool:
    """Hydra can compose this override. One that it cannot is reported and left out, so that the rest is looked at."""
    key = override.key_or_group
    options = _names(loader, key) if not override.is_hydra_override() else []
    if key == "parallel" and command.verb == "parity":
        fix = "" if override.is_delete() else assign("parity.layouts", _choices(override))
        problems.append(Problem(key, None, "parity takes its layouts from parity.layouts", fix=fix or "remove it"))
        return False
    if options:
        bad = [name for name in _choices(override) if name not in options and name != "None"]
        problems += [_unknown_option(key, name, options) for name in bad if not override.is_delete()]
        return not bad or override.is_delete()
    sections = known_keys(ROOTS[command.verb])
    if override.is_hydra_override() or key in sections:
        return True
    value = None if override.is_delete() else override.value()
    if override.is_sweep_override():
        value = _text(override).partition("=")[2]
    names = [*sections, *loader.list_groups("")]
    problem, guess = unknown_key(key, value, names), suggest(key, names)
    if override.is_sweep_override() and guess:
        problem = replace(problem, fix=shlex.quote(f"{guess}={value}"))
    elif guess and isinstance(value, str) and _names(loader, guess):
        problem = replace(problem, fix=assign(guess, value))
    problems.append(problem)
    return False


def _unknown_option(group: str, name: str, options: list[str]) -> Problem:
    guess = suggest(name, options)
    fallback = "single" if group == "parallel" else options[0]
    hint = f"; did you mean {group}={guess}?" if guess else ""
    forms = "; or any layout, such as tp2_pp2_dp2_zero3" if group == "parallel" else ""
    return Problem(group, name, f"no such option{hint}", ", ".join(options) + forms, f"{group}={guess or fallback}")


def task_words(overrides: Iterable[str]) -> frozenset[str]:
    """Those that are not for Hydra itself."""
    return frozenset(text for text in overrides if not text.lstrip("+~").startswith(("hydra.", "hydra/")))


def override_lists(overrides: list[Override]) -> Iterable[list[str]]:
    """The overrides of each job of a sweep, of an interval its ends; one job if there is no sweep."""
    fixed = [_text(o) for o in overrides if not o.is_sweep_override()]
    swept = [o for o in overrides if o.is_sweep_override()]
    choices = [[f"{o.get_key_element()}={value}" for value in _swept_values(o)] for o in swept]
    return ([*fixed, *job] for job in itertools.islice(itertools.product(*choices), MAX_CHECKED_JOBS))


def _swept_values(override: Override) -> Iterable[str]:
    if override.is_discrete_sweep():
        return override.sweep_string_iterator()
    ends: Any = override.value()
    return [str(int(end)) if float(end).is_integer() else str(end) for end in (ends.start, ends.end)]  # Hydra says 1.0 for 1


def _inspect_job(
    command: Command, loader: ConfigLoaderImpl, overrides: list[str], judge: Judge
) -> tuple[Any, list[Problem]]:
    try:
        composed = loader.load_configuration(command.config_name, [*HYDRA_SETTINGS, *overrides], RunMode.RUN)
    except HydraException as error:
        name = command.config_name.removeprefix("file_")
        fix = _PLAIN_DOLLAR if isinstance(error.__cause__, GrammarParseError) else ""
        return None, [Problem(name, None, f"cannot compose: {_first_line(error.__cause__ or error)}", fix=fix)]
    raw, unresolved = plain(composed)
    config: Any
    config, problems = judge(ROOTS[command.verb], raw)
    return config, unresolved + (problems or _schedule_problems(config))


def _schedule_problems(config: Any) -> list[Problem]:
    """What is wrong with a user's own schedule. Parity's layouts have none."""
    if isinstance(config, ParityRun) or not isinstance(config, (RunConfig, PipelineRun)) or config.parallel.schedule != "csv":
        return []
    from megalm.parallel.schedules import build_schedule

    p = config.parallel
    count = config.pipeline.num_microbatches if isinstance(config, PipelineRun) else config.num_microbatches
    try:
        schedule = build_schedule(p.schedule, p.pipeline_parallel, count, p.chunks, p.schedule_file)
    except ConfigError as error:
        return error.problems
    problems = []
    ends = schedule.rank_of(0), schedule.rank_of(schedule.num_stages - 1)
    apart = ends[0] != ends[1] and ends != (0, p.pipeline_parallel - 1)
    if isinstance(config, RunConfig) and config.model.tie_embeddings and apart:
        rule = f"with tied embeddings its first stage and its last are on the first rank and the last, or on one; here {ends}"
        problems.append(Problem("parallel.schedule_file", p.schedule_file, rule, fix="model.tie_embeddings=false"))
    if schedule.splits_backward and p.zero and p.zero_reduce == "microbatch":
        rule = "its weight gradients come after the backward in whose hooks parallel.zero_reduce=microbatch reduces"
        problems.append(Problem("parallel.schedule_file", p.schedule_file, rule, fix="parallel.zero_reduce=step"))
    return problems


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
