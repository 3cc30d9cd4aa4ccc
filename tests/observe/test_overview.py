"""One look at a run: its numbers as text, as a line, as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.observe.folder import read_run
from megalm.observe.overview import as_json, as_line, as_text, look

MakeRun = Callable[..., Path]
END = 1_790_000_000.0 + 500 + 5 + 150


def test_a_run_that_goes_on(make_run: MakeRun) -> None:
    folder = make_run(steps=1500)
    lines = (folder / "events.jsonl").read_text().splitlines()
    (folder / "events.jsonl").write_text("\n".join(line for line in lines if '"finished"' not in line) + "\n")
    seen = look(read_run(folder, metrics=False), END + 3, None)
    assert seen.verdict.state == "running" and seen.silent == pytest.approx(2.6)  # the last checkpoint was later
    assert seen.seconds_left == pytest.approx(500 * 0.5)
    text = as_text(seen, 3, END, colour=False)
    assert "[##########################--------------] step 1,000 of 1,500, 66.7%" in text
    assert "to go         4 min 10 s, done " in text and "restarts      2" in text and "step 1,000, 900" in text
    assert "1.1     " in text and "700 to 1,000" in text and "node1 +1" in text and "goes on" in text
    assert text.count("saved") == 3 and "\x1b" not in text
    assert as_line(seen).startswith("running  step 1,000 of 1,500  loss ") and as_line(seen).endswith("4 min 10 s to go")
    assert "\x1b[1;32mRUNNING\x1b[0m" in as_text(seen, 0, END, colour=True)


def test_as_json_everything_is_there(make_run: MakeRun) -> None:
    seen = look(read_run(make_run(), metrics=False), END, None)
    told = json.loads(json.dumps(as_json(seen)))
    assert (told["state"], told["exit_code"], told["step"], told["steps"], told["saved_step"]) == (
        "finished",
        0,
        1000,
        1000,
        1000,
    )
    assert (told["restarts"], told["checkpoints"], told["seconds_left"]) == (2, [900, 1000], None)
    assert [start["attempt"] for start in told["starts"]] == ["0.0", "1.0", "1.1"]


def test_codes_for_the_terminal_do_not_get_through(make_run: MakeRun) -> None:
    folder = make_run()
    with open(folder / "events.jsonl", "a") as file:
        file.write(json.dumps({"time": END, "kind": "failed\x1b[2J", "reason": "\x1b]0;owned\x07", "\x1b[1m": "\r\n"}) + "\n")
    text = as_text(look(read_run(folder, metrics=False), END, None), 5, END, colour=False)
    assert "\x1b" not in text and "\x07" not in text and "\r" not in text


def test_an_empty_folder(tmp_path: Path) -> None:
    seen = look(read_run(tmp_path, metrics=False), END, None)
    assert seen.verdict.state == "stalled"
    assert "step 0" in as_text(seen, 5, END, colour=False) and as_line(seen)
