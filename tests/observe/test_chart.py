"""Charts: the right picture of the numbers, small however many there are, never broken by odd ones."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest

from megalm.observe.chart import POINTS, Chart, Line, Mark, draw, limits, running_median, thinned, ticks


def svg(chart: Chart) -> ET.Element:
    return ET.fromstring(draw(chart, 400, 216, "c0"))


def curve(root: ET.Element, style: str) -> list[tuple[float, float]]:
    line = next(e for e in root.iter("polyline") if e.attrib["class"] == f"line {style}")
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]


def test_points_are_where_they_belong() -> None:
    points = curve(svg(Chart("t", [Line("l", [(0, 0), (5, 10), (10, 5)])])), "a")
    assert [x for x, _ in points] == pytest.approx([54, 222, 390])
    low, high, middle = (y for _, y in points)
    assert high < middle < low and middle == pytest.approx((low + high) / 2, abs=0.1)


def test_a_long_curve_keeps_its_extremes() -> None:
    points = [(float(x), 1.0) for x in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    means, spans = thinned(points)
    assert len(means) == len(spans) == POINTS
    assert max(high for _, _, high in spans) == 9.0
    assert len(draw(Chart("t", [Line("l", points)]), 400, 216, "c0")) < 60_000


def test_spikes_are_cut_off() -> None:
    values = [1.0 + i / 100 for i in range(99)] + [1000.0]
    assert limits(values)[1] < 3
    assert limits([1.0, 2.0, 3.0, 4.0])[1] > 4
    assert limits([5.0, 5.0]) == (4.75, 5.25)
    assert limits([0.0]) == (-1.0, 1.0)
    assert limits([2.0, 3.0], from_zero=True)[0] == 0


def test_what_is_cut_off_is_said() -> None:
    points = [(float(x), 1.0 + x / 100) for x in range(99)]
    assert "cut off" not in draw(Chart("t", [Line("l", points)]), 400, 216, "c0")
    assert "cut off above; up to 1,000" in draw(Chart("t", [Line("l", [*points, (99.0, 1000.0)])]), 400, 216, "c0")


def test_marks_outside_are_left_out() -> None:
    chart = Chart("t", [Line("l", [(4, 1.0), (8, 2.0)])], [Mark(2, "before"), Mark(6, "inside")])
    assert "inside" in draw(chart, 400, 216, "c0") and "before" not in draw(chart, 400, 216, "c0")
    chart.reach = 10
    assert "before" in draw(chart, 400, 216, "c0")
    assert [x for x, _ in curve(svg(chart), "a")] == pytest.approx([54 + 0.4 * 336, 54 + 0.8 * 336], abs=0.1)


def test_running_median() -> None:
    points = [(float(i), 1.0 + (100.0 if i == 50 else 0.0)) for i in range(100)]
    assert {y for _, y in running_median(points)} == {1.0}
    steep = [(float(i), 100.0 - i) for i in range(20)]
    assert running_median(steep)[0] == (0.0, 100.0)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7.5), (1e-9, 2e-9), (0, 1e300), (1e12, 1e12 + 5), (0.1, 0.1)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert 1 <= len(found) <= 6 and all(low <= value <= high or math.isclose(value, low) for value in found)


@pytest.mark.parametrize(
    "points",
    [
        [(1.0, 2.0)],
        [(1.0, 2.0), (1.0, 2.0)],
        [(1.0, 1e100), (2.0, -1e100)],
        [(1.0, 0.0), (1e15, 0.0)],
        [(1.0, 5e-324), (2.0, 0.0)],
    ],
)
def test_odd_numbers(points: list[tuple[float, float]]) -> None:
    text = draw(Chart("t", [Line("l", points, dots=True, smooth=True)], [Mark(1.0, "m")]), 400, 216, "c0")
    ET.fromstring(text)
    assert not re.search(r"nan|inf", re.sub(r"<title>.*?</title>|<text.*?</text>", "", text))


def test_values_under_the_pointer() -> None:
    root = svg(Chart("t", [Line("one", [(1, 10.0), (2, 20.0)]), Line("two", [(2, 7.0)], "b")]))
    tips = [[text.text for text in group.iter("text")] for group in root.iter("g") if group.attrib.get("class") == "tip"]
    assert tips == [["step 1", "one 10"], ["step 2", "one 20", "two 7"]]


def test_texts_are_escaped() -> None:
    chart = Chart('</svg><script>"', [Line("<b>", [(1, 1.0)])], [Mark(1, "<i>")], name_x="<u>")
    text = draw(chart, 400, 216, "c0")
    assert not re.search(r"<(script|b|i|u)>", text)
    ET.fromstring(text)
