"""What was compiled before training is found by the first launch: `python tools/gpu_cache.py [--json FILE]`.

Into an empty Triton cache, `megalm kernels compile precompile=true` compiles for this GPU; then another process runs every
operation forward and backward. exit 1: that process had to compile something, or either failed. --dry-run: without a GPU, one
operation is compiled and nothing runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DRY_OPERATION, DRY_ARCH = "swiglu", "90"


def launch(sizes: str) -> None:
    """Every operation once, on the GPU."""
    import torch

    from megalm_kernels.benchmarks import find_cases
    from megalm_kernels.benchmarks.harness import run_ours

    for case in find_cases(sizes=sizes):
        run_ours(case, torch.device("cuda", 0))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def compiled(cache: Path) -> set[str]:
    """What the cache holds: folder/kernel."""
    return {f"{path.parent.name}/{path.stem}" for path in cache.rglob("*.cubin")}


def run(command: list[str], cache: Path) -> float:
    """Seconds; raises RuntimeError with the end of the output if it fails."""
    begin = time.monotonic()
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\nended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return time.monotonic() - begin


def this_arch() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return str(10 * major + minor)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--sizes", choices=("quick", "full"), default="quick", help="the cases that are run; default: quick")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)  # the second process
    options = parser.parse_args(arguments)
    if options.launch:
        launch(options.sizes)
        return 0
    arch = DRY_ARCH if options.dry_run else this_arch()
    compile_them = [sys.executable, "-m", "megalm.launchers.cli", "kernels", "compile", "precompile=true", f"arch=[{arch}]"]
    compile_them += [f"ops=[{DRY_OPERATION}]"] * options.dry_run
    with tempfile.TemporaryDirectory(prefix="cache-") as folder:
        try:
            found = {"arch": arch, "dry_run": options.dry_run, "compile_seconds": run(compile_them, Path(folder))}
            before = compiled(Path(folder))
            print(f"{len(before)} kernels compiled for sm_{arch} in {found['compile_seconds']:.1f} s")
            if options.dry_run:
                print("running them needs a GPU")
            else:
                again = [sys.executable, __file__, "--launch", "--sizes", options.sizes]
                found["launch_seconds"] = run(again, Path(folder))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        missed = sorted(compiled(Path(folder)) - before)
    print(f"{len(missed)} kernels had to be compiled at the launch{': ' * bool(missed)}{', '.join(missed)}")
    if options.json:
        options.json.write_text(json.dumps({**found, "compiled": len(before), "missed": missed}, indent=1) + "\n")
    return 1 if missed or not before else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
