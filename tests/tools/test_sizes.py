"""tools/sizes.py passes on this checkout, and names what is over budget in trees that are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def function(lines: int, name: str = "f", mark: str = "") -> str:
    """A function of so many lines, `def` included."""
    return "\n".join([*([mark] if mark else []), f"def {name}():", *["    x = 0"] * (lines - 1)]) + "\n"


def run_sizes(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "sizes.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def check_tree(root: Path, files: dict[str, str]) -> subprocess.CompletedProcess[str]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return run_sizes(str(root))


def test_this_checkout_is_within_budget():
    done = run_sizes()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sizes: 0 over budget" in done.stdout


SHORT = "".join(function(2, f"short{i}") for i in range(18))  # so that 90% of the functions are short


@pytest.mark.parametrize("name", ["megalm/a.py", "launchers/a.py", "kernels/x/a.py", "tools/a.py", "tests/a.py"])
def test_at_the_limits_passes(tmp_path, name):
    kernel = function(130, "kernel", "@triton.autotune(configs=[], key=[])\n@triton.jit")
    files = {name: SHORT + function(100), "kernels/k.py": SHORT + kernel, "tests/long.py": "\n" * 500}
    done = check_tree(tmp_path, files)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"megalm/a.py": "\n" * 501}, "megalm/a.py: 501 lines, at most 500"),
        ({"tests/data/test_a.py": "\n" * 501}, "tests/data/test_a.py: 501 lines"),
        ({"tools/a.sh": "\n" * 501}, "tools/a.sh: 501 lines"),
        ({".ci/run": "\n" * 501}, ".ci/run: 501 lines"),
        ({"megalm/a.py": SHORT + function(101, "long")}, "megalm/a.py:37 long: 101 lines, at most 100"),
        ({"tests/a.py": SHORT + function(101).replace("def", "async def")}, "f: 101 lines, at most 100"),
        ({"megalm/a.py": SHORT + function(101, mark="@functools.jit")}, "f: 101 lines, at most 100"),
        ({"kernels/k.py": SHORT + function(131, mark="@triton.jit")}, "f: 131 lines, at most 130"),
        ({"kernels/k.py": SHORT + function(131, mark="@triton.jit(do_not_specialize=[])")}, "at most 130"),
        ({"megalm/a.py": function(46)}, "code: 0.0% of the functions have at most 45 lines, 90% must"),
        ({"megalm/a.py": SHORT[: SHORT.index("def short8")] + function(46), "tests/a.py": SHORT}, "code: 88.9%"),
        ({"megalm/a.py": SHORT, "tests/a.py": function(46)}, "tests: 0.0%"),
    ],
)
def test_over_budget_fails(tmp_path, files, message):
    done = check_tree(tmp_path, files)
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stdout
    assert "sizes: 1 over budget" in done.stdout


def test_totals_and_worst_offenders_are_shown(tmp_path):
    done = check_tree(tmp_path, {"megalm/a.py": function(3), "megalm/b.py": function(7, "g")})
    assert "code: 2 files, 10 lines, median 3; 2 functions, median 3, 90% within 7 lines" in done.stdout
    assert "megalm/b.py:1 g 7, megalm/a.py:1 f 3" in done.stdout


def test_one_function_in_ten_may_be_long(tmp_path):
    nine = SHORT[: SHORT.index("def short9")]
    assert check_tree(tmp_path, {"megalm/a.py": nine + function(46)}).returncode == 0
