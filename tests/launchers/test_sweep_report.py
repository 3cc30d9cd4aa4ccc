"""The report of a sweep: table, folds, pictures, the best point as a command; and nothing of the texts gets out of its place."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from megalm.errors import ConfigError
from megalm.launchers.compose import inspect, parse
from megalm.launchers.sweep.axis import Axis, axis_of
from megalm.launchers.sweep.draw import parallel, slices
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


def said(axis: Axis) -> list[str]:
    """The marks of an axis, which must lie on it in order and not on each other."""
    places = [place for place, _ in axis.ticks()]
    assert all(b - a > 0.05 for a, b in pairwise(places)) and places[0] >= 0 and places[-1] <= 1
    return [text for _, text in axis.ticks()]


def test_axes_of_numbers() -> None:
    lr = axis_of("lr", ["1e-4", "1e-2", "1e-3"])
    assert lr.log and lr.place("1e-3") == pytest.approx(0.5) and said(lr) == ["1e-4", "1e-3", "1e-2"]
    assert 0 < lr.place("1e-4") < 0.1, "no mark lies on the edge"
    drawn = axis_of("lr", [str(1e-5 * 10 ** (n / 5)) for n in range(20)])
    assert drawn.log and said(drawn) == ["1e-5", "1e-4", "1e-3", "1e-2", "1e-1"]
    narrow = axis_of("lr", [str(1e-3 * 10 ** (n / 10)) for n in range(8)])
    assert narrow.log and said(narrow) == ["1e-3", "2e-3", "5e-3"]
    assert said(axis_of("batch", ["16", "32", "64", "16"])) == ["16", "32", "64"]
    layers = axis_of("layers", ["2", "4", "6", "8", "2", "2"])
    assert not layers.log and said(layers) == ["2", "4", "6", "8"]
    decay = axis_of("decay", [str(n / 50) for n in range(1, 21)])
    assert not decay.log and said(decay) == ["0", "0.1", "0.2", "0.3", "0.4"]
    assert axis_of("x", ["2", "2"]).place("2") == 0.5 and said(axis_of("x", ["0", "0"])) == ["0"]
    assert said(axis_of("x", ["1", "1.0001", "2"])) != ["1", "1", "2"], "marks would lie on each other"


def test_axes_of_words_and_a_loss_that_is_off_the_top() -> None:
    words = axis_of("model", ["tiny", "large", "tiny"])
    assert words.place("tiny") < words.place("large") and axis_of("x", ["a"]).place("a") == 0.5
    assert axis_of("x", ["nan", "1"]).words == ("nan", "1")
    losses = [str(2 + n / 10) for n in range(10)]
    loss = axis_of("loss", [*losses, "50"], cut=True)
    assert loss.is_beyond("50") and loss.place("50") == 1 and loss.place("2.9") > 0.5
    assert not any(loss.is_beyond(text) for text in losses)


def test_a_loss_that_is_no_number_is_not_the_best(make: Make) -> None:
    sweep = read_sweep(make(*(([f"optim.lr={n}"], loss, "finished") for n, loss in enumerate([3.0, math.nan, 2.0, math.inf]))))
    assert [row.name for row in sweep.rows][:2] == ["2", "0"] and sweep.best is sweep.rows[0]
    assert len(slices(sweep)) == 1 and "nan" not in slices(sweep)[0][1]


def test_drawn_numbers_are_short_in_the_table_and_whole_in_the_command(make: Make) -> None:
    text = as_text(read_sweep(make((["optim.lr=0.00084619828"], 3.0, "finished"), (["optim.lr=0.01"], 4.0, "finished"))), 0)
    table, _, best = text.partition("best:")
    assert "0.0008462" in table and "0.00084619828" not in table and "optim.lr=0.00084619828" in best


def test_pictures_are_whole_and_show_every_point(make: Make) -> None:
    points = [([f"optim.lr={10**-n}", f"model={name}"], n + 1.0, "finished") for n, name in enumerate(["a", "b", "c"])]
    sweep = read_sweep(make(*points))
    for _, picture in slices(sweep):
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
