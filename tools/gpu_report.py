"""Collect what tools/gpu_round.sh measured into one JSON file and a table: `python tools/gpu_report.py OUT`.

Reads what the steps left in OUT; writes OUT/results/GPU/DATE.json, DATE.md beside it and the pictures in DATE/; with --table
also the rows of attention into the table that `kernels.attention=auto` reads, over those of the same problems. The JSON holds
`machine`, `versions` and `ceilings` of the first benchmark, `date`, `commit`, `steps` ({name: ok, failed}, of those that were
run), `tests` ({step: counts}), `cache`, `parity`, `step` as their tools wrote them (null: not run), and `rows`, those of all
benchmarks (their schema: kernels/benchmarks/report.py). exit 1: nothing was measured.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalm_kernels.attention import choice
from megalm_kernels.benchmarks import report
from megalm_kernels.benchmarks.attention import read_shape

ONES = ("cache", "parity", "step")


def read_tests(out: Path) -> dict[str, dict[str, int]] | None:
    """Counts of pytest's own reports, by step."""
    suites = {file.stem: next(ET.parse(file).getroot().iter("testsuite")) for file in sorted(out.glob("tests-*.xml"))}
    counted = ("tests", "failures", "errors", "skipped")
    return {step: {name: int(suite.get(name, "0")) for name in counted} for step, suite in suites.items()} or None


def read_states(out: Path) -> dict[str, str]:
    """{step: state}, from the lines "STEP STATE" that the round has written; the last one of a step counts."""
    file = out / "steps.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return dict(line.split(" ", 1) for line in lines)


def collect(out: Path, commit: str) -> dict[str, Any]:
    """Everything in one object. Raises FileNotFoundError where no benchmark was run."""
    benches = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("bench-*/*.json"))]
    if not benches:
        raise FileNotFoundError(f"{out} has no results of a benchmark (bench-*/*.json)")
    latest: dict[tuple[str, ...], dict[str, Any]] = {}  # a step that was run again counts once
    for row in sorted(((b["date"], row) for b in benches for row in b["rows"]), key=lambda pair: pair[0]):
        latest[tuple(row[1][key] for key in ("operation", "shape", "dtype", "provider", "direction"))] = row[1]
    parts = {name: json.loads((out / f"{name}.json").read_text()) if (out / f"{name}.json").is_file() else None for name in ONES}
    first = benches[0]
    return {
        **{key: first[key] for key in ("label", "date", "machine", "versions", "ceilings")},
        "commit": commit,
        "steps": read_states(out),
        "tests": read_tests(out),
        **parts,
        "absent": [gap for bench in benches for gap in bench["absent"]],
        "rows": list(latest.values()),
    }


def table(found: dict[str, Any]) -> str:
    """All of it in Markdown."""
    top = found["ceilings"]
    lines = [
        f"# {found['machine'].get('gpu', 'CPU')}, {found['date'][:10]}",
        "",
        *([f"**{found['label']}**", ""] if found["label"] else []),
        f"Commit {found['commit']}; " + ", ".join(f"{name} {version}" for name, version in found["versions"].items()) + ".",
        f"Measured ceilings: copy {top['copy_gb_per_second']:.0f} GB/s, matrix product {top['gemm_tflops']:.4g} TFLOP/s.",
        "Steps: " + (", ".join(f"{name} {state}" for name, state in found["steps"].items()) or "not recorded") + ".",
        "",
        *_claims(found),
        "",
        "| operation | shape | dtype | direction | provider | p50 ms | p20 - p80 | host us | GB/s | TFLOP/s | % of ceiling "
        "| x best peer | error | MiB |",
        "| --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(_line(row) for row in found["rows"]),
        "",
        *sorted({f"- absent: {gap['provider']}: {gap['reason']}" for gap in found["absent"]}),
    ]
    return "\n".join(lines) + "\n"


