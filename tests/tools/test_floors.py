"""tools/floors.py passes on this checkout, and names what is wrong in trees that break each of its rules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SOUND = {
    "megalm/__init__.py": "__version__ = '0'",
    "megalm/errors.py": "class ConfigError(Exception): ...",
    "megalm/config/__init__.py": "",
    "megalm/config/run.py": "from megalm.errors import ConfigError\nfrom . import knobs",
    "megalm/config/knobs.py": "import dataclasses",
    "megalm/data/__init__.py": "",
    "megalm/data/indexed.py": "import numpy\nfrom megalm.config.run import x",
    "megalm/parallel/__init__.py": "",
    "megalm/parallel/topology.py": "import torch",
    "megalm/parallel/zero.py": "def start():\n    import deepspeed",
    "megalm/models/__init__.py": "",
    "megalm/models/gpt.py": "import torch\nfrom megalm_kernels import rms_norm",
    "megalm/train/__init__.py": "",
    "megalm/train/build.py": "from ..models import gpt\nfrom ..parallel.topology import Grid",
    "launchers/__init__.py": "",
    "launchers/pretrain.py": "from megalm.config import run\ndef main():\n    from megalm.train import build",
    "conf/__init__.py": "",
    "kernels/megalm_kernels/__init__.py": "import torch\nimport math",
}

BAD = {
    "up": ({"megalm/data/blend.py": "import megalm.train.build"}, "megalm.data.blend (F2) imports up to"),
    "up from a lazy import": (
        {"megalm/data/blend.py": "def f():\n    if True:\n        from megalm.models import gpt"},
        "blend.py:3: megalm.data.blend (F2) imports up to megalm.models.gpt (F3)",
    ),
    "up by a relative import": ({"megalm/data/blend.py": "from ..train.build import x"}, "up to megalm.train.build"),
    "up by its bare package": ({"megalm/data/blend.py": "from .. import train"}, "up to megalm.train (F7)"),
    "up in an __init__": ({"megalm/data/__init__.py": "from ..train import build"}, "up to megalm.train.build"),
    "up by a call": (
        {"megalm/data/blend.py": "import importlib\nx = importlib.import_module('..train.build', __package__)"},
        "up to megalm.train.build",
    ),
    "up for types only": (
        {"megalm/data/blend.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import megalm.models.gpt"},
        "up to megalm.models.gpt",
    ),
    "kernels up": ({"kernels/megalm_kernels/swiglu.py": "from megalm.errors import x"}, "up to megalm.errors"),
    "neighbour": ({"megalm/data/loader.py": "import megalm.parallel.topology"}, "imports its neighbour megalm.par"),
    "unknown room": ({"megalm/attic/box.py": ""}, "megalm.attic.box is on no floor"),
    "root package": ({"megalm/__init__.py": "from megalm.errors import ConfigError"}, "the root package imports"),
    "data room": ({"megalm/train/trainer.py": "import megalm.conf"}, "imports megalm.conf, which is data"),
    "models to parallel": (
        {"megalm/models/gpt.py": "def f():\n    from megalm.parallel import topology"},
        "megalm.models may not import megalm.parallel",
    ),
    "second owner": ({"megalm/train/build.py": "def f():\n    import deepspeed.ops"}, "only megalm.parallel.zero may"),
    "kernels on a third library": ({"kernels/megalm_kernels/x.py": "import numpy"}, "apex, torch, triton only"),
    "checkout only": ({"megalm/train/build.py": "from tools import floors"}, "a folder of the checkout"),
    "cycle of two": (
        {"megalm/data/x.py": "from . import y", "megalm/data/y.py": "def f():\n    from . import x"},
        "import cycle: megalm.data.",
    ),
    "cycle of three": (
        {f"megalm/data/{a}.py": f"import megalm.data.{b}" for a, b in ("xy", "yz", "zx")},
        "import cycle: megalm.data.x -> megalm.data.y -> megalm.data.z -> megalm.data.x",
    ),
    "itself": ({"megalm/data/blend.py": "import megalm.data.blend"}, "import cycle: megalm.data.blend"),
    "config with torch": (
        {"megalm/config/gpu.py": "def f():\n    import torch.cuda"},
        "may not load torch.cuda at any time",
    ),
    "config with torch, far away": (
        {"megalm/errors.py": "from torch import nn"},
        "megalm.config.run -> megalm.errors -> torch.nn",
    ),
    "verb that starts with torch": (
        {"launchers/pretrain.py": "from megalm.train import build"},
        "when it is loaded: megalm.launchers.pretrain -> megalm.train.build -> megalm.models.gpt -> torch",
    ),
    "torch by the package it lies in": (
        {"megalm/data/__init__.py": "import torch", "launchers/prepare.py": "import megalm.data.indexed"},
        "megalm.launchers.prepare -> megalm.data.indexed -> megalm.data -> torch",
    ),
}


def run_floors(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "floors.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_this_checkout_is_sound():
    done = run_floors()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "floors: 0 violations" in done.stdout


def test_a_sound_tree_passes(tmp_path):
    done = run_floors(str(write_tree(tmp_path, SOUND)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"floors: 0 violations, {len(SOUND)} modules\n"


@pytest.mark.parametrize("name", BAD)
def test_a_bad_tree_fails(tmp_path, name):
    files, message = BAD[name]
    done = run_floors(str(write_tree(tmp_path, SOUND | files)))
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stdout
    assert "floors: 0" not in done.stdout


def test_every_violation_is_counted(tmp_path):
    lines = "import megalm.train.build\nimport megalm.models.gpt"
    done = run_floors(str(write_tree(tmp_path, SOUND | {"megalm/data/blend.py": lines})))
    assert done.stdout.count("imports up to") == 2
    assert "floors: 2 violations" in done.stdout


def test_an_empty_tree_is_no_pass(tmp_path):
    done = run_floors(str(tmp_path))
    assert done.returncode == 1 and "no Python sources" in done.stdout
