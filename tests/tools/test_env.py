"""tools/env.sh installs what is missing, once, keeps a torch that is there, and says what to do when pip fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Stands for the environment's interpreter: notes what pip is asked for, and has the torch that $FAKE_TORCH names.
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
    *"-m pip install"*)
        constraint=""
        [ "$6" = --constraint ] && constraint=" [$(cat "$7" 2>/dev/null)]"
        echo "${{*: -1}}$constraint" >>"$HOME/pip.txt"
        echo "pip says no" >&2
        [ -z "${{FAKE_FAILURE:-}}" ] || exit 1
        touch "$(dirname "$0")/megalm" && chmod +x "$(dirname "$0")/megalm" ;;
    *'version("torch")'*) [ -n "${{FAKE_TORCH:-}}" ] && echo "$FAKE_TORCH" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


class Checkout:
    """A copy of env.sh beside a pyproject.toml, with an active environment whose pip is a fake."""

    def __init__(self, folder: Path):
        self.folder, self.env = folder, folder / "env"
        (folder / "tools").mkdir()
        (folder / "tools" / "env.sh").write_text((ROOT / "tools" / "env.sh").read_text())
        (folder / "pyproject.toml").write_text("[project]\n")
        (self.env / "bin").mkdir(parents=True)
        (self.env / "bin" / "python").write_text(PYTHON)
        (self.env / "bin" / "python").chmod(0o755)

    def use(self, wanted: str = "run", gpu: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
        """`use_environment WANTED` with or without a GPU; the interpreter that it took is the output's end."""
        script = (
            f"set -euo pipefail; source {self.folder}/tools/env.sh; has_gpu() {{ {str(gpu).lower()}; }};"
            f" use_environment {wanted}; echo $PYTHON"
        )
        settings = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "VIRTUAL_ENV": str(self.env), **variables}
        return subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=settings, check=False)

    def installed(self) -> list[str]:
        """What pip was asked for since the last call."""
        log = self.folder / "pip.txt"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_no_gpu_and_no_torch_takes_torch_first(checkout):
    done = checkout.use("dev")
    assert done.returncode == 0, done.stderr
    assert checkout.installed() == ["torch==2.13.0", f"{checkout.folder}[dev] []"]
    assert done.stdout.endswith(f"{checkout.env}/bin/python\n")


def test_a_gpu_takes_the_usual_torch(checkout):
    assert checkout.use(gpu=True).returncode == 0
    assert checkout.installed() == [f"{checkout.folder} []"]


def test_an_installed_torch_is_kept(checkout):
    assert checkout.use(FAKE_TORCH="2.12.1+cu128").returncode == 0
    assert checkout.installed() == [f"{checkout.folder} [torch==2.12.1+cu128]"]


def test_nothing_is_installed_twice(checkout):
    checkout.use("dev")
    checkout.installed()
    for wanted in ("dev", "run"):
        assert checkout.use(wanted).returncode == 0
        assert checkout.installed() == []


def test_dev_adds_to_run(checkout):
    checkout.use("run")
    checkout.installed()
    checkout.use("dev", FAKE_TORCH="2.13.0")
    assert checkout.installed() == [f"{checkout.folder}[dev] [torch==2.13.0]"]


def test_a_changed_pyproject_installs_again(checkout):
    checkout.use()
    checkout.installed()
    (checkout.folder / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    checkout.use(FAKE_TORCH="2.13.0")
    assert len(checkout.installed()) == 1


def test_a_failing_pip_is_explained_and_tried_again(checkout):
    done = checkout.use(FAKE_FAILURE="1")
    assert done.returncode == 1
    assert "pip says no" in done.stderr
    assert "error: pip install torch==2.13.0 failed; all of its output is in" in done.stderr
    assert checkout.installed() == ["torch==2.13.0"]
    assert checkout.use().returncode == 0
    assert len(checkout.installed()) == 2

def test_an_install_that_broke_off_is_not_taken_for_done(checkout):
    before = (checkout.folder / "pyproject.toml").read_text()
    checkout.use(FAKE_TORCH="2.13.0")
    (checkout.folder / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    assert checkout.use(FAKE_TORCH="2.13.0", FAKE_FAILURE="1").returncode == 1
    (checkout.folder / "pyproject.toml").write_text(before)
    checkout.installed()
    checkout.use(FAKE_TORCH="2.13.0")
    assert len(checkout.installed()) == 1


def test_no_python_is_explained(checkout, tmp_path):
    tools = tmp_path / "path"
    tools.mkdir()
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(shutil.which(name) or "")
    done = checkout.use(VIRTUAL_ENV="", PATH=str(tools))
    assert done.returncode == 1
    assert "error: no Python 3.10 or newer found" in done.stderr


@pytest.mark.parametrize(("name", "taken"), [("base", False), ("mine", True)])
def test_conda_environments_but_not_its_base(checkout, tmp_path, name, taken):
    made = tmp_path / ".venv" / "bin"
    made.mkdir(parents=True)
    (made / "python").write_text(PYTHON)
    (made / "python").chmod(0o755)
    done = checkout.use(VIRTUAL_ENV="", CONDA_PREFIX=str(checkout.env), CONDA_DEFAULT_ENV=name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{checkout.env if taken else made.parent}/bin/python\n")
