"""What a benchmark of kernels reports: rows, a table, a JSON file and a picture per operation.

The JSON file is one object:

    label       "" on a GPU, "cpu smoke, not a speed claim" on a CPU
    date        of the start, ISO 8601, UTC
    commit      of the checkout, with a + where files differ from it; "unknown" outside one
    machine     gpu, multiprocessors, l2_bytes, memory_bytes, capability (GPU only); processor, cores
    versions    python, torch, triton, cuda and each peer; "not installed" where one is not
    quick       whether few sizes were measured
    ceilings    copy_gb_per_second (bytes read plus bytes written), gemm_tflops (bf16, random data), measured first, in the
                same process; copy_bytes and gemm_size, of what
    absent      [{operation, provider, reason}]: who could not be measured, because not installed or without a GPU
    rows        one object per operation, shape, dtype, provider and direction:
        operation, shape, dtype, provider
        direction           forward; backward: alone; full: both, one after the other. Updates in place have forward only
        status, reason      ok, or failed and why; then all numbers below are null
        ms_p20, ms_p50, ms_p80   milliseconds on the device, with a cold L2, without what the host needs to launch
        host_us             microseconds that the host needs for one call; where above ms_p50, a launch costs more than it does
        bytes, flops        the least that must be moved and computed, from the shapes, the same for every provider
        bound               the ceiling that counts: bytes or flops
        gb_per_second, tflops    bytes and flops over ms_p50
        percent_of_ceiling  of the measured copy rate, or of the measured matrix product
        ratio_to_best_peer  ms_p50 of the fastest other provider over this one's; above 1: this one is the fastest. Variants
                            of ours are no peers of each other
        error               distance from fp64, |x - exact| / |exact|, the worst output (forward) or gradient (backward, full)
        peak_memory_bytes   most memory in forward and backward beyond the inputs
        changes_inputs      whether it overwrote what it was given, where the operation is not an update in place
        size, group         where the picture has lines over sizes: how far along, and in which panel; else 0 and empty
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

OURS = "triton"  # and its variants, "triton NAME"
CPU_LABEL = "cpu smoke, not a speed claim"
_PACKAGES = ("torch", "triton", "liger-kernel", "deepspeed", "apex", "flash-attn")


@dataclass(frozen=True)
class Ceilings:
    """What this machine can do at the most, measured."""

    copy_gb_per_second: float
    gemm_tflops: float
    copy_bytes: int
    gemm_size: int


@dataclass(frozen=True)
class Row:
    """One measurement; the fields are described above."""

    operation: str
    shape: str
    dtype: str
    provider: str
    direction: str
    bound: str
    bytes: int
    flops: int
    status: str = "ok"
    reason: str = ""
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    host_us: float | None = None
    gb_per_second: float | None = None
    tflops: float | None = None
    percent_of_ceiling: float | None = None
    ratio_to_best_peer: float | None = None
    error: float | None = None
    peak_memory_bytes: int | None = None
    changes_inputs: bool | None = None
    size: int = 0
    group: str = ""

    @property
    def subject(self) -> tuple[str, str, str, str]:
        """What the providers compete in."""
        return self.operation, self.shape, self.dtype, self.direction


def is_ours(provider: str) -> bool:
    return provider.split(" ")[0] == OURS


def complete(rows: Sequence[Row], ceilings: Ceilings) -> list[Row]:
    """Rates, percentages and ratios, from the times of all rows."""
    return [_complete(row, rows, ceilings) if row.ms_p50 else row for row in rows]


def _complete(row: Row, rows: Sequence[Row], ceilings: Ceilings) -> Row:
    assert row.ms_p50
    rate, tflops = row.bytes / row.ms_p50 / 1e6, row.flops / row.ms_p50 / 1e9
    share = tflops / ceilings.gemm_tflops if row.bound == "flops" else rate / ceilings.copy_gb_per_second
    rivals = (other for other in rows if other.subject == row.subject and other.provider != row.provider)
    others = [other.ms_p50 for other in rivals if other.ms_p50 and not (is_ours(other.provider) and is_ours(row.provider))]
    ratio = min(others) / row.ms_p50 if others else None
    return replace(row, gb_per_second=rate, tflops=tflops, percent_of_ceiling=100 * share, ratio_to_best_peer=ratio)


def circumstances(ceilings: Ceilings, device: torch.device, quick: bool, commit: str = "") -> dict[str, Any]:
    """What goes into the JSON file before the first row. commit: empty: that of the checkout."""
    return {
        "label": CPU_LABEL if device.type == "cpu" else "",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or describe_commit(Path(__file__).resolve().parent),
        "machine": describe_machine(device),
        "versions": describe_versions(),
        "quick": quick,
        "ceilings": asdict(ceilings),
    }


def results(rows: Iterable[Row], ceilings: Ceilings) -> dict[str, Any]:
    """What goes into the JSON file at the end."""
    found = list(rows)
    absent = dict.fromkeys((row.operation, row.provider, row.reason) for row in found if row.status == "absent")
    return {
        "absent": [dict(zip(("operation", "provider", "reason"), gap, strict=True)) for gap in absent],
        "rows": [asdict(row) for row in complete([row for row in found if row.status != "absent"], ceilings)],
    }


def describe_processor() -> dict[str, Any]:
    """Its name, and the cores that this process may use."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    model = next((text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")), platform.machine())
    return {"processor": model, "cores": len(os.sched_getaffinity(0))}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The GPU, if it is one, and the processor."""
    found = describe_processor()
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {"gpu": gpu.name, "multiprocessors": gpu.multi_processor_count, "memory_bytes": gpu.total_memory}
        found |= {"l2_bytes": getattr(gpu, "L2_cache_size", None), "capability": f"{gpu.major}.{gpu.minor}"}
    return found


def describe_versions() -> dict[str, str]:
    """Of Python, CUDA, torch, triton and the peers."""
    return {"python": platform.python_version(), "cuda": torch.version.cuda or "none", **versions_of(_PACKAGES)}


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Of installed distributions; `not installed` for the others."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe_commit(folder: Path) -> str:
    """The commit of the checkout that `folder` lies in, with a + where files differ from it; else `unknown`."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# --- for people -------------------------------------------------------------------------------------------------------


