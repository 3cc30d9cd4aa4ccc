"""Numbers, times and texts as they are written; nothing that a file says reaches a terminal or a page as it is."""

from __future__ import annotations

import math

import pytest

from megalm.observe.words import clean, count, duration, moment, number, safe, short, size, told


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (61, "1 min 1 s"),
        (9060, "2 h 31 min"),
        (273600, "3 d 4 h"),
        (86400, "1 d"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers() -> None:
    assert [count(value) for value in (7, 1234, 1.234e6, 5e9, 0.25)] == ["7", "1,234", "1.23 M", "5 G", "0.25"]
    assert [short(value) for value in (0, 1e-5, 2.34567, 12345)] == ["0", "1e-05", "2.346", "12,345"]
    assert [size(value) for value in (5, 2048, 3 * 2**30)] == ["5 B", "2 KiB", "3 GiB"]


@pytest.mark.parametrize("value", ["1", None, True, math.nan, math.inf, 1e101, 10**400, [], {}])
def test_what_is_no_number(value: object) -> None:
    assert number(value) is None


def test_a_moment_that_is_none() -> None:
    assert moment(0, utc=True) == "1970-01-01 00:00:00"
    assert moment(None) == moment(1e300) == moment(-1e300) == "-"


def test_texts_are_harmless() -> None:
    assert clean("a\x1b[31mb\nc\u202ed\ud800") == "a?[31mb c?d?"
    assert clean("x" * 1000, 10) == "x" * 10 + "..."
    assert safe("<script>\"'&") == "&lt;script&gt;&quot;&#x27;&amp;"
    deep: list = []
    for _ in range(40):
        deep = [deep, deep]  # 2**40 lists, if it were written out
    assert len(clean(deep)) < 400


def test_an_event_in_words() -> None:
    event = {"time": 1, "kind": "failed", "host": "n1", "reason": "died", "message": "signal 9", "pid": 3, "hosts": ["a", "b"]}
    assert told(event) == "died; signal 9; host n1, hosts a b"
    assert told({"time": 1, "kind": "failed", "bad_nodes": {"n1": "no GPU"}, "job": None}) == "bad_nodes n1: no GPU"
