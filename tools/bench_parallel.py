"""Measure what parallel training costs, as ratios of one run: `python tools/bench_parallel.py [--sections ...] [--json FILE]`.

    peer       a step of tp2, pp2 and dp2 against megatron-core doing the same, in two processes each
    zero       a step with DeepSpeed's ZeRO-1 against zero=0, in one process each
    executor   CPU seconds of the pipeline executor itself per action, without those of torch and of the transfers
    schedules  CPU seconds of action list and validator of every schedule, for 64 stages and 512 microbatches
    switches   a step with parallel.overlap and kernels.fuse_projections against one without
    context    a step of cp2_ring and cp2_ulysses against tp2, with 4,096 tokens in a sample
    experts    forward and backward of a block's MLP of experts against a dense one with as many FLOPs per token

Both sides of a ratio are built first and then take turns (bench_turns.py), so that they see the same machine; the ratio is
the median of the turns' ratios, and its quartiles tell how far to trust it. CPU, gloo, fp32, one thread per process, random
tokens. Nothing fails because it is slow: exit 1 says that something did not run, exit 2 that the command cannot be read.

megatron-core is not part of megalm. `peer` wants a Python that has it, and is left out without one:

    python -m venv DIR
    DIR/bin/pip install torch==2.13.0 numpy einops packaging
    DIR/bin/pip install --no-deps megatron-core==0.16.1
    python tools/bench_parallel.py --megatron-python DIR/bin/python
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from bench_report import Row, bounded, describe_machine, describe_versions, headline, line
from bench_turns import BenchError, alternate, start_sides

from megalm.config.parallel import CHUNKED, SCHEDULES, parse_layout
from megalm.data.indexed import IndexedWriter
from megalm.errors import MegalmError
from megalm.parallel.schedule_check import check_schedule
from megalm.parallel.schedule_file import write_schedule
from megalm.parallel.schedules import build_schedule
from megalm_kernels.benchmarks.report import describe_commit

HERE = Path(__file__).resolve().parent
SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(layers=4, hidden=128, heads=4, vocab=128, seq=64, global_batch=12, micro_batch=3, steps=10),
    "10m": dict(layers=6, hidden=384, heads=6, vocab=128, seq=256, global_batch=8, micro_batch=2, steps=1),
}
LONG = dict(layers=4, hidden=256, heads=8, vocab=128, seq=4096, global_batch=1, micro_batch=1, steps=1)  # of context
CONTEXTS = ("ring", "ulysses")
EXPERTS = dict(hidden=256, experts=8, per_token=2, expert_ffn=512, tokens=2048, steps=3)
CONTEXT_TARGET, EXPERTS_TARGET = 1.1, 1.2
PEER_TARGET, ZERO_TARGETS = 1.0, {"tiny": 1.3, "10m": 1.05}
EXECUTOR_TARGET, SCHEDULES_TARGET = 100e-6, 2.0  # seconds
EXECUTOR_RUNS = (("1f1b", 1, 1), ("1f1b", 1, 2), ("interleaved", 2, 2), ("zbv", 2, 2))  # schedule, chunks, ranks
SWITCHES = {"overlap": "parallel", "fuse_projections": "kernels"}  # and their sections of the configuration
SWITCHED = (("tp2", "overlap"), ("tp2", "fuse_projections"), ("single", "fuse_projections"))
PEER_LAYOUTS = ("tp2", "pp2", "dp2")
WITHOUT_PEER = "no --megatron-python: another environment with megatron-core 0.16.1; --help says how to make one"
DIFFERENCES = (
    "the same on both sides: model, sizes, microbatches, 1F1B, gloo, torch's attention (--megatron-attention local: its own), "
    "tanh GELU or SwiGLU, AdamW fused with two groups, global norm clipped at 1, the loss over all copies",
    "megatron-core: its activations are (S, B, E); gradients in one flat buffer for dp2 only, else one per parameter, where "
    "clipping and AdamW work tensor by tensor; tokens are drawn in the step; its data parallel reduction is not overlapped "
    "(its default); its shims are those of bench_megatron.py",
    "megalm: the step of `megalm pretrain` with its loader, which reads ahead in a thread, and with the loss known on every rank",
)


def compare(options: argparse.Namespace, section: str, what: str, size: str, sides: dict[str, Any], target: float | None) -> Row:
    """Let two trainings take turns. sides: {name: (command, specification, ranks)}, of which the first is judged."""
    steps = options.steps or {**SIZES, "4k": LONG, "experts": EXPERTS}[size]["steps"]
    with start_sides(sides, options.timeout) as (first, second):
        found = alternate(first, second, options.turns, steps, options.warmup * steps).summary() | {"steps": steps}
    names = (first.name, second.name)
    return Row(
        section, what, names, tuple(found["seconds"]), found["ratio"], tuple(found["ratio_quartiles"]), target,
        found["cpu_ratio"], found,
    )  # fmt: skip


def specify(options: argparse.Namespace, size: str, layout: str, **switches: Any) -> tuple[dict[str, Any], int]:
    """What both sides are told of a training, and how many ranks it has."""
    values, copies = parse_layout(layout)
    spec = {**SIZES.get(size, LONG), "architecture": options.architecture, "corpus": options.corpus}
    spec |= {"kind": "training", **switches}
    spec["ffn"] = {"gpt": 4 * spec["hidden"], "llama": -(-8 * spec["hidden"] // 3 // 64) * 64}[options.architecture]
    spec |= {"tensor": values.get("tensor_parallel", 1), "pipeline": values.get("pipeline_parallel", 1), "data": copies}
    spec["context"] = values.get("context_parallel", 1)
    if spec["context"] > 1:
        spec["parallel"] = {"context_method": values["context_method"], **spec.get("parallel", {})}
    return spec, spec["tensor"] * spec["context"] * spec["pipeline"] * spec["data"]


def megalm_side(spec: dict[str, Any], ranks: int) -> tuple[list[str], dict[str, Any], int]:
    return [sys.executable, str(HERE / "bench_megalm.py")], spec, ranks


def bench_peer(options: argparse.Namespace) -> Iterator[Row]:
    for size in options.sizes:
        for layout in (name for name in PEER_LAYOUTS if name in options.layouts):
            spec, ranks = specify(options, size, layout, attention=options.megatron_attention)
            theirs = [options.megatron_python, str(HERE / "bench_megatron.py")]
            sides = {"megalm": megalm_side(spec, ranks), "megatron-core": (theirs, spec, ranks)}
            yield compare(options, "peer", f"{layout} {size} {options.architecture}", size, sides, PEER_TARGET)


def bench_zero(options: argparse.Namespace) -> Iterator[Row]:
    for size in options.sizes:
        sides = {f"zero={z}": megalm_side(*specify(options, size, "single", parallel={"zero": z})) for z in (1, 0)}
        yield compare(options, "zero", f"single {size} {options.architecture}", size, sides, ZERO_TARGETS[size])


def bench_switches(options: argparse.Namespace) -> Iterator[Row]:
    runs = [(layout, switch) for layout, switch in SWITCHED if layout in options.layouts and switch in options.switches]
    for size in options.sizes:
        for layout, switch in runs:
            group = SWITCHES[switch]
            values = {f"{switch}={value}".lower(): {group: {switch: value}} for value in (True, False)}
            sides = {name: megalm_side(*specify(options, size, layout, **value)) for name, value in values.items()}
            yield compare(options, "switches", f"{layout} {size} {options.architecture}", size, sides, None)


def bench_context(options: argparse.Namespace) -> Iterator[Row]:
    for method in CONTEXTS:
        sides = {name: megalm_side(*specify(options, "4k", name)) for name in (f"cp2_{method}", "tp2")}
        yield compare(options, "context", f"cp2_{method} 4k {options.architecture}", "4k", sides, CONTEXT_TARGET)


def bench_experts(options: argparse.Namespace) -> Iterator[Row]:
    sides = {name: megalm_side({**EXPERTS, "kind": "block", "dense": name == "dense"}, 1) for name in ("experts", "dense")}
    what = "{experts} experts, {per_token} per token, {tokens} tokens".format(**EXPERTS)
    yield compare(options, "experts", what, "experts", sides, EXPERTS_TARGET)


def bench_executor(options: argparse.Namespace) -> Iterator[Row]:
    for schedule, chunks, ranks in (run for run in EXECUTOR_RUNS if run[2] in options.executor_ranks):
        spec = {"kind": "executor", "schedule": schedule, "chunks": chunks, "microbatches": options.executor_microbatches}
        name = f"{schedule}, {ranks} rank{'s' * (ranks > 1)}"
        with start_sides({name: megalm_side(spec, ranks)}, options.timeout) as (side,):
            side.turn(1)
            answers = [side.turn(1) for _ in range(options.turns)]
        own = [max(answer["seconds"] for answer in ranks) for ranks in answers]
        clock = statistics.median(max(answer["clock_seconds"] for answer in ranks) for ranks in answers)
        yield bounded("executor", name, "per action", own, EXECUTOR_TARGET, {"by_the_clock_with_torch_and_transfers": clock})


def bench_schedules(options: argparse.Namespace) -> Iterator[Row]:
    stages, microbatches = options.stages, options.microbatches
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/schedule.csv"
        for name in SCHEDULES:
            chunks = 2 if name in CHUNKED and name != "csv" else 1
            ranks = stages // chunks
            if name == "csv":
                write_schedule(build_schedule("1f1b", ranks, microbatches, 1), file)
            seconds = []
            for _ in range(min(options.turns, 3)):
                gc.collect()
                start = time.thread_time()
                check_schedule(build_schedule(name, ranks, microbatches, chunks, file))
                seconds.append(time.thread_time() - start)
            what = f"{name}, {ranks} ranks x {chunks}, {microbatches} microbatches"
            yield bounded("schedules", what, "list and check", seconds, SCHEDULES_TARGET)


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "peer": bench_peer, "zero": bench_zero, "executor": bench_executor, "schedules": bench_schedules, "switches": bench_switches,
    "context": bench_context, "experts": bench_experts,
}  # fmt: skip


def write_random_tokens(prefix: Path) -> None:
    """One document of random tokens that every size can use."""
    low = min(size["vocab"] for size in SIZES.values())
    with IndexedWriter(prefix, low) as writer:
        writer.add_document(np.random.RandomState(0).randint(0, low, size=1 << 18))


def find_megatron(python: str) -> str:
    """The version of megatron-core that this Python has. Raises BenchError with how to get it where there is none."""
    ask = "from importlib.metadata import version as v; print(v('megatron-core') + ' on torch ' + v('torch'))"
    try:
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False, timeout=60)
    except OSError as error:
        raise BenchError(f"--megatron-python {python}: cannot be run ({error.strerror})") from error
    if done.returncode:
        raise BenchError(f"--megatron-python {python}: has no megatron-core and torch; --help says how to get them")
    return done.stdout.strip()


def positive(text: str) -> int:
    """An integer of 1 or more, for argparse."""
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


def read_options(arguments: list[str]) -> argparse.Namespace:
    summary, details = (__doc__ or "").split("\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="NAME", help="default: all")
    add("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), metavar="SIZE", help="tiny, 10m; default: both")
    add("--architecture", choices=("gpt", "llama"), default="gpt", help="default: gpt")
    layouts = (*PEER_LAYOUTS, "single")
    add("--layouts", nargs="+", choices=layouts, default=layouts, metavar="LAYOUT", help="of peer and switches; default: all")
    add("--switches", nargs="+", choices=SWITCHES, default=list(SWITCHES), metavar="NAME", help="default: all")
    add("--turns", type=positive, default=15, help="turns of each side; default: 15")
    add("--steps", type=positive, help="steps in a turn; default: 10 of tiny, 1 of 10m")
    add("--warmup", type=int, default=2, help="turns before, which do not count; default: 2")
    add("--timeout", type=float, default=300, help="seconds that building or a turn may take; default: 300")
    add("--megatron-python", metavar="PATH", help="a Python that has megatron-core, for peer")
    add("--megatron-attention", choices=("sdpa", "local"), default="sdpa", help="torch's fused (default), or megatron-core's own")
    add("--stages", type=positive, default=64, help="of schedules, even; default: 64")
    add("--microbatches", type=positive, default=512, help="of schedules; default: 512")
    add("--executor-microbatches", type=positive, default=64, help="of executor; default: 64")
    add("--executor-ranks", nargs="+", type=int, choices=(1, 2), default=(1, 2), help="of executor; default: 1 and 2")
    add("--json", type=Path, metavar="FILE", help="write everything there too")
    options = parser.parse_args(arguments)
    if options.stages % 2:
        parser.error(f"--stages {options.stages}: some schedules have two stages per rank, so it must be even")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the sections and print a line for each row; all that goes into the JSON file."""
    left_out: dict[str, str] = {}
    megatron = find_megatron(options.megatron_python) if options.megatron_python else None
    if "peer" in options.sections and megatron is None:
        left_out["peer"] = WITHOUT_PEER
    report: dict[str, Any] = {"machine": describe_machine(), "versions": describe_versions(megatron)}
    report["commit"] = describe_commit(HERE.parent)
    print("\n".join(f"{key}: {value}" for part in ("machine", "versions") for key, value in report[part].items()))
    print(f"commit: {report['commit']}\n\n{headline()}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        options.corpus = f"{folder}/random"
        write_random_tokens(Path(options.corpus))
        for section in (name for name in options.sections if name not in left_out):
            for row in SECTIONS[section](options):
                rows.append(row)
                print(line(row), flush=True)
    for section, why in left_out.items():
        print(f"{section}: left out: {why}")
    if any(row.section == "peer" for row in rows):
        print("\n" + "\n".join(DIFFERENCES))
    told = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items() if key != "corpus"}
    report |= {"load_after": describe_machine()["load"], "options": told, "left_out": left_out, "differences": DIFFERENCES}
    return report | {"rows": [{**asdict(row), "verdict": row.verdict} for row in rows]}


def main(arguments: list[str]) -> int:
    options = read_options(arguments)
    try:
        report = measure(options)
    except (BenchError, MegalmError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