def headline() -> str:
    """What stands above the lines of the table."""
    return (
        f"{'operation':<21} {'shape':<26} {'dtype':<9} {'direction':<9} {'provider':<16} {'p50 ms':>9} {'p20-p80':>15} "
        f"{'host us':>8} {'GB/s':>7} {'TFLOP/s':>8} {'% top':>6} {'x best':>6} {'error':>8} {'MiB':>8}"
    )


def line(row: Row) -> str:
    """One row of the table."""
    start = f"{row.operation:<21} {row.shape:<26} {row.dtype:<9} {row.direction:<9} {row.provider:<16} "
    if row.status != "ok" or row.ms_p50 is None:
        return f"{start}{row.status}: {row.reason}"
    memory = _number(row.peak_memory_bytes / 2**20 if row.peak_memory_bytes is not None else None, "8.0f")
    note = "  overwrites its inputs" if row.changes_inputs else ""
    return (
        f"{start}{row.ms_p50:>9.4f} {f'{row.ms_p20:.4f}-{row.ms_p80:.4f}':>15} {_number(row.host_us, '8.1f')} "
        f"{_number(row.gb_per_second, '7.0f')} {_number(row.tflops or None, '8.1f')} {_number(row.percent_of_ceiling, '6.1f')} "
        f"{_number(row.ratio_to_best_peer, '6.2f')} {_number(row.error, '8.1e')} {memory}{note}"
    )


def _number(value: float | None, form: str) -> str:
    return " " * int(form.split(".")[0]) if value is None else format(value, form)


def summary(found: dict[str, Any]) -> list[str]:
    """What stands below the table."""
    top, machine, rows = found["ceilings"], found["machine"], found["rows"]
    failed = sum(row["status"] == "failed" for row in rows)
    lines = [
        f"{machine.get('gpu', machine['processor'])}; " + ", ".join(f"{k} {v}" for k, v in found["versions"].items()),
        f"commit {found['commit']}; copy {top['copy_gb_per_second']:.0f} GB/s, matrix product {top['gemm_tflops']:.3g} TFLOP/s",
        *_gaps(found["absent"]),
        f"{failed} of {len(rows)} measurements failed" if rows else "nothing was measured",
    ]
    return [f"({found['label']})", *lines] if found["label"] else lines


def _gaps(absent: Sequence[dict[str, str]]) -> list[str]:
    """Who was not measured and why, in one line."""
    why: dict[str, dict[str, None]] = {}  # in the order in which they were found
    for gap in absent:
        why.setdefault(gap["reason"], {})[gap["provider"]] = None
    return ["absent: " + "; ".join(f"{', '.join(names)} ({reason})" for reason, names in why.items())] if why else []


