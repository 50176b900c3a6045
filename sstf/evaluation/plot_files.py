"""Plots as files: SVG, and PNG beside it for places that show no SVG, such as the pages of a model hub.

PNG comes from the SVG, by resvg: the library is optional, since a plot loses nothing by staying an SVG.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from sstf.data.atomic import write_bytes_atomic
from sstf.evaluation.charts import standalone

ZOOM = 2  # pixels a unit of the SVG: sharp on dense screens
NO_LIBRARY = "plots are SVG only; for PNG as well: pip install 'sstf[plots]'"
NO_FONTS = "plots are SVG only: this machine has no fonts to draw a PNG's text with; install one, such as fonts-dejavu"
PROBE = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><text y="9" font-family="sans-serif">{}</text></svg>'
)


def write_plots(
    folder: Path, plots: Mapping[str, str], note: Callable[[str], None] = lambda sentence: None
) -> dict[str, str]:
    """Write every plot to `folder`.

    Args:
        folder: is there.
        plots: name without an ending -> SVG of `charts`.
        note: is told, in a sentence, why there are no PNGs.

    Returns:
        Name -> the file to show: the PNG where there is one.
    """
    if not plots:
        return {}
    shown, files = {}, {name: standalone(svg) for name, svg in plots.items()}
    for name, svg in files.items():
        shown[name] = f"{name}.svg"
        write_bytes_atomic(folder / shown[name], svg.encode())
    drawn = _pngs(files)
    if isinstance(drawn, str):
        note(drawn)
        return shown
    for name, png in drawn.items():
        shown[name] = f"{name}.png"
        write_bytes_atomic(folder / shown[name], png)
    return shown


def _pngs(files: Mapping[str, str]) -> dict[str, bytes] | str:
    """Every file drawn, or the reason why none is."""
    try:
        from resvg_py import svg_to_bytes
    except ModuleNotFoundError:
        return NO_LIBRARY
    # Without fonts the library leaves texts out and says nothing.
    if svg_to_bytes(PROBE.format("x")) == svg_to_bytes(PROBE.format("")):
        return NO_FONTS
    return {name: svg_to_bytes(svg, zoom=ZOOM) for name, svg in files.items()}
