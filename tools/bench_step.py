"""A training step of a llama of 1B on one GPU, with our kernels and with torch's: `python tools/bench_step.py [key=value ...]`.

Each backend runs in a process of its own, so that neither sees the other's memory. key=value: as for `megalm pretrain`.
Reported: tokens/s, MFU (megalm/models/count.py says of what) against the data sheet and against a matrix product measured in
the same process, peak memory, the loss. exit 1: a backend failed. --dry-run: a tiny model on the CPU, torch only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LARGE = (
    "model=llama_1b", "data.seq_length=4096", "train.precision=bf16", "train.global_batch_size=8", "train.micro_batch_size=4",
    "cluster.device=cuda",
)  # fmt: skip
TINY = ("model=tiny", "data.seq_length=64", "train.global_batch_size=2", "train.micro_batch_size=2", "cluster.device=cpu")
ALWAYS = ("data.split='1,0,0'", "optim.schedule=constant", "cluster.num_processes=1", "train.steps=1000000")
TOKENS = 1 << 18


def measure(backend: str, told: list[str], corpus: str, steps: int, dry: bool) -> dict[str, Any]:
    """Build the job in this process and time its steps."""
    import torch

    from megalm.checkpoint.state import RunState
    from megalm.data.corpus import corpus_of
    from megalm.launchers.compose import inspect, parse
    from megalm.models.count import count_parameters
    from megalm.parallel.bootstrap import start_process_group, stop_process_group
    from megalm.parallel.topology import build_topology
    from megalm.train.build import build_job
    from megalm.train.kernels import choose_kernels, describe, facts_of
    from megalm.train.metrics import SpeedMeter, peak_memory_bytes
    from megalm.train.trainer import Trainer
    from megalm_kernels.benchmarks.harness import Stopwatch, measure_ceilings

    argv = [*(TINY if dry else LARGE), *ALWAYS, f"data.path={corpus}", f"kernels.backend={backend}", *told]
    config, problems = inspect(parse("pretrain", argv))
    if problems:
        raise SystemExit("\n".join(map(str, problems)))
    device = start_process_group(config.cluster)
    ceilings = measure_ceilings(Stopwatch(device, 0.2))
    topology = build_topology(config.parallel, device)
    kernels = describe(choose_kernels(config.kernels, device.type, facts_of(config)))
    corpus_found = corpus_of(config)
    trainer = Trainer(build_job(config, topology, corpus_found), RunState(data_fingerprint=corpus_found.fingerprint()), [])
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []
    for _ in range(3 + steps):  # the first three compile, allocate and warm up
        start = time.perf_counter()
        losses.append(float(trainer.train_step().loss))  # sync
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    meter = SpeedMeter(config, 1, device)
    rate = meter.tokens_per_step / statistics.median(seconds[3:])
    tflops = rate * meter.flops_per_token / 1e12
    trainer.job.loader.close()
    stop_process_group()
    return {
        "backend": backend,
        "kernels": kernels,
        "options": argv,
        "parameters": count_parameters(config.model),
        "first_step_seconds": seconds[0],
        "step_seconds": sorted(seconds[3:]),
        "tokens_per_second": rate,
        "tflops": tflops,
        "mfu_of_measured_product": tflops / ceilings.gemm_tflops,
        "mfu_of_data_sheet": tflops / meter.peak_tflops if meter.peak_tflops else None,
        "measured_product_tflops": ceilings.gemm_tflops,
        "peak_memory_bytes": peak_memory_bytes(device),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def write_tokens(prefix: Path, vocabulary: int) -> None:
    """One document of random tokens."""
    import numpy as np

    from megalm.data.indexed import IndexedWriter

    with IndexedWriter(prefix, vocabulary) as writer:
        writer.add_document(np.random.RandomState(0).randint(0, vocabulary, size=TOKENS))


def line(side: dict[str, Any]) -> str:
    """One backend for the terminal."""
    sheet = f"{side['mfu_of_data_sheet']:.1%}" if side["mfu_of_data_sheet"] is not None else "not known"
    return (
        f"{side['backend']:<7} {side['tokens_per_second']:>10,.0f} tokens/s  {side['tflops']:.4g} TFLOP/s  "
        f"MFU {side['mfu_of_measured_product']:.1%} of the measured product, {sheet} of the data sheet  "
        f"{side['peak_memory_bytes'] / 2**30:.2f} GiB  loss {side['first_loss']:.4f} -> {side['last_loss']:.4f}"
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("told", nargs="*", metavar="key=value", help="as for `megalm pretrain`")
    parser.add_argument("--backends", nargs="+", default=["triton", "torch"], choices=("triton", "torch", "auto"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--one", nargs=2, metavar=("BACKEND", "CORPUS"), help=argparse.SUPPRESS)  # a process of ours
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(*(options.one[0], options.told, options.one[1]), options.steps, options.dry_run)))
        return 0
    sides, failed = [], []
    with tempfile.TemporaryDirectory(prefix="step-") as folder:
        write_tokens(Path(folder) / "corpus", 128)
        for backend in ["torch"] if options.dry_run else options.backends:
            command = [sys.executable, __file__, "--one", backend, f"{folder}/corpus", "--steps", str(options.steps)]
            command += ["--dry-run"] * options.dry_run + ["--", *options.told]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
                output = (done.stdout + done.stderr)[-3000:] if done.returncode else ""
            except subprocess.TimeoutExpired as error:  # the other backend's result is worth keeping
                output = str(error)
            if output:
                failed.append({"backend": backend, "output": output})
                print(f"{backend}: failed\n{failed[-1]['output']}", file=sys.stderr)
                continue
            sides.append(json.loads(done.stdout.splitlines()[-1]))
            print(line(sides[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"dry_run": options.dry_run, "sides": sides, "failed": failed}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