def _claims(found: dict[str, Any]) -> list[str]:
    tests, cache, parity, step = (found[name] for name in ("tests", "cache", "parity", "step"))
    lines = []
    for suite, counts in (tests or {}).items():
        lines.append(f"- {suite}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    if cache:
        late = "nothing was launched" if cache["missed"] is None else f"{len(cache['missed'])} at the launch"
        lines.append(f"- cache: {cache['compiled']} kernels compiled before, {late}")
    if parity:
        apart = parity["largest_relative_difference"]
        lines.append(f"- parity: {parity['problem'] or 'the same'}, largest relative difference {apart:.3g}")
    for side in step["sides"] if step else []:
        share = f"{side['mfu_of_measured_product']:.1%} of the measured product"
        share += f", {side['mfu_of_data_sheet']:.1%} of the data sheet" if side["mfu_of_data_sheet"] else ""
        memory = f"{side['peak_memory_bytes'] / 2**30:.1f} GiB"
        rate = f"{side['tokens_per_second']:,.0f} tokens/s"
        lines.append(f"- step of {side['parameters'] / 1e9:.2f} B, {side['backend']}: {rate}, MFU {share}, {memory}")
    return [*lines, *(f"- step, {side['backend']}: failed" for side in (step["failed"] if step else []))]


def _line(row: dict[str, Any]) -> str:
    start = " | ".join(str(row[key]) for key in ("operation", "shape", "dtype", "direction", "provider"))
    if row["status"] != "ok":
        return f"| {start} | {row['status']}: {row['reason'].replace('|', '/')} |" + " |" * 8
    memory = row["peak_memory_bytes"]
    cells = [
        f"{row['ms_p50']:.4f}",
        f"{row['ms_p20']:.4f} - {row['ms_p80']:.4f}",
        *(_cell(row[key], form) for key, form in (("host_us", ".1f"), ("gb_per_second", ".0f"))),
        _cell(row["tflops"] or None, ".1f"),
        *(_cell(row[key], form) for key, form in (("percent_of_ceiling", ".1f"), ("ratio_to_best_peer", ".2f"))),
        _cell(row["error"], ".1e"),
        _cell(memory / 2**20 if memory is not None else None, ".0f"),
    ]
    return f"| {start} | {' | '.join(cells)} |"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def publish(files: list[Path], folder: Path) -> str:
    """Copy the results to where they are committed. What was done, or why it could not be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        copies = [str(shutil.copy(file, folder)) for file in files]
    except OSError as error:
        return f"not in the checkout: {error}"
    return f"to be committed: {' and '.join(copies)}"


def update_table(file: Path, found: dict[str, Any]) -> str:
    """Put what was measured of attention into the table of attention/choice.py. What was done."""
    if found["label"]:
        return f"{file} stays as it is: {found['label']}"
    rows = choice.rows_from(found, read_shape)
    old = [row for row in choice.read(file) if _problem(row) not in set(map(_problem, rows))]
    choice.write(file, [*old, *rows])
    return f"{file}: {len(rows)} new rows, {len(old)} kept"


def _problem(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("gpu", "torch", "triton", "head_dim", "causal", "seq_length", "direction"))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("out", type=Path)
    parser.add_argument("--commit", default="", help="default: of the checkout that this file lies in")
    parser.add_argument("--publish", type=Path, metavar="FOLDER", help="put both files into FOLDER/GPU as well")
    parser.add_argument("--table", type=Path, metavar="FILE", help="attention's measured.json, to be brought up to date")
    options = parser.parse_args(arguments)
    try:
        found = collect(options.out, options.commit or report.describe_commit(Path(__file__).resolve().parent))
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    gpu = re.sub(r"[^a-z0-9]+", "-", found["machine"].get("gpu", "cpu").lower()).strip("-")
    folder, date = options.out / "results" / gpu, found["date"][:10]
    (folder / date).mkdir(parents=True, exist_ok=True)
    (folder / f"{date}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / f"{date}.md").write_text(table(found), encoding="utf-8")
    report.draw(found, folder / date)  # anew: steps share operations
    print(f"{folder}/{date}.json and .md: {len(found['rows'])} rows")
    if options.publish:
        print(publish([folder / f"{date}.json", folder / f"{date}.md"], options.publish / gpu))
    if options.table:
        print(update_table(options.table, found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
