"""What is on disk is what pip installs: packages, yaml, the console script and the libraries it needs."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
# Distributions whose module has another name, and modules that are looked for and never required.
MODULE_OF = {"hydra-core": "hydra", "pyyaml": "yaml", "pytest-timeout": "pytest_timeout"}
PLUGINS = "megalm.launchers.hydra.hydra_plugins"
PROBED = {"apex", "amp_C"}


def package_folder(package: str) -> Path:
    """Where a package's files lie, by the mapping in pyproject.toml."""
    mapped = SETUPTOOLS["package-dir"]
    above, tail = package, ""
    while above and above not in mapped:
        above, _, last = above.rpartition(".")
        tail = f"{last}/{tail}"
    return ROOT / mapped.get(above, "") / tail


def packages_on_disk() -> set[str]:
    """Every folder with Python files, by the name that it must be imported by."""
    names = {
        "megalm": "megalm",
        "launchers": "megalm.launchers",
        "conf": "megalm.conf",
        "kernels/megalm_kernels": "megalm_kernels",
        "kernels/benchmarks": "megalm_kernels.benchmarks",
    }
    assert {f"kernels/{folder.parent.name}" for folder in (ROOT / "kernels").glob("*/*.py")} <= set(names)
    folders = [(file.parent.relative_to(ROOT / top), name) for top, name in names.items() for file in (ROOT / top).rglob("*.py")]
    return {".".join([name, *folder.parts]) for folder, name in folders}


def test_every_package_is_listed():
    assert packages_on_disk() == set(SETUPTOOLS["packages"])


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_every_package_can_be_imported(package):
    folder = package_folder(package)
    if package == PLUGINS:  # a namespace, which Hydra shares between all that bring plugins
        assert not (folder / "__init__.py").exists() and not (folder.parent / "__init__.py").exists()
        return
    assert (folder / "__init__.py").is_file()
    assert Path(importlib.import_module(package).__file__ or "").parent == folder


def test_hydra_finds_every_plugin():
    """In a process that has imported megalm.launchers and nothing else of ours; from a wheel as from the checkout."""
    code = "import megalm.launchers; from hydra.core.plugins import Plugins; from hydra.plugins.plugin import Plugin; "
    code += "print(*(p.__module__ for p in Plugins.instance().discover(Plugin)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    files = {f"hydra_plugins.{file.stem}" for file in package_folder(PLUGINS).glob("*.py")}
    assert files and files <= set(said.split())


def test_what_must_not_be_a_package_is_none():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would hide PyPI's `kernels` from transformers"
    assert not list((ROOT / "tests").rglob("__init__.py")), "tests/kernels would become a module `kernels`"


def test_every_yaml_is_shipped():
    assert SETUPTOOLS["include-package-data"] is False
    patterns = SETUPTOOLS["package-data"]["megalm.conf"]
    shipped = {file for pattern in patterns for file in (ROOT / "conf").glob(pattern)}
    on_disk = {file for file in (ROOT / "conf").rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert on_disk - shipped == {ROOT / "conf" / "__init__.py"}
    assert len(shipped) >= 10


def test_packages_hold_nothing_that_is_not_shipped():
    files = {file for package in SETUPTOOLS["packages"] for file in package_folder(package).iterdir() if file.is_file()}
    data = SETUPTOOLS["package-data"].items()
    shipped = {file for package, patterns in data for pattern in patterns for file in package_folder(package).glob(pattern)}
    left_out = {f for f in files - shipped if f.suffix not in (".py", ".pyc") and f.parent != ROOT / "conf"}
    assert not left_out, "list them under [tool.setuptools.package-data]"


@pytest.mark.parametrize("script", PROJECT["project"]["scripts"].values())
def test_console_script_exists(script):
    module, _, function = script.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def declared_modules() -> set[str]:
    """Top-level modules of the dependencies and extras in pyproject.toml."""
    project = PROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    names = [re.split(r"[^A-Za-z0-9_-]", line)[0] for line in lines]
    return {MODULE_OF.get(name, name) for name in names}


def test_every_library_is_declared():
    imported: dict[str, Path] = {}
    for package in SETUPTOOLS["packages"]:
        for file in package_folder(package).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported.update({alias.name.split(".")[0]: file for alias in node.names})
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    imported[str(node.module).split(".")[0]] = file
    own = {"megalm", "megalm_kernels"} | set(sys.stdlib_module_names) | PROBED
    missing = {name: str(file) for name, file in imported.items() if name not in own | declared_modules()}
    assert not missing, "add them to pyproject.toml"
    assert {"torch", "numpy", "hydra"} <= set(imported)
