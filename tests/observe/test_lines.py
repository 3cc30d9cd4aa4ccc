"""Files of any size and any content are read in bounded time, and what is left out is said."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megalm.observe import lines
from megalm.observe.lines import read_lines, read_object, read_tail


def test_noise_is_left_out_and_counted(tmp_path: Path) -> None:
    path, notes = tmp_path / "m.jsonl", []
    deep = "[" * 100_000
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n[1]\n\n' + deep.encode() + b'\n{"step": NaN}\n{"step": 2, "lo')
    found = list(read_lines(path, notes))
    assert [list(record) for record in found] == [["step"], ["step"]]
    assert notes == ["m.jsonl: 4 lines were left out, being cut short or no record"]


def test_a_long_line_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LONGEST", 100)
    path, notes = tmp_path / "m.jsonl", []
    path.write_text('{"text": "' + "x" * 1000 + '"}\n{"step": 2}\n')
    assert list(read_lines(path, notes)) == [{"step": 2}]
    assert notes


def test_of_a_large_file_evenly_spread_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "WHOLE", 10_000)
    monkeypatch.setattr(lines, "STRETCHES", 5)
    monkeypatch.setattr(lines, "STRETCH", 500)
    path, notes = tmp_path / "m.jsonl", []
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(10_000)))
    steps = [record["step"] for record in read_lines(path, notes)]
    assert steps[0] == 0 and steps[-1] == 9999
    assert steps == sorted(set(steps)) and 100 < len(steps) < 250
    assert any(2000 < step < 3000 for step in steps)
    assert len(notes) == 1 and "5 parts" in notes[0]  # no line that a part begins or ends in counts as cut
    assert [record["step"] for record in read_tail(path, 50)] == [9997, 9998, 9999]


def test_what_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.jsonl")  # to open it would wait for ever
    notes: list[str] = []
    assert list(read_lines(tmp_path / "m.jsonl", notes)) == []
    assert read_tail(tmp_path / "m.jsonl") == [] == read_tail(tmp_path / "none")
    assert read_object(tmp_path / "m.jsonl", notes) is None


def test_one_object(tmp_path: Path) -> None:
    notes: list[str] = []
    (tmp_path / "a.json").write_text('{"a": 1}')
    (tmp_path / "b.json").write_text('{"a"')
    assert read_object(tmp_path / "a.json", notes) == {"a": 1}
    assert read_object(tmp_path / "b.json", notes) is None
    assert notes == ["b.json is not one JSON object, and was left out"]
