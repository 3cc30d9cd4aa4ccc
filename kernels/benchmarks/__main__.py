"""`python -m megalm_kernels.benchmarks [OPERATION ...]`: what `megalm kernels bench` does, where megalm is not installed."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from megalm_kernels.benchmarks import FILES, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m megalm_kernels.benchmarks", allow_abbrev=False)
    parser.add_argument("ops", nargs="*", metavar="OPERATION", help=f"default: all of {', '.join(FILES)}")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--quick", action="store_true", help="few sizes and repetitions")
    parser.add_argument("--results", type=Path, default=Path("runs/kernels"), metavar="FOLDER")
    parser.add_argument("--peers", nargs="*", default=[], metavar="NAME", help="default: all that are installed")
    parser.add_argument("--commit", default="", help="what the results say; default: that of the checkout")
    parser.add_argument("--shapes", default="", metavar="REGEX", help="only cases whose shape contains it")
    options = parser.parse_args()
    if unknown := sorted(set(options.ops) - FILES.keys()):
        parser.error(f"no benchmark is called {unknown[0]}; there are {', '.join(FILES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a time limit: what was measured is written all the same
    return run(options.ops, options.device, options.quick, options.results, options.peers, options.commit, options.shapes)


if __name__ == "__main__":
    sys.exit(main())
