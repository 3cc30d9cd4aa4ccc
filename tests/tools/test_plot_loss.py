"""tools/plot_loss.py draws what a run has left behind, and says what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megalm.config.reader import defaults_of
from megalm.config.run import RunConfig

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "plot_loss.py"
PNG = b"\x89PNG\r\n\x1a\n"


def plot(*arguments: str, cwd: Path = ROOT, blocked: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the script; `blocked` is a module that then is not installed."""
    block = f"import runpy, sys; sys.modules[{blocked!r}] = None; sys.argv = sys.argv[1:]; "
    start = ["-c", block + "runpy.run_path(sys.argv[0], run_name='__main__')", str(SCRIPT)] if blocked else [str(SCRIPT)]
    return subprocess.run([sys.executable, *start, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of four steps in tmp_path/runs/r, on a corpus in tmp_path/data; its last line is cut."""
    folder = tmp_path / "runs" / "r"
    folder.mkdir(parents=True)
    records = [{"step": step, "loss": 8.0 - step} for step in range(1, 5)] + [{"step": 4, "valid_loss": 4.25}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"step": 5, "lo')
    config = defaults_of(RunConfig)
    config["data"]["path"], config["cluster"]["num_processes"] = "data/corpus", 2
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text(
        json.dumps({"unigram_entropy_nats": 6.5, "files": {"corpus.bin": "", "corpus.idx": ""}})
    )
    return folder


def load() -> dict:
    import runpy

    return runpy.run_path(str(SCRIPT))


def test_it_draws_a_run(run_dir: Path):
    done = plot(str(run_dir))
    assert done.returncode == 0, done.stderr
    assert (run_dir / "loss.png").read_bytes().startswith(PNG)


def test_it_draws_a_run_without_config_where_it_is_told(run_dir: Path, tmp_path: Path):
    (run_dir / "config.yaml").unlink()
    done = plot(str(run_dir), "-o", str(tmp_path / "new" / "a.png"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(PNG)
    assert not (run_dir / "loss.png").exists()


def test_a_cut_line_is_left_out(run_dir: Path):
    assert [record["step"] for record in load()["read_metrics"](run_dir)] == [1, 2, 3, 4, 4]


def test_the_entropy_is_that_of_the_run(run_dir: Path):
    tool = load()
    config = tool["read_config"](run_dir)
    assert tool["find_entropy"](run_dir, config) == 6.5
    config["data"]["path"] = "data/other"  # the manifest speaks of another corpus
    assert tool["find_entropy"](run_dir, config) is None
    config["data"]["path"] = "nowhere/corpus"
    assert tool["find_entropy"](run_dir, config) is None


def test_the_title_names_the_layout(run_dir: Path):
    tool = load()
    assert "layout dp2" in tool["describe"](tool["read_config"](run_dir))
    assert tool["describe"]({}) == ""


def test_the_running_mean_neither_leads_nor_lags():
    mean = load()["running_mean"]
    values = [float(i) for i in range(40)]
    assert mean(values)[10:30] == pytest.approx(values[10:30])
    assert mean([2.0]) == [2.0]


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "valid_loss": 2.0}\n'])
def test_nothing_to_draw_is_an_error(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    done = plot(str(tmp_path))
    assert done.returncode == 2
    assert "metrics.jsonl" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "loss.png").exists()


def test_without_matplotlib_it_says_how_to_get_it(run_dir: Path):
    done = plot(str(run_dir), blocked="matplotlib")
    assert done.returncode == 2
    assert "pip install 'megalm[viz]'" in done.stderr and "Traceback" not in done.stderr
    assert not (run_dir / "loss.png").exists()
