"""Plots as files: what is in the folder, what the pixels show, and what is said where there can be no PNG."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import resvg_py
from PIL import Image

from sstf.evaluation.charts import HEIGHT, WIDTH, Bar, bars, lines
from sstf.evaluation.plot_files import NO_FONTS, NO_LIBRARY, ZOOM, write_plots

PLOTS = {
    "one": lines({"a": [(1, 0.0), (2, 1.0)]}, "Title", "x", "y"),
    "two": bars(["g"], {"a": [Bar(1.0)], "b": [Bar(2.0)]}, "", "y"),
}


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def near(image: np.ndarray, colour: str) -> np.ndarray:
    """Where the picture has a colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.asarray(np.abs(image - wanted).max(-1) < 8)


def test_svg_and_png_side_by_side(tmp_path: Path) -> None:
    notes: list[str] = []
    assert write_plots(tmp_path, PLOTS, notes.append) == {"one": "one.png", "two": "two.png"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.png", "one.svg", "two.png", "two.svg"]
    assert notes == []
    assert write_plots(tmp_path / "none", {}, notes.append) == {} and not (tmp_path / "none").exists()


def test_what_the_pixels_show(tmp_path: Path) -> None:
    """The bars' colours, the second one twice as high as the first; text that is dark on white."""
    write_plots(tmp_path, PLOTS)
    image = pixels(tmp_path / "two.png")
    assert image.shape == (HEIGHT * ZOOM, WIDTH * ZOOM, 3)
    assert (image[0, 0] == 255).all(), "a page's background does not show through"
    plot = image[: (HEIGHT - 20) * ZOOM]  # above the legend
    first, second = (near(plot, colour).any(1).sum() for colour in ("#1f6feb", "#d1242f"))
    assert second / first == pytest.approx(2, abs=0.02)
    title = near(pixels(tmp_path / "one.png")[: 24 * ZOOM], "#24292f")
    assert title.sum() > 100 and not near(image[: 24 * ZOOM], "#24292f").any(), "only the first has a title"


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    notes: list[str] = []
    assert write_plots(tmp_path, PLOTS, notes.append) == {"one": "one.svg", "two": "two.svg"}
    assert notes == [NO_LIBRARY] and "pip install 'sstf[plots]'" in NO_LIBRARY
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.svg", "two.svg"]


def test_without_fonts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library leaves texts out and says nothing: a plot without numbers is none."""
    monkeypatch.setattr(resvg_py, "svg_to_bytes", partial(resvg_py.svg_to_bytes, skip_system_fonts=True))
    notes: list[str] = []
    assert write_plots(tmp_path, PLOTS, notes.append) == {"one": "one.svg", "two": "two.svg"}
    assert notes == [NO_FONTS]
