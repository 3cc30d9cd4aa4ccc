"""Check the size budgets of files and functions: `python tools/sizes.py [CHECKOUT]`, exit 1 over budget.

A file has at most 500 lines; a function at most 100, a Triton kernel 130; and 90% of the functions have at most 45.
Code and tests are counted apart, so that many short tests cannot hide long code. A function goes from `def` to its last
line, docstring included, decorators not.
"""

from __future__ import annotations

import ast
import math
import sys
from dataclasses import dataclass
from pathlib import Path

FILE_LINES = 500
FUNCTION_LINES = 100
KERNEL_LINES = 130
USUAL_LINES = 45  # what USUAL_SHARE of the functions keep to
USUAL_SHARE = 0.90
AREAS = {"code": ["megalm", "launchers", "kernels", "tools", "conf", "slurm"], "tests": ["tests"]}
SCRIPTS = (".py", ".sh", ".sbatch")
WORST = 5


@dataclass(frozen=True, order=True)
class Function:
    """A function or method, and how long it is."""

    lines: int
    place: str  # file:line name
    kernel: bool

    @property
    def limit(self) -> int:
        return KERNEL_LINES if self.kernel else FUNCTION_LINES


def find_files(root: Path, folders: list[str]) -> list[Path]:
    """Every script in these folders, and CI's own, which has no suffix."""
    found = [file for folder in folders for file in sorted((root / folder).rglob("*")) if file.suffix in SCRIPTS]
    ci = root / ".ci" / "run"
    return [*found, ci] if "tools" in folders and ci.exists() else found


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Triton compiles it: decorated with triton.jit, bare or called."""
    called = (mark.func if isinstance(mark, ast.Call) else mark for mark in node.decorator_list)
    return any(ast.unparse(mark) == "triton.jit" for mark in called)


def functions_in(file: Path, root: Path) -> list[Function]:
    """All functions of a Python file, nested ones too (their lines count for the outer one as well)."""
    return [
        Function(
            (node.end_lineno or node.lineno) - node.lineno + 1,
            f"{file.relative_to(root)}:{node.lineno} {node.name}",
            is_kernel(node),
        )
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def percentile(sizes: list[int], share: float) -> int:
    """The smallest size that `share` of the sizes do not exceed; 0 where there are none."""
    return sorted(sizes)[math.ceil(share * len(sizes)) - 1] if sizes else 0


def check_area(name: str, root: Path) -> list[str]:
    """What is over budget in one area; prints its totals and its largest files and functions."""
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in find_files(root, AREAS[name])}
    functions = sorted((f for file in lines if file.suffix == ".py" for f in functions_in(file, root)), reverse=True)
    sizes = [function.lines for function in functions]
    usual = percentile(sizes, USUAL_SHARE)
    print(
        f"{name}: {len(lines)} files, {sum(lines.values())} lines, median {percentile(list(lines.values()), 0.5)};"
        f" {len(functions)} functions, median {percentile(sizes, 0.5)}, {USUAL_SHARE:.0%} within {usual} lines"
    )
    largest = sorted(lines, key=lambda file: -lines[file])[:WORST]
    print("  largest files:     " + ", ".join(f"{file.relative_to(root)} {lines[file]}" for file in largest))
    print("  longest functions: " + ", ".join(f"{f.place} {f.lines}" for f in functions[:WORST]))
    over = [
        f"{file.relative_to(root)}: {count} lines, at most {FILE_LINES}; split it by what its first line says"
        for file, count in lines.items()
        if count > FILE_LINES
    ]
    over += [f"{f.place}: {f.lines} lines, at most {f.limit}" for f in functions if f.lines > f.limit]
    if usual > USUAL_LINES:
        share = sum(size <= USUAL_LINES for size in sizes) / len(sizes)
        over.append(f"{name}: {share:.1%} of the functions have at most {USUAL_LINES} lines, {USUAL_SHARE:.0%} must")
    return over


def main(arguments: list[str]) -> int:
    root = Path(arguments[0]).resolve() if arguments else Path(__file__).resolve().parent.parent
    over = [problem for name in AREAS for problem in check_area(name, root)]
    print("\n".join([*over, f"sizes: {len(over)} over budget"]))
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
