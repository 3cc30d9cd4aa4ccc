"""The same training on the CPU with torch and on the GPU with the kernels: `python tools/gpu_parity.py [--json FILE]`.

A tiny llama, fp32, one rank, from the same start on the same tokens; the losses of all steps are compared. exit 1: they are
farther apart than --tolerance, or a run failed. --dry-run: both sides on the CPU with torch, which must give the same bits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from megalm.data.indexed import IndexedWriter

VOCABULARY, TOKENS = 256, 1 << 16
BATCH = ("data.seq_length=128", "train.global_batch_size=8", "train.micro_batch_size=4", "train.precision=fp32")
RATE = ("data.split='1,0,0'", "optim.lr=1e-3", "optim.schedule=constant", f"model.vocab_size={VOCABULARY}")
SIDES = {
    "cpu, torch": ("cluster.device=cpu", "kernels.backend=torch"),
    "gpu, triton": ("cluster.device=cuda", "kernels.backend=triton"),
}
_SMALL = (*SIDES["cpu, torch"], "data.seq_length=64")
DRY = {"cpu, torch": _SMALL, "cpu, torch again": _SMALL}


def write_tokens(prefix: Path) -> None:
    """One document that a model can learn: each token is its predecessor plus 7, but for one in eight, which is random."""
    random = np.random.RandomState(0)
    steps = np.where(random.rand(TOKENS) < 0.125, random.randint(0, VOCABULARY, TOKENS), 7)
    with IndexedWriter(prefix, VOCABULARY) as writer:
        writer.add_document(np.cumsum(steps) % VOCABULARY)


def train(options: tuple[str, ...], corpus: Path, folder: Path, steps: int, model: str) -> list[float]:
    """The losses of a run. Raises RuntimeError with the end of its output if it fails."""
    said = (f"model={model}", f"data.path={corpus}", f"train.run_dir={folder}", f"train.steps={steps}", *BATCH, *RATE, *options)
    command = [sys.executable, "-m", "megalm.launchers.cli", "pretrain", *said, "cluster.num_processes=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\nended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "lr" in line]


def compare(first: list[float], second: list[float], tolerance: float) -> dict[str, Any]:
    """The largest difference, as a share of the loss, and what is wrong; empty if nothing is."""
    apart = [abs(a - b) / abs(a) for a, b in zip(first, second, strict=False)]
    problem = ""
    if len(first) != len(second) or not first:
        problem = f"{len(first)} and {len(second)} steps"
    elif not all(x <= tolerance for x in apart):  # NaN is not
        problem = f"step {1 + max(range(len(apart)), key=apart.__getitem__)} is {max(apart):.3g} apart, allowed {tolerance:.3g}"
    elif not first[-1] < 0.9 * first[0]:
        problem = f"nothing was learned: {first[0]:.4f} at the start, {first[-1]:.4f} at the end"
    return {"largest_relative_difference": max(apart, default=None), "problem": problem}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model", default="tiny", help="an option of the model group; default: tiny")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of a loss, as a share of it; default: 1e-4")
    parser.add_argument("--dry-run", action="store_true", help="both sides on the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        write_tokens(Path(folder) / "corpus")
        for i, (name, how) in enumerate((DRY if options.dry_run else SIDES).items()):
            try:
                losses[name] = train(how, Path(folder) / "corpus", Path(folder) / str(i), options.steps, options.model)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 1
    first, second = losses.values()
    found = compare(first, second, 0.0 if options.dry_run else options.tolerance)
    for step, pair in enumerate(zip(*losses.values(), strict=False), 1):
        print(f"step {step:>3}  " + "  ".join(f"{name} {loss:.6f}" for name, loss in zip(losses, pair, strict=True)))
    print(f"parity: {found['problem'] or 'the same'}; largest relative difference {found['largest_relative_difference']:.3g}")
    if options.json:
        options.json.write_text(json.dumps({"losses": losses, "dry_run": options.dry_run, **found}, indent=1) + "\n")
    return 1 if found["problem"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
