"""Hold predicted against measured peak memory: `python tools/bench_memory.py [--runs ...] [--json FILE]`.

Every run is a real `megalm pretrain` of a llama of 10 million weights for --steps steps, which writes what it predicted and
measured to memory.json (train.memory_step). Its line is its fullest rank; below it stands the rank that is furthest off, if it
is another one. CPU, gloo, one thread per process, random tokens: bytes do not depend on how busy the machine is. Exit 1 says
that a run failed, or that a prediction is further off than --within.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from bench_parallel import write_random_tokens
from bench_report import describe_machine, describe_versions

from megalm.config.cluster import ClusterConfig
from megalm.config.data import DataConfig
from megalm.config.layouts import with_layout
from megalm.config.model import ModelConfig
from megalm.config.run import RunConfig
from megalm.config.train import TrainConfig
from megalm_kernels.benchmarks.report import describe_commit

HERE = Path(__file__).resolve().parent
MODEL = dict(num_layers=4, hidden_size=384, num_heads=8, num_kv_heads=4, ffn_size=1024, vocab_size=4096)
LENGTH, SAMPLES, MICROBATCHES = 512, 2, 4  # tokens of a sample, samples of a microbatch, microbatches of a step
GPT = {"model.architecture": "gpt", "model.num_kv_heads": 8, "model.ffn_size": 1536, "model.dropout": 0.1}
LATENT = {
    "model.num_kv_heads": 8, "model.kv_latent_size": 128, "model.q_latent_size": 192, "model.head_dim": 48,
    "model.rope_head_dim": 16, "model.value_head_dim": 32,
}  # fmt: skip
EXPERTS = {
    "model.num_experts": 8, "model.experts_per_token": 2, "model.expert_ffn_size": 256, "model.num_shared_experts": 1,
    "model.num_dense_layers": 1, "model.router_balance_rate": 0.01,
}  # fmt: skip
MODULES = {"train.recompute": "modules", "train.recompute_modules": ["norms", "mlp"]}
Runs = dict[str, tuple[str, dict[str, Any]]]

RUNS: Runs = {
    name: (name, {})
    for name in (
        "single", "tp2", "tp2_sp", "pp2", "pp2_gpipe", "pp2_interleaved", "pp2_zbh1", "dp2", "dp2_zero1",
        "dp2_zero2", "dp2_zero2_microbatch", "dp2_zero3", "dp2_zero3_microbatch", "cp2_ring", "cp2_ulysses",
    )
}  # fmt: skip
RUNS |= {
    "full": ("single", {"train.recompute": "full"}),
    "selective": ("single", {"train.recompute": "selective"}),
    "modules": ("single", MODULES),
    "fused_loss": ("single", {"kernels.fused_loss": True}),
    "offload": ("single", {"train.offload_activations": "disk"}),
    "bf16": ("single", {"train.precision": "bf16"}),
    "bf16 selective": ("tp2_sp", {"train.precision": "bf16", "train.recompute": "selective"}),
    "bf16 zero": ("dp2_zero2", {"train.precision": "bf16"}),
    "gpt": ("single", GPT),
    "latent": ("tp2", LATENT),
    "experts": ("single", EXPERTS),
    "experts ep": ("dp2_ep2", EXPERTS),
    "experts ep zero": ("dp2_ep2_zero1", EXPERTS),
    "documents": ("cp2_ring", {"data.document_mask": True}),
}


@dataclass(frozen=True)
class Row:
    """A rank's bytes at the fullest moment of the step."""

    name: str
    layout: str
    rank: int
    predicted: float
    measured: float

    @property
    def off(self) -> float:
        """How much too much was predicted, as a share of what was measured."""
        return self.predicted / self.measured - 1


def rows_of(name: str, report: dict[str, Any]) -> list[Row]:
    """Of a memory.json: the fullest rank, and the one furthest off if it is another."""
    ranks = [Row(name, report["layout"], r["rank"], r["predicted"], r["measured"]) for r in report["ranks"]]
    full, worst = max(ranks, key=lambda row: row.measured), max(ranks, key=lambda row: abs(row.off))
    return [full] if abs(worst.off) == abs(full.off) else [full, worst]


def line(row: Row | None = None, again: bool = False) -> str:
    """A row for the terminal, or what stands above them. again: a second row of a layout."""
    if row is None:
        return f"{'run':<20} {'layout':<22} {'rank':>4} {'predicted':>12} {'measured':>12} {'off':>7}"
    mib = 2**20
    name, layout = ("", "") if again else (row.name, row.layout)
    return f"{name:<20} {layout:<22} {row.rank:>4} {row.predicted / mib:8.1f} MiB {row.measured / mib:8.1f} MiB {row.off:>+7.1%}"


def verdict(rows: list[Row], within: float) -> tuple[str, bool]:
    """One line about all rows, and whether none is further off than `within`."""
    worst = max(rows, key=lambda row: abs(row.off))
    far = {row.name for row in rows if abs(row.off) > within}
    found = f"further off than {within:.0%}: {', '.join(sorted(far))}" if far else f"all are within {within:.0%}"
    return f"furthest off: {worst.name}, rank {worst.rank}, {worst.off:+.1%}; {found}", not far


def configure(name: str, folder: Path, steps: int) -> RunConfig:
    layout, changes = RUNS[name]
    model = MODEL | {key.removeprefix("model."): value for key, value in changes.items() if key.startswith("model.")}
    config = RunConfig(
        model=ModelConfig(**model),
        data=DataConfig(path=str(folder / "random"), seq_length=LENGTH, split="1,0,0"),
        train=TrainConfig(run_dir=str(folder / name), steps=steps, micro_batch_size=SAMPLES, memory_step=steps),
        cluster=ClusterConfig(device="cpu"),
    )
    config = with_layout(config, layout)
    config.train.global_batch_size = MICROBATCHES * SAMPLES * config.data_parallel
    for key, value in changes.items():
        section, field = key.split(".")
        if section != "model":
            setattr(config, section, dataclasses.replace(getattr(config, section), **{field: value}))
    return config


def run(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """A run's memory.json; None if it failed, with its last lines on stderr."""
    config = configure(name, folder, options.steps)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(asdict(config)))
    command = [sys.executable, "-m", "megalm.launchers.cli", "pretrain", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=options.timeout, cwd=folder)
    file = Path(config.train.run_dir, "memory.json")
    if done.returncode or not file.is_file():
        print(f"{name}: exit {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def read_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="NAME", help="default: all")
    parser.add_argument("--steps", type=int, default=2, help="of each run, of which the last is measured; default: 2")
    parser.add_argument("--within", type=float, default=0.05, help="share that a prediction may be off; default: 0.05")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one run; default: 600")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the runs there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = read_options(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows: list[Row] = []
    failed = []
    print(line())
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        write_random_tokens(folder / "random")
        for name in options.runs:
            report = run(name, folder.absolute(), options)
            if report is None:
                failed.append(name)
                continue
            for i, row in enumerate(rows_of(name, report)):
                rows.append(row)
                print(line(row, again=i > 0), flush=True)
    if not rows:
        return 1
    said, good = verdict(rows, options.within)
    print(said + (f"; failed: {', '.join(failed)}" if failed else ""))
    if options.json:
        about = {"machine": describe_machine(), "versions": describe_versions(None), "commit": describe_commit(HERE.parent)}
        found = [{**asdict(row), "off": row.off} for row in rows]
        options.json.write_text(json.dumps({**about, "model": MODEL, "rows": found, "failed": failed}, indent=1) + "\n")
    return 0 if good and not failed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
