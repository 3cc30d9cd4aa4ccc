"""The table of `megalm parity`: on the terminal, as Markdown, and as one HTML file with cells coloured by tolerance."""

from __future__ import annotations

import html
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from megalm.config.machine import count_gpus, uses_cuda
from megalm.config.run import ParityRun
from megalm.errors import writing
from megalm.train.comparison import Comparison

COLUMNS = ("layout", "ranks", "initial", "loss", "norm", "weights", "key bias", "seconds", "verdict")
_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
th, td { padding: 2px 10px; border: 1px solid #ddd; text-align: right }
td:first-child, th:first-child, td:last-child { text-align: left }
.exact { background: #e3f4e3 } .near { background: #f2f8e0 } .close { background: #fff3c8 } .over { background: #f8c9c4 }
"""


@dataclass(frozen=True)
class Table:
    """One model's rows, the reference first."""

    model: str
    results: list[Comparison]


def header(width: int) -> str:
    """The terminal table's first line; layouts are `width` wide."""
    return _line(COLUMNS, width)


def row(result: Comparison, width: int) -> str:
    """A line of the terminal table."""
    return _line(cells(result), width)


def _line(texts: Sequence[str], width: int) -> str:
    layout, *middle, verdict = texts
    sizes = (6, 9, 10, 10, 10, 10, 9)
    return f"{layout:<{width}}" + "".join(f"{text:>{size}}" for text, size in zip(middle, sizes, strict=True)) + f"  {verdict}"


def cells(result: Comparison) -> list[str]:
    """A result as text, in the order of COLUMNS."""
    if not result.compared:
        numbers = ["-"] * 5
    else:
        measured = (result.loss, result.norm, result.weight, result.zero_gradient)
        numbers = ["equal" if result.initial_equal else "DIFFERS", *(f"{number:.1e}" for number in measured)]
    return [result.layout, str(result.ranks), *numbers, f"{result.seconds:.1f}", result.verdict]


def write_report(files: Sequence[str], tables: list[Table], config: ParityRun, command: str, seconds: float) -> None:
    """Write each file in the form that its suffix names: .md or .html."""
    facts = about(tables, config, command, seconds)
    for file in files:
        path = Path(file.strip())
        text = as_markdown(tables, facts) if path.suffix == ".md" else as_html(tables, facts, config)
        with writing(path, "parity.report"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def about(tables: list[Table], config: ParityRun, command: str, seconds: float) -> list[tuple[str, str]]:
    """What the numbers come from: (what, value)."""
    count = sum(len(table.results) - 1 for table in tables)
    equal = sum(result.verdict == "equal" for table in tables for result in table.results)
    device = f"{count_gpus()} GPUs" if uses_cuda(config) else f"{len(os.sched_getaffinity(0))} CPU cores, gloo"
    model, tolerance = config.model, config.parity
    return [
        ("result", f"{equal} of {count} layouts equal one rank"),
        ("command", command),
        ("run", f"{tolerance.steps} steps of {config.train.global_batch_size} samples of {config.data.seq_length} tokens in "
         f"microbatches of {config.train.micro_batch_size}; {config.train.precision}, clip {config.optim.clip:g}, weight decay "
         f"{config.optim.weight_decay:g}, dropout {model.dropout:g}; {model.num_layers} layers of {model.hidden_size}"),
        ("tolerances", f"initial weights: equal to the bit; loss {tolerance.loss_tolerance:.0e}; gradient norm "
         f"{tolerance.norm_tolerance:.0e}, relative; final weights {tolerance.weight_tolerance:.0e}; key bias: not judged"),
        ("machine", f"{device}, {platform.machine()}, {platform.system()}"),
        ("versions", f"megalm {version('megalm')}, Python {platform.python_version()}, torch {version('torch')}, "
         f"DeepSpeed {version('deepspeed')}"),
        ("date", f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC; it took {seconds:,.0f} s"),
    ]  # fmt: skip


def as_markdown(tables: list[Table], facts: list[tuple[str, str]]) -> str:
    """A page to commit."""
    lines = ["# Parity", "", "Written by the command below; do not edit. What the columns mean: [numerics](numerics.md).", ""]
    lines += [f"- {what}: `{value}`" if what == "command" else f"- {what}: {value}" for what, value in facts]
    for table in tables:
        lines += ["", f"## {table.model}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += ["| `{}` | {} |".format(first, " | ".join(rest)) for first, *rest in map(cells, table.results)]
        lines += _faults_as_list(table, "- `{}`: {}")
    return "\n".join(lines) + "\n"


def as_html(tables: list[Table], facts: list[tuple[str, str]], config: ParityRun) -> str:
    """One file without anything from outside."""
    parts = [f"<!doctype html><meta charset=utf-8><title>megalm parity</title><style>{_STYLE}</style><h1>megalm parity</h1>"]
    parts += ["<table>", *(f"<tr><th>{what}<td>{html.escape(value)}" for what, value in facts), "</table>"]
    for table in tables:
        parts += [f"<h2>{html.escape(table.model)}</h2><table><tr>", *(f"<th>{column}" for column in COLUMNS)]
        for result in table.results:
            colours = colours_of(result, config)
            parts.append("<tr>" + "".join(
                f'<td class="{colour}">{html.escape(text)}' for text, colour in zip(cells(result), colours, strict=True)
            ))  # fmt: skip
        parts += ["</table>", *_faults_as_list(table, "<p><b>{}</b>: {}", html.escape)]
    return "\n".join(parts) + "\n"


def colours_of(result: Comparison, config: ParityRun) -> list[str]:
    """A class for each cell: how much of its tolerance a difference takes up."""
    if not result.compared:
        return [""] * (len(COLUMNS) - 1) + ["over" if result.faults else ""]
    limits = config.parity.loss_tolerance, config.parity.norm_tolerance, config.parity.weight_tolerance
    shares = [value / limit for value, limit in zip((result.loss, result.norm, result.weight), limits, strict=True)]
    initial = "exact" if result.initial_equal else "over"
    return ["", "", initial, *map(_colour, shares), "", "", "over" if result.faults else "exact"]


def _colour(share: float) -> str:
    """Of a difference that is `share` of its tolerance; NaN is over."""
    return "exact" if share == 0 else "near" if share <= 0.1 else "close" if share <= 1 else "over"


def _faults_as_list(table: Table, form: str, escape: object = str) -> list[str]:
    return [form.format(r.layout, escape("; ".join(r.faults))) for r in table.results if r.faults]  # type: ignore[operator]
