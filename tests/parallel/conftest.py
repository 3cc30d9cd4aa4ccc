"""What to start under an agent: see dummies.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megalm.parallel import agent as agent_module
from megalm.parallel.squad import Squad
from tests.parallel.dummies import WORKER


@pytest.fixture
def squad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """squad("kill", first_rank, ranks here, ranks in all): what to start."""
    (tmp_path / "path" / "dummy_ranks").mkdir(parents=True)
    (tmp_path / "path" / "dummy_ranks" / "__init__.py").touch()
    (tmp_path / "path" / "dummy_ranks" / "worker.py").write_text(WORKER)
    (tmp_path / "logs").mkdir()
    root = Path(__file__).parents[2]
    paths = [str(tmp_path / "path"), str(root), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setattr(agent_module, "_NOTE_SECONDS", 0.3)

    def build(what: str, first_rank: int = 0, here: int = 2, world_size: int = 2) -> Squad:
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        words = [what, str(tmp_path)]
        return Squad("dummy_ranks.worker", words, tmp_path / "logs", environ, first_rank, here, world_size, quiet=True)

    return build
