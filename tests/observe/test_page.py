"""The page: everything there is to see, nothing that a browser would run or fetch, whatever the folder says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalm.observe import lines
from megalm.observe.compare import differing, numbers
from megalm.observe.folder import read_run
from megalm.observe.page import about, render

MakeRun = Callable[..., Path]
NOW = 1_790_001_000.0
EVIL = "</title></style><script>alert(1)</script><img src=x onerror=alert(1)>\"'><svg onload=alert(1)>"
VOID = {"meta"}


class Reader(HTMLParser):
    """Collects elements and texts; every element must be closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(page: str) -> Reader:
    """Asserts that it is well formed, loads nothing and runs nothing."""
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    for tag, attributes in reader.tags:
        assert tag not in ("script", "img", "link", "iframe", "object", "embed", "form", "base", "a", "foreignobject", "animate")
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "href", "xlink:href", "srcdoc")]
    styles = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert len(styles) == 1 and not re.search(r"url\(|@import|expression", styles[0])
    assert all(re.fullmatch(r"(width|left|flex):[\d.]+%?", a["style"]) for _, a in reader.tags if "style" in a)
    policy = next(a["content"] for tag, a in reader.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'") and "script" not in policy
    return reader


def test_everything_is_on_it(make_run: MakeRun) -> None:
    run, parent = read_run(make_run("child", experts=True)), read_run(make_run("base", seed=3, floor=2.2, lr=3e-4))
    reader = read_page(render(run, parent, NOW, None))
    titles = re.findall(
        r"Loss, nats|Learning rate|Gradient norm|Throughput|Peak memory|Steps over|What the time|Experts' loads", reader.text
    )
    assert len(set(titles)) == 8
    said = ["finished", "76.2%", "60 steps done again", "tp2_dp2 on 4 ranks", "optim.lr", "0.0003", "two failures in an hour"]
    said += ["node3", "Peak of step 3", "failed: rank died", "SIGUSR1", "8 min 20 s, 76.2%"]
    assert [text for text in said if text not in reader.text] == []
    names = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(names) == len(set(names))
    assert run.notes == []


def test_a_run_alone(make_run: MakeRun) -> None:
    text = read_page(render(read_run(make_run()), None, NOW, None)).text
    assert "Beside its parent" not in text and "Experts" not in text


@pytest.mark.parametrize("kept", ["config.yaml", "metrics.jsonl", "events.jsonl", "progress.json", "memory.json", "none"])
def test_of_one_file_alone(kept: str, make_run: MakeRun) -> None:
    folder = make_run()
    for path in folder.iterdir():
        if path.is_file() and path.name != kept:
            path.unlink()
    read_page(render(read_run(folder), read_run(folder), NOW, None))


def test_evil_texts_stay_texts(make_run: MakeRun) -> None:
    """In every place that a text of the folder could come from."""
    folder = make_run(experts=True)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"] |= {"architecture": EVIL, EVIL: EVIL, "num_layers": [EVIL]}
    config[EVIL] = {EVIL: EVIL}
    config["train"]["precision"] = EVIL
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    event = {
        "reason": EVIL,
        "message": EVIL,
        "host": EVIL,
        "node": EVIL,
        "signal": EVIL,
        EVIL: EVIL,
        "attempt": EVIL,
        "job": EVIL,
    }
    with open(folder / "events.jsonl", "a") as file:
        for kind in ("started", "stopping", "failed", "excluded", EVIL, "started"):
            file.write(json.dumps({**event, "hosts": [EVIL, 3], "ranks": EVIL, "time": NOW, "kind": kind}) + "\n")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 1001, EVIL: 3, "loss": EVIL, "moe_layers": {EVIL: {"load": [1, EVIL]}}}) + "\n")
    (folder / "progress.json").write_text(json.dumps({"step": 5, EVIL: EVIL, "attempt": EVIL}))
    rank = {"rank": EVIL, "measured": 5, "predicted": 4, "parts": {EVIL: 3}}
    (folder / "memory.json").write_text(json.dumps({"step": EVIL, "layout": EVIL, "ranks": [rank, EVIL, {}]}))
    (folder / "logs").mkdir()
    (folder / "logs" / "report-<b>.txt").write_text(f"{EVIL}\n{EVIL}\x1b")
    evil = folder.rename(folder.with_name("<script>alert(1)<"))
    run = read_run(evil)
    page = render(run, run, NOW, None)
    reader = read_page(page)
    assert "<script" not in page and "<img" not in page and page.count("</style>") == 1
    assert reader.text.count("<script>alert(1)</script>") > 15
    assert "report-<b>.txt" in reader.text and "\x1b" not in page


def test_odd_numbers(make_run: MakeRun) -> None:
    folder = make_run()
    with open(folder / "metrics.jsonl", "a") as file:
        for step, loss in ((1001, "NaN"), (1002, "Infinity"), (1003, "1e308"), (1004, "-1e308"), (1e300, "1"), (-1e300, "2")):
            file.write(
                f'{{"step": {step}, "loss": {loss}, "time": {loss}, "seconds_per_step": {loss}, "tokens_per_second": {loss}}}\n'
            )
    (folder / "memory.json").write_text('{"ranks": [{"measured": 0, "predicted": 1}, {"measured": 1e-300, "predicted": 1e300}]}')
    read_page(render(read_run(folder), None, NOW, None))


def test_a_large_file_gives_a_small_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "WHOLE", 4 << 20)
    monkeypatch.setattr(lines, "STRETCHES", 4)
    line = '{"step": %d, "loss": 2.5, "lr": 0.001, "grad_norm": 1.5, "tokens": 1}\n'
    with open(tmp_path / "metrics.jsonl", "w") as file:
        file.writelines(line % step for step in range(100_000))
    page = render(read_run(tmp_path), None, NOW, None)
    assert len(page) < 300_000
    assert "4 parts of 1 MiB" in read_page(page).text


def test_a_parent_beside_it(make_run: MakeRun) -> None:
    run, parent = read_run(make_run("a")), read_run(make_run("b", seed=1, floor=2.5, lr=3e-4))
    assert differing(run, parent) == [("optim.lr", 3e-4, 1e-3), ("train.seed", 1, 0)]
    rows = {row[0]: row[1:] for row in numbers(run, parent)}
    assert float(rows["training loss at step 1,000"][2]) == pytest.approx(-0.5, abs=0.1)
    assert float(rows["validation loss at step 1,000"][2]) == pytest.approx(-0.5)
    parent.columns["loss"] = parent.columns["loss"][:300]
    assert "training loss at step 300" in {row[0] for row in numbers(run, parent)}


def test_about_a_run_of_another_version(make_run: MakeRun) -> None:
    run = read_run(make_run())
    assert about(run) == "llama, 4 layers of 128; layout tp2_dp2 on 4 ranks; 2,048 tokens per step; fp32"
    run.config |= {"parallel.unknown": 1, "data.seq_length": "x"}
    assert about(run) == "llama, 4 layers of 128; fp32"
