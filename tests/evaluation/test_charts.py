"""Plots: well-formed, and every mark where its value belongs."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sstf.evaluation.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Bar, bars, lines, stacked, standalone, ticks


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def test_points_of_a_line() -> None:
    root = parsed(lines({"a": [(1, 0.0), (2, 1.0)], "b": [(2, 0.5)]}, "T <&>", "x", "y"))
    marks = root.findall("circle")
    assert [float(mark.attrib["cy"]) for mark in marks] == [
        HEIGHT - BOTTOM, TOP, (HEIGHT - BOTTOM + TOP) / 2,
    ]  # fmt: skip
    assert marks[1].attrib["cx"] == marks[2].attrib["cx"], "the same x"
    assert [mark.attrib["class"] for mark in marks] == ["mark s0", "mark s0", "mark s1"]
    assert root.attrib["aria-label"] == "T <&>"
    assert [mark.findtext("title") for mark in marks][1] == "a: 2, 1"


def test_a_doubling_axis() -> None:
    root = parsed(lines({"a": [(64, 1), (128, 1), (256, 1)]}, "", "", "", doubling=True))
    first, second, third = (float(mark.attrib["cx"]) for mark in root.findall("circle"))
    assert second - first == pytest.approx(third - second, abs=0.2)


def test_heights_of_bars() -> None:
    root = parsed(bars(["g", "h"], {"a": [Bar(1.0), Bar(2.0, 1.5, 2.5)], "b": [None, Bar(0.5)]}, "t", "y"))
    marks = [rect for rect in root.findall("rect") if rect.find("title") is not None]
    heights = [float(rect.attrib["height"]) for rect in marks]
    assert len(heights) == 3
    assert heights[1] / heights[0] == pytest.approx(2, abs=0.01)
    assert heights[2] / heights[0] == pytest.approx(0.5, abs=0.01)
    assert marks[1].findtext("title") == "h, a: 2 (1.5 to 2.5)"
    assert len([line for line in root.findall("line") if line.attrib["class"] == "axis"]) == 1


def test_parts_stand_behind_one_another() -> None:
    root = parsed(stacked(["x", "y"], {"a": [1.0, 2.0], "b": [3.0, 0.0]}, "t", "ms"))
    first, second = [rect for rect in root.findall("rect") if (rect.findtext("title") or "").startswith("x")]
    assert float(second.attrib["x"]) == pytest.approx(float(first.attrib["x"]) + float(first.attrib["width"]), abs=0.2)
    assert float(second.attrib["width"]) == pytest.approx(3 * float(first.attrib["width"]), abs=0.2)


def test_nothing_to_plot() -> None:
    assert lines({"a": []}, "", "", "") == ""
    assert bars([], {}, "", "") == ""
    assert stacked(["x"], {"a": [0.0]}, "", "") == ""


def test_a_file_of_its_own_has_its_colours() -> None:
    root = parsed(standalone(lines({"a": [(1, 1)]}, "t", "x", "y")))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    style = root.findtext("{http://www.w3.org/2000/svg}style")
    assert style is not None and ".mark.s0{fill:#1f6feb}" in style


@given(st.floats(-10, 10), st.floats(1e-3, 1e4))
def test_ticks_cover_the_range(low: float, length: float) -> None:
    found = ticks(low, low + length)
    assert found[0] == pytest.approx(low, abs=1e-9) and found[-1] >= (low + length) * (1 - 1e-9) - 1e-6
    assert 2 <= len(found) <= 12


@pytest.mark.parametrize("line", [[(5, 0.0)], [(0, 1e-9), (1, 0.0)], [(0, 1000.0), (1, 3.0)]])
def test_lines_of_any_values_are_inside(line: list[tuple[float, float]]) -> None:
    for mark in parsed(lines({"a": line}, "t", "x", "y")).findall("circle"):
        assert LEFT <= float(mark.attrib["cx"]) <= WIDTH - RIGHT
        assert TOP - 0.1 <= float(mark.attrib["cy"]) <= HEIGHT - BOTTOM + 0.1