def write(found: dict[str, Any], folder: Path) -> Path:
    """The JSON file: FOLDER/kernels-DATE.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"kernels-{found['date'].replace(':', '').removesuffix('+0000')}.json"
    path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def draw(found: dict[str, Any], folder: Path) -> list[Path]:
    """A picture per operation, FOLDER/OPERATION.png, the ceiling as a line: a bar per provider and shape, or lines over sizes.

    Empty where matplotlib is not installed; none of an operation that nobody could run.
    """
    if not _can_draw():
        return []
    rows = [row for row in (Row(**row) for row in found["rows"]) if row.status == "ok"]
    paths = []
    for operation in dict.fromkeys(row.operation for row in rows):
        path = folder / f"{operation}.png"
        mine = [row for row in rows if row.operation == operation]
        _draw(mine, found, path, _lines if all(row.size for row in mine) else _bars)
        paths.append(path)
    return paths


def describe_pictures(paths: Sequence[Path], folder: Path) -> str:
    """What `draw` has drawn, or why nothing."""
    if paths:
        return f"{len(paths)} picture{'s' if len(paths) > 1 else ''} in {folder}"
    return f"no pictures: {'no measurement succeeded' if _can_draw() else 'matplotlib is not installed'}"


def _can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _draw(rows: Sequence[Row], found: dict[str, Any], path: Path, fill: Callable[[Any, Sequence[Row], list[str]], None]) -> None:
    """A panel per group and direction; `fill` draws the rows of one. Bars need the width: theirs stand below each other."""
    from matplotlib.figure import Figure

    directions, groups = (list(dict.fromkeys(getattr(row, of) for row in rows)) for of in ("direction", "group"))
    providers = list(dict.fromkeys(row.provider for row in rows))
    flops = any(row.bound == "flops" for row in rows)
    ceiling = found["ceilings"]["gemm_tflops" if flops else "copy_gb_per_second"]
    columns = 1 if fill is _bars else len(directions)
    subjects = list(itertools.product(groups, directions))
    height = len(subjects) // columns
    figure = Figure(figsize=(10 if columns == 1 else 1 + 4.2 * columns, 0.8 + 3.2 * height), layout="constrained")
    panels = list(figure.subplots(height, columns, squeeze=False).flat)
    for panel, (group, direction) in zip(panels, subjects, strict=True):
        fill(panel, [row for row in rows if (row.group, row.direction) == (group, direction)], providers)
        panel.axhline(ceiling, color="black", linewidth=1, linestyle="--", label="measured ceiling")
        panel.set_ylim(bottom=0)
        panel.set_ylabel("TFLOP/s" if flops else "GB/s")
        panel.set_title(f"{group}\n{direction}" if group else f"{rows[0].operation}, {direction}", fontsize=10)
    figure.legend(*_legend(panels), fontsize=8, ncols=min(6, len(providers) + 1), loc="outside lower center")
    title = (found["machine"].get("gpu", "CPU"), rows[0].operation, found["label"])
    figure.suptitle(" - ".join(part for part in title if part), fontsize=11)
    figure.savefig(path, dpi=100)


def _legend(panels: Iterable[Any]) -> tuple[list[Any], list[str]]:
    """Every label once: not every provider is in every panel."""
    known = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    return list(known.values()), list(known)


def _rate(row: Row) -> float:
    return (row.tflops if row.bound == "flops" else row.gb_per_second) or 0.0


def _bars(panel: Any, rows: Sequence[Row], providers: list[str]) -> None:
    """Beside each other for each shape."""
    places = {label: i for i, label in enumerate(dict.fromkeys(f"{row.shape}\n{row.dtype}" for row in rows))}
    width = 0.8 / max(1, len(providers))
    for i, provider in enumerate(providers):
        mine = [row for row in rows if row.provider == provider]
        x = [places[f"{row.shape}\n{row.dtype}"] + (i - (len(providers) - 1) / 2) * width for row in mine]
        panel.bar(x, [_rate(row) for row in mine], width, color=_colour(i), label=provider)
    panel.set_xticks(list(places.values()), list(places), fontsize=8)


def _lines(panel: Any, rows: Sequence[Row], providers: list[str]) -> None:
    """One per provider over sizes that double; ours are thick."""
    for i, provider in enumerate(providers):
        mine = sorted((row for row in rows if row.provider == provider), key=lambda row: row.size)
        if mine:
            x, y = [row.size for row in mine], [_rate(row) for row in mine]
            width = 2.4 if is_ours(provider) else 1.2
            panel.plot(x, y, marker="o", markersize=4, linewidth=width, color=_colour(i), label=provider)
    sizes = sorted({row.size for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
    panel.minorticks_off()


def _colour(number: int) -> str:
    return f"C{number}"  # of matplotlib's ten
