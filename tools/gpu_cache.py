"""What was compiled before training is found by the first launch: `python tools/gpu_cache.py [--json FILE]`.

Into an empty Triton cache, `megalm kernels compile precompile=true` compiles for this GPU; then another process runs every
operation forward and backward. exit 1: that process had to compile a kernel (each is named), or either failed. --dry-run:
without a GPU, one operation is compiled and nothing runs.

Not kernels, and not counted as such: libraries in C that a launch builds with gcc and puts into the same cache. With Triton 3.6
there is one per signature, which passes the arguments, and no login node can build it beforehand. Their number is reported.
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
from typing import Any

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


def libraries(cache: Path) -> int:
    """How many libraries in C the cache holds."""
    return sum(1 for _ in cache.rglob("*.so"))


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

    from megalm_kernels.launch import capability

    return str(capability(torch.cuda.current_device()))


def judge(found: dict[str, Any], before: set[str], after: set[str]) -> int:
    """Prints what the launch has compiled and adds it to what was found: None where nothing was launched. 0: nothing."""
    found |= {"compiled": len(before), "missed": None if found["dry_run"] else sorted(after - before)}
    if not before:
        print("FAILED  nothing was compiled before the launch", file=sys.stderr)
    if found["missed"] is None:
        print("nothing was launched: that needs a GPU")
        return 0 if before else 1
    late = f"{len(found['missed'])} kernels had to be compiled at the launch"
    print(f"{late}, which built {found['libraries']} C libraries with gcc")
    for name in found["missed"]:
        print(f"FAILED  {name.rpartition('/')[2]} was not compiled before the launch ({name}.cubin)", file=sys.stderr)
    return 1 if found["missed"] or not before else 0


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
            found: dict[str, Any] = {"arch": arch, "dry_run": options.dry_run, "compile_seconds": run(compile_them, Path(folder))}
            before, built = compiled(Path(folder)), libraries(Path(folder))
            print(f"{len(before)} kernels compiled for sm_{arch} in {found['compile_seconds']:.1f} s")
            if not options.dry_run:
                again = [sys.executable, __file__, "--launch", "--sizes", options.sizes]
                found["launch_seconds"] = run(again, Path(folder))
                found["libraries"] = libraries(Path(folder)) - built
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        code = judge(found, before, compiled(Path(folder)))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
