"""Every rule that joins two or more settings, in one table. A field's own bounds stand with the field."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from megalm.config import (
    context_rules,
    expert_rules,
    fields,
    fold_rules,
    kernel_rules,
    latent_rules,
    memory_rules,
    schedule_rules,
    slurm_rules,
    stage_split,
    zero_rules,
)
from megalm.config.fixes import Change, Rule, broken, cures, divisors, multiples, needs, plan, value_of, with_value
from megalm.config.layouts import candidate_layouts, sample_layouts, with_layout, with_model
from megalm.config.machine import count_gpus, data_parallel, launched_processes, processes, replicas, uses_cuda
from megalm.config.model import ARCHITECTURES
from megalm.config.run import ParityRun, RunConfig
from megalm.config.stage_split import explicit_split
from megalm.config.tasks import PipelineRun
from megalm.errors import ConfigError, Problem

Condition = Callable[[RunConfig], bool]

_TP, _PP, _CHUNKS = "parallel.tensor_parallel", "parallel.pipeline_parallel", "parallel.chunks"
_CP = "parallel.context_parallel"
_PROCESSES = "cluster.num_processes"
_NEAR = 64  # candidates of a fix: each is tried against all rules
# Numbers that follow from several keys, printed beside a rule like a key.
_DERIVED: dict[str, Callable[[RunConfig], int]] = {
    "processes": processes,
    "data parallel copies": data_parallel,
    "ranks with the same weights": replicas,
}


def split_shares(text: str) -> tuple[float, float, float] | None:
    """`0.98,0.02,0` -> the shares of training, validation and test, or None if it is not that."""
    try:
        train, valid, test = (float(part) for part in text.split(","))
    except ValueError:
        return None
    shares = (train, valid, test)
    return shares if all(math.isfinite(share) and share >= 0 for share in shares) and train > 0 else None


def decay_end(config: RunConfig) -> int:
    """Step at which the learning rate's decay ends."""
    return config.optim.decay_steps or config.train.steps


def _divides(name: str, key: str, divisor: str, when: Condition = lambda c: True) -> Rule:
    def changes(c: RunConfig) -> list[Change]:
        return divisors(c, divisor, value_of(c, key)) + multiples(c, key, value_of(c, divisor))

    return Rule(
        name,
        (key, divisor),
        f"{key} must be a multiple of {divisor}",
        lambda c: not when(c) or value_of(c, key) % value_of(c, divisor) == 0,
        changes,
    )


def _at_most(name: str, small: str, large: str, when: Condition = lambda c: True, also: tuple[str, ...] = ()) -> Rule:
    """`also`: further keys to show."""

    def changes(c: RunConfig) -> list[Change]:
        return [(small, value_of(c, large)), (large, value_of(c, small))]

    return Rule(
        name,
        (small, large, *also),
        f"{small} must not exceed {large}",
        lambda c: not when(c) or value_of(c, small) <= value_of(c, large),
        changes,
    )


def _layout_fits(c: RunConfig) -> bool:
    return processes(c) % c.parallel.ranks_per_sample == 0


def _layout_changes(c: RunConfig) -> list[Change]:
    world, asked = processes(c), multiples(c, _PROCESSES, c.parallel.ranks_per_sample)
    narrower = divisors(c, _TP, world) + divisors(c, _PP, world) + divisors(c, _CP, world)
    if launched_processes():  # their number is given
        return narrower
    return (asked + narrower if c.cluster.num_processes else narrower + asked) + [("cluster.device", "cpu")]


