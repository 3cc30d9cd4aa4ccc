"""tools/draw_reliability.py: what a run's files tell of a fault, and the table that is made of it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megalm.runfolder import note_event
from tools.draw_reliability import DOCUMENT, FAULTS, VARIABLE, Fault, Row, append, draw


def test_a_fault_is_told_by_the_runs_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 60 was done, 50 was saved: noticed after 2 s, the first step after 9 s, 10 steps done again."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "rows"))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "time": float(i)}) + "\n" for i in range(1, 61)))
    note_event(tmp_path, "failed", reason="an earlier one")
    time.sleep(0.01)
    fault = Fault("killed rank", tmp_path, "tests/test_it.py")
    now = fault.began
    for kind, after, more in (("saved", 1, {}), ("failed", 2, {}), ("started", 7, {"step": 50, "reached": 58})):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda after=after: now + after)
            note_event(tmp_path, kind, **more)
    lines = [{"step": i, "time": float(i)} for i in range(1, 51)] + [{"step": 50 + i, "time": now + 8 + i} for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = fault.note("restarted in place", identical=True)
    assert row == Row("killed rank", pytest.approx(2), pytest.approx(9), 10, "restarted in place", True, "tests/test_it.py")
    (line,) = (tmp_path / "rows" / "rows.jsonl").read_text().splitlines()
    assert {"machine", "versions", "time"} < set(json.loads(line))


def test_an_end_has_no_recovery(tmp_path: Path) -> None:
    fault = Fault("crash loop", tmp_path)
    with pytest.raises(RuntimeError, match=r"crash loop: nothing in .* tells of it"):
        fault.note("the job ends")
    note_event(tmp_path, "gave_up", reason="twice")
    row = fault.note("the job ends")
    assert row.detected is not None and row.detected >= 0 and (row.recovered, row.lost) == (None, None)


def test_without_the_variable_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    append(Row("bad node", 1.0, 2.0, 0, "left out"))
    assert not list(tmp_path.iterdir())


def test_a_fault_has_a_name_of_the_table() -> None:
    with pytest.raises(ValueError, match="is none of killed rank, "):
        Row("killed rnak", None, None, None, "")


def test_the_table_says_worst_and_missing() -> None:
    where = {"machine": "2 cores", "versions": "Python 3", "time": 0.0, "load": 1.5}
    rows = [Row("killed rank", 1.0, seconds, lost, "again", True, "a") for seconds, lost in ((5.0, 3), (7.0, 3), (30.0, 9))]
    rows.append(Row("bad node", 1.0, None, None, "left out", None, "b"))
    text = draw([{**vars(row), **where} for row in rows])
    assert text == draw([{**vars(row), **where} for row in [*rows, rows[0]]]), "the same one twice"
    assert "| 1.0 s (at most 1.0 s) | 7.0 s (at most 30.0 s) | 3-9 steps | again | identical | 3 |" in text
    assert "| bad node | a node fails the look before the start | 1.0 s |  |  | left out |  | 1 |" in text
    assert "| flipped bit | one bit of a checkpoint is another |  |  |  | not measured |  | 0 |" in text
    assert "Measured 1970-01-01, at a load average of 1.5 to 1.5:" in text
    rows.append(Row("killed rank", 1.0, 5.0, 3, "again"))
    assert "identical in the 3 compared | 4 |" in draw([{**vars(row), **where} for row in rows])
    different = draw([{**vars(Row("killed rank", 1.0, 2.0, 0, "again", False)), **where}])
    assert "1 of 1 DIFFER" in different


def test_the_document_is_of_this_table() -> None:
    """Every fault has a line of its own, in this order, and no losses differ."""
    lines = DOCUMENT.read_text().splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| ") and not line.startswith("| fault")]
    assert list(dict.fromkeys(names)) == list(FAULTS)
    assert "DIFFER" not in DOCUMENT.read_text()
