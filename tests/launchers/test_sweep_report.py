"""The report of a sweep: table, folds, pictures, the best point as a command; and nothing of the texts gets out of its place."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from megalm.errors import ConfigError
from megalm.launchers.compose import inspect, parse
from megalm.launchers.sweep.draw import axis_of, parallel, slices
from megalm.launchers.sweep.report import as_page, as_text, report
from megalm.launchers.sweep.results import read_sweep
from megalm.runfolder import Progress, Result, write_progress, write_result

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """make((overrides, loss, status), ...): a sweep's folder; a loss of None has no result."""
    monkeypatch.chdir(tmp_path)

    def write(*points: tuple[list[str], float | None, str]) -> Path:
        root = tmp_path / "sweep"
        for number, (overrides, loss, status) in enumerate(points):
            folder = root / str(number)
            folder.mkdir(parents=True)
            arguments = ["model=tiny", *overrides, f"train.run_dir={folder}"]
            told = {"settings": str(number), "overrides": overrides, "verb": "pretrain", "arguments": arguments}
            (folder / "point.json").write_text(json.dumps(told | {"directory": str(tmp_path)}))
            if loss is not None:
                write_result(folder, Result(loss, 20, status, "valid_loss"))
        return root

    return write


def test_table_and_best_command(make: Make) -> None:
    root = make(
        (["optim.lr=0.1", "train.steps=20"], 3.0, "finished"),
        (["optim.lr=0.01", "train.steps=20"], 2.0, "finished"),
        (["optim.lr=0.001", "train.steps=20"], 1.5, "pruned"),
        (["optim.lr=0.0001", "train.steps=20"], None, ""),
    )
    write_progress(root / "3", Progress(7, 20, 0, 0.0))
    sweep = read_sweep(root)
    assert sweep.keys == ["optim.lr"] and [row.name for row in sweep.rows] == ["2", "1", "0", "3"]
    best = sweep.best
    assert best is not None and best.name == "1"  # a pruned point was not worth going on with
    words = shlex.split(best.command)
    assert words[:2] == ["megalm", "pretrain"] and "train.run_dir=runs/best" in words
    config, problems = inspect(parse("pretrain", words[2:]))
    assert not problems and config.optim.lr == 0.01
    text = as_text(sweep, 2)
    assert "and 2 more" in text and "stalled" in as_text(sweep, 0), "a step was written, long ago"


def test_a_sweep_from_elsewhere_names_its_directory(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make((["optim.lr=0.1"], 3.0, "finished"))
    monkeypatch.chdir("/")
    best = read_sweep(root).best
    assert best is not None and best.command.startswith(f"cd {root.parent} && megalm pretrain ")


def test_folds_have_a_mean_and_a_spread(make: Make) -> None:
    losses = {(lr, fold): base + fold for lr, base in ((0.1, 3.0), (0.2, 1.0)) for fold in range(3)}
    points = [([f"optim.lr={lr}", f"data.fold={fold}"], loss, "finished") for (lr, fold), loss in losses.items()]
    half = [(["optim.lr=0.3", "data.fold=0"], 0.5, "finished"), (["optim.lr=0.3", "data.fold=1"], None, "")]
    sweep = read_sweep(make(*points, *half))
    assert [(row.values, row.loss, row.spread, row.folds) for row in sweep.groups[1:]] == [
        ({"optim.lr": "0.2"}, 2.0, 1.0, 3),
        ({"optim.lr": "0.1"}, 4.0, 1.0, 3),
    ]
    assert sweep.groups[0].status == "1 of 2 finished"
    best = sweep.best  # not the one of which a fold is missing
    assert best is not None and best.name == "3, 4, 5" and "data.fold" not in best.command
    assert "2.0000 +- 1.0000 (3 folds)" in as_text(sweep, 0)


def test_axes() -> None:
    lr = axis_of("lr", ["1e-4", "1e-2", "1e-3"])
    assert lr.log and (lr.place("1e-4"), lr.place("1e-3"), lr.place("1e-2")) == pytest.approx((0, 0.5, 1))
    assert [text for _, text in axis_of("n", ["1", "4"]).ticks()] == ["1", "2", "3", "4"]
    assert [text for _, text in axis_of("n", ["1", "4", "4"]).ticks()] == ["1", "4"]
    words = axis_of("model", ["tiny", "large", "tiny"])
    assert [words.place("tiny"), words.place("large")] == [0, 1]
    assert axis_of("x", ["2", "2"]).place("2") == 0.5 and axis_of("x", ["a"]).place("a") == 0.5
    assert axis_of("x", ["nan", "1"]).words == ("nan", "1")


def test_pictures_are_whole_and_show_every_point(make: Make) -> None:
    points = [([f"optim.lr={10**-n}", f"model={name}"], n + 1.0, "finished") for n, name in enumerate(["a", "b", "c"])]
    sweep = read_sweep(make(*points))
    for picture in slices(sweep):
        assert len(ElementTree.fromstring(picture).findall("circle")) == 3
    lines = ElementTree.fromstring(parallel(sweep)).findall("polyline")
    assert len(lines) == 3 and all(len(line.get("points", "").split()) == 3 for line in lines)


def test_page_and_pngs(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    root = make((["optim.lr=0.1", "train.seed=1"], 3.0, "finished"), (["optim.lr=0.01", "train.seed=2"], 2.0, "pruned"))
    report(SimpleNamespace(sweep=SimpleNamespace(folder=str(root), rows=0, output="")))
    written = [Path(line).name for line in capsys.readouterr().out.splitlines()[-3:]]
    assert written == ["report.html", "slices.png", "parallel.png"]
    assert (root / "slices.png").read_bytes()[:4] == b"\x89PNG" and (root / "parallel.png").stat().st_size > 5000
    page = (root / "report.html").read_text()
    assert "default-src 'none'" in page and "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")


def test_texts_stay_texts(make: Make) -> None:
    evil = "<script>alert(1)</script>"
    page = as_page(read_sweep(make(([f"model={evil}"], 1.0, "finished"), (["model=b"], 2.0, evil))))
    assert "<script" not in page and "&lt;script&gt;" in page and "&amp;lt;" not in page


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no point of a sweep"):
        read_sweep(tmp_path)