def _stage_changes(c: RunConfig) -> list[Change]:
    layers, stages, chunks = c.model.num_layers, c.parallel.pipeline_parallel, c.parallel.chunks
    fewer_stages = [(_PP, number) for number in range(min(stages, layers // chunks), 0, -1)[:_NEAR]]
    fewer_chunks = [(_CHUNKS, number) for number in range(min(chunks, layers // stages), 0, -1)[:_NEAR]]
    return fewer_stages + fewer_chunks + [("model.num_layers", stages * chunks), (_PP, 1)]


def _divide(a: int, b: int) -> bool:
    """One of the two is a multiple of the other."""
    return max(a, b) % min(a, b) == 0


def _heads_divide(c: RunConfig) -> bool:
    return "head_dim" not in c.model.derived or c.model.hidden_size % c.model.num_heads == 0


def _turns_heads(c: RunConfig) -> bool:
    """Rotary positions turn all of a head; with latent attention a part, whose width has a rule of its own."""
    return c.model.architecture == "llama" and c.model.kv_latent_size == 0


def _head_changes(c: RunConfig) -> list[Change]:
    whole = divisors(c, "model.num_heads", c.model.hidden_size)
    return whole + multiples(c, "model.hidden_size", c.model.num_heads) + [("model.head_dim", c.model.head_dim)]


def _head_dim_changes(c: RunConfig) -> list[Change]:
    return [*divisors(c, "model.num_heads", max(1, c.model.hidden_size // 2)), ("model.head_dim", c.model.head_dim + 1)]


def _batch_changes(c: RunConfig) -> list[Change]:
    copies = data_parallel(c)
    whole = multiples(c, "train.global_batch_size", c.train.micro_batch_size * copies)
    return (
        whole
        + divisors(c, "train.micro_batch_size", max(1, c.train.global_batch_size // copies))
        + [(_PROCESSES, c.parallel.ranks_per_sample)]
    )


def _gpu_changes(c: RunConfig) -> list[Change]:
    size = c.parallel.ranks_per_sample
    fitting = [(_PROCESSES, count) for count in range(count_gpus() // size * size, 0, -size)]
    # One process per GPU is no cure for a layout larger than the GPUs: the layout's own rule would ask for more again.
    return [*fitting, ("cluster.device", "cpu"), *([(_PROCESSES, 0)] if fitting else [])]


def _warmup_changes(c: RunConfig) -> list[Change]:
    end = "optim.decay_steps" if c.optim.decay_steps else "train.steps"
    return [("optim.warmup_steps", decay_end(c) - 1), (end, c.optim.warmup_steps + 1)]


_SHARES = ("data.split", "0.98,0.02,0")
_WORD = re.compile(r"(all|sample)(\d*)")  # in parity.layouts
_ALL_RANKS = 8

RULES: tuple[Rule, ...] = (
    Rule(
        "launched",
        (_PROCESSES, "processes"),
        "torchrun or srun has started another number of processes",
        lambda c: c.cluster.num_processes in (0, launched_processes() or c.cluster.num_processes),
        lambda c: [(_PROCESSES, 0), (_PROCESSES, launched_processes())],
    ),
    Rule(
        "cuda_present",
        ("cluster.device",),
        "this machine has no GPU (or CUDA_VISIBLE_DEVICES hides it)",
        lambda c: c.cluster.device != "cuda" or count_gpus() > 0,
        lambda c: [("cluster.device", "auto"), ("cluster.device", "cpu")],
    ),
    Rule(
        "gpu_each",
        (_PROCESSES, "processes", "cluster.device"),
        "each process on this machine needs a GPU of its own",
        lambda c: launched_processes() > 0 or not uses_cuda(c) or processes(c) <= count_gpus() or count_gpus() == 0,
        _gpu_changes,
    ),
    Rule(
        "layout_fits",
        (_PROCESSES, "processes", _TP, _CP, _PP),
        f"the number of processes must be a multiple of {_TP} x {_CP} x {_PP}",
        _layout_fits,
        _layout_changes,
    ),
    _divides("kv_heads_per_head", "model.num_heads", "model.num_kv_heads"),
    Rule(
        "hidden_per_head",
        ("model.hidden_size", "model.num_heads"),
        "model.hidden_size must be a multiple of model.num_heads, unless model.head_dim is given",
        _heads_divide,
        _head_changes,
    ),
    Rule(
        "rope_even",
        ("model.head_dim", "model.hidden_size", "model.num_heads"),
        "model.head_dim must be even: RoPE turns pairs of numbers",
        lambda c: not _turns_heads(c) or c.model.head_dim % 2 == 0 or not _heads_divide(c),
        _head_dim_changes,
    ),
    _divides("heads_per_rank", "model.num_heads", _TP),
    Rule(
        "kv_heads_per_rank",
        ("model.num_kv_heads", _TP),
        f"model.num_kv_heads must be a multiple of {_TP}, or divide it: then ranks share a head",
        lambda c: "num_kv_heads" in c.model.derived or _divide(c.model.num_kv_heads, c.parallel.tensor_parallel),
        lambda c: divisors(c, _TP, c.model.num_kv_heads) + divisors(c, "model.num_kv_heads", c.model.num_heads),
    ),
    _divides("ffn_per_rank", "model.ffn_size", _TP),
    _divides("sequence_per_rank", "data.seq_length", _TP, when=lambda c: c.parallel.sequence_parallel),
    needs(
        "sequence_parallel_used",
        "parallel.sequence_parallel",
        False,
        _TP,
        lambda c: c.parallel.tensor_parallel > 1,
        (_TP, 2),
        f"parallel.sequence_parallel has no effect with {_TP}=1",
    ),
    Rule(
        "layer_per_chunk",
        ("model.num_layers", _PP, _CHUNKS),
        f"{_PP} x {_CHUNKS} must not exceed model.num_layers: every chunk needs a layer",
        lambda c: stage_split.num_stages(c) <= c.model.num_layers or bool(explicit_split(c.parallel.stage_split)),
        _stage_changes,
    ),
    *stage_split.RULES,
    *schedule_rules.RULES,
    *zero_rules.RULES,
    *kernel_rules.RULES,
    *context_rules.RULES,
    *latent_rules.RULES,
    *expert_rules.RULES,
    *memory_rules.RULES,
    *slurm_rules.RULES,
    *fold_rules.RULES,
    Rule(
        "batch_divides",
        ("train.global_batch_size", "train.micro_batch_size", "data parallel copies"),
        "train.global_batch_size must be a multiple of train.micro_batch_size x data parallel copies",
        lambda c: c.train.global_batch_size % (c.train.micro_batch_size * data_parallel(c)) == 0,
        _batch_changes,
    ),
    _at_most("sequence_fits", "data.seq_length", "model.max_seq_length"),
    Rule(
        "split_shares",
        ("data.split",),
        "data.split is three shares >= 0, joined by commas: training (> 0), validation, test",
        lambda c: split_shares(c.data.split) is not None,
        lambda c: [_SHARES],
    ),
    Rule(
        "eval_has_data",
        ("train.eval_every", "data.split"),
        "evaluation needs a validation share > 0, the second number of data.split",
        lambda c: c.train.eval_every == 0 or c.data.fold >= 0 or (split_shares(c.data.split) or (1, 1, 0))[1] > 0,
        lambda c: [_SHARES, ("train.eval_every", 0)],
    ),
    needs(
        "patience_used",
        "train.patience",
        0,
        "train.eval_every",
        lambda c: c.train.eval_every > 0,
        ("train.eval_every", 100),
        "train.patience counts evaluations: it has no effect with train.eval_every=0",
    ),
    needs(
        "recompute_every_used",
        "train.recompute_every",
        1,
        "train.recompute",
        lambda c: c.train.recompute != "none",
        ("train.recompute", "full"),
        "train.recompute_every has no effect with train.recompute=none",
    ),
    Rule(
        "trace_name",
        ("train.trace",),
        "train.trace is a file that ends in .json: the picture beside it ends in .svg",
        lambda c: not c.train.trace or c.train.trace.endswith(".json"),
        lambda c: [("train.trace", f"{c.train.trace}.json"), ("train.trace", "")],
    ),
    _at_most("trace_reached", "train.trace_step", "train.steps", lambda c: bool(c.train.trace), also=("train.trace",)),
    _at_most("ledger_reached", "train.ledger_step", "train.steps"),
    needs(
        "record_step_used",
        "train.record_step",
        1,
        "train.record",
        lambda c: bool(c.train.record),
        ("train.record", "runs/record"),
        "train.record_step has no effect without train.record",
    ),
    _at_most("record_step_runs", "train.record_step", "train.steps", lambda c: bool(c.train.record)),
    _at_most("lr_order", "optim.min_lr", "optim.lr"),
    Rule(
        "warmup_ends",
        ("optim.warmup_steps", "optim.decay_steps", "train.steps"),
        "optim.warmup_steps must be below the end of the decay (optim.decay_steps, or train.steps where that is 0)",
        lambda c: c.optim.warmup_steps < decay_end(c),
        _warmup_changes,
    ),
    needs(
        "wsd_used",
        "optim.wsd_decay_steps",
        0,
        "optim.schedule",
        lambda c: c.optim.schedule == "wsd",
        ("optim.schedule", "wsd"),
        "optim.wsd_decay_steps has an effect with optim.schedule=wsd only",
    ),
    Rule(
        "wsd_fits",
        ("optim.wsd_decay_steps", "optim.warmup_steps", "optim.decay_steps", "train.steps"),
        "optim.wsd_decay_steps must fit between the warm-up and the end of the decay",
        lambda c: c.optim.schedule != "wsd" or c.optim.wsd_decay_steps <= max(0, decay_end(c) - c.optim.warmup_steps),
        lambda c: [("optim.wsd_decay_steps", max(0, decay_end(c) - c.optim.warmup_steps))],
    ),
)


def validate(config: RunConfig | PipelineRun) -> list[Problem]:
    """Problems of all broken rules, each with its fix. All fixes together, not only each alone, make the rules hold."""
    if isinstance(config, PipelineRun):
        return _broken(RunConfig(parallel=config.parallel), schedule_rules.RULES) + schedule_rules.picture_problems(config)
    return _validate_layouts(config) if isinstance(config, ParityRun) else _broken(config, RULES)


def _broken(config: RunConfig, rules: tuple[Rule, ...]) -> list[Problem]:
    cure_of = plan(rules, config)
    return [_problem(rule, config, cure_of.get(rule.name)) for rule in broken(rules, config)]


def check(config: RunConfig) -> None:
    """Raises ConfigError with all problems."""
    if problems := validate(config):
        raise ConfigError(*problems)


def _problem(rule: Rule, config: RunConfig, cure: Change | None) -> Problem:
    here = ", ".join(f"{key} = {_shown(config, key)}" for key in rule.keys[1:])
    allowed = ""
    if cure is not None:
        values = [change[1] for change in cures(rule, config) if change[0] == cure[0]] + [cure[1]]
        nearest = [value for i, value in enumerate(values) if value not in values[:i]][:5]  # a list has no hash
        allowed = f"{cure[0]}: {', '.join(map(str, sorted(nearest)))}" if len(nearest) > 1 else ""
    text = f"{rule.text} (here {here})" if here else rule.text
    fix = fields.assign(*cure) if cure else ""
    if rule.name == "layout_fits" and launched_processes():
        text += f"; {processes(config)} were started, this layout needs a multiple of {config.parallel.ranks_per_sample}"
        fix = fix or " ".join(f"{key}=1" for key in (_TP, _CP, _PP) if value_of(config, key) > 1)
    return Problem(rule.keys[0], value_of(config, rule.keys[0]), text, allowed, fix)


def _shown(config: RunConfig, key: str) -> object:
    return _DERIVED[key](config) if key in _DERIVED else value_of(config, key)


def _validate_layouts(config: ParityRun) -> list[Problem]:
    """Parity runs one config on many layouts: the rules for one rank first, then (with their cures) each layout's."""
    models = [model for model in config.parity.models if model in ARCHITECTURES] or [config.model.architecture]
    problems, faults = _parity_problems(config), dict[str, str]()
    for model in models:
        single = _one_rank(with_model(config, model) if config.parity.models else config)
        problems += [problem for problem in validate(single) if problem not in problems]
        for cure in plan(RULES, single).values():
            single = with_value(single, *cure)
        names = [name for name in config.parity.layouts if not _WORD.fullmatch(name)]
        faults |= {name: fault for name in names if (fault := _layout_fault(single, name))}
    good = [name for name in config.parity.layouts if name not in faults] or ["single"]
    fix = fields.assign("parity.layouts", good)
    return problems + [Problem("parity.layouts", name, fault, fix=fix) for name, fault in faults.items()]


def expand_layouts(config: ParityRun) -> list[str]:
    """The layouts of a parity run, with `all`, `all4` and `sample` replaced by what the rules allow for its model."""
    single, names = _one_rank(config), list[str]()
    for name in config.parity.layouts:
        word = _WORD.fullmatch(name)
        if word is None:
            names.append(name)
            continue
        legal = [n for n in candidate_layouts(int(word[2] or _ALL_RANKS)) if not _layout_fault(single, n)]
        names += legal if word[1] == "all" else sample_layouts(legal)
    return list(dict.fromkeys(names))


def _one_rank(config: ParityRun) -> RunConfig:
    sections = {field.name: getattr(config, field.name) for field, _ in fields.fields_of(RunConfig)}
    return with_layout(RunConfig(**sections), "single")


def _parity_problems(config: ParityRun) -> list[Problem]:
    """What is wrong with the section itself."""
    problems = []
    if unknown := [model for model in config.parity.models if model not in ARCHITECTURES]:
        fix = fields.assign("parity.models", [model for model in config.parity.models if model in ARCHITECTURES])
        rule = "no such architecture"
        problems.append(Problem("parity.models", unknown[0], rule, ", ".join(ARCHITECTURES), fix))
    files = config.parity.report.split(",") if config.parity.report else []
    if any(not file.strip().endswith((".html", ".md")) for file in files):
        rule = "a report is FILE.html or FILE.md, or both, joined by a comma"
        problems.append(Problem("parity.report", config.parity.report, rule, "", fields.assign("parity.report", "parity.html")))
    return problems


def _layout_fault(single: RunConfig, name: str) -> str:
    """What keeps the layout from running; empty if nothing."""
    try:
        return "; ".join(problem.rule for problem in validate(with_layout(single, name)))
    except ValueError as error:
        return str(error)
