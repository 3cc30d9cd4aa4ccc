"""Seconds from `megalm slurm submit` to the first step: `python tools/bench_slurm.py [--times 3] [--bound 25] [--json FILE]`.

A llama of 4 million weights, tp2 x pp2 over two nodes, an agent on each, on the cluster that SLURM_CONF names; where that is
not set, on one of namespaces on this machine (tests/slurm/cluster.sh, as root). Exit 1: the median is above the bound, or a
job did not end well.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_parallel import write_random_tokens
from bench_report import describe_machine, describe_versions

from megalm.runfolder import read_events

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
SETTINGS = {
    "model.hidden_size": 256, "model.num_layers": 4, "model.num_heads": 8, "model.num_kv_heads": 4, "model.ffn_size": 704,
    "model.vocab_size": 2048, "model.max_seq_length": 256, "data.seq_length": 256, "train.steps": 3, "train.log_every": 1,
    "train.global_batch_size": 4, "train.micro_batch_size": 1, "optim.warmup_steps": 1, "cluster.device": "cpu",
    "cluster.threads": 1, "slurm.nodes": 2, "parallel": "tp2_pp2",
}  # fmt: skip
SECONDS = 300.0  # for a job to end


def submit_one(folder: Path, corpus: Path) -> dict[str, float]:
    """Seconds since the command was given, of each thing on the way. Raises SystemExit if the job does not end well."""
    words = [f"{key}={value}" for key, value in {**SETTINGS, "data.path": corpus, "train.run_dir": folder}.items()]
    begin = time.time()
    command = [sys.executable, "-m", "megalm.launchers.cli", "slurm", "submit", "pretrain", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    submitted = time.time()
    if done.returncode:
        raise SystemExit(done.stderr)
    job, log = done.stdout.split()[1].rstrip(":"), folder / "logs"
    while not (folder / "finished").exists():
        time.sleep(0.2)
        if time.time() - begin > SECONDS:
            raise SystemExit(f"job {job} has not ended after {SECONDS:.0f} s; see {log}")
    text = "".join(path.read_text() for path in log.glob("slurm-*.out"))
    lines = {word: _when(text, word) for word in (" start 1", " starting 2 tasks")}
    started = next(event["time"] for event in read_events(folder) if event["kind"] == "started")
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["time"]
    moments = {
        "submitted": submitted,
        "script runs (to the second)": lines[" start 1"],
        "nodes looked at (to the second)": lines[" starting 2 tasks"],
        "ranks have met": started,
        "first step": first,
    }
    return {name: moment - begin for name, moment in moments.items()}


def _when(text: str, word: str) -> float:
    """The time that stands before a line of the supervisor."""
    found = re.search(rf"^(\S+ \S+).*{word}", text, re.MULTILINE)
    if found is None:
        raise SystemExit(f"{text}\nno line with {word!r}")
    return time.mktime(time.strptime(found[1], "%Y-%m-%d %H:%M:%S"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--times", type=int, default=3, help="jobs, one after the other")
    parser.add_argument("--bound", type=float, default=25.0, help="seconds that the median may take")
    parser.add_argument("--json", help="write the numbers to this file")
    options = parser.parse_args()
    machine = describe_machine()
    print(machine)
    ours = "SLURM_CONF" not in os.environ
    if ours:
        subprocess.run(["bash", CLUSTER, "up", "--for", str(os.getpid())], check=True, stdout=subprocess.DEVNULL)
        said = subprocess.run(["bash", CLUSTER, "env"], check=True, capture_output=True, text=True).stdout
        os.environ["SLURM_CONF"] = said.strip().partition("=")[2]
    found: list[dict[str, float]] = []
    try:
        with tempfile.TemporaryDirectory() as name:
            write_random_tokens(Path(name, "corpus"))
            for turn in range(options.times):
                found.append(submit_one(Path(name, f"run-{turn}"), Path(name, "corpus")))
                print("  ".join(f"{what} {seconds:.1f} s" for what, seconds in found[-1].items()), flush=True)
                time.sleep(5.0)  # the job's own end
    finally:
        if ours:
            subprocess.run(["bash", CLUSTER, "down"], check=True)
    median = statistics.median(row["first step"] for row in found)
    print(f"first step after {median:.1f} s (median of {len(found)}; bound {options.bound:.0f} s)")
    if options.json:
        results: dict[str, Any] = {"machine": machine, "versions": describe_versions(None), "seconds": found}
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(median > options.bound)


if __name__ == "__main__":
    main()
