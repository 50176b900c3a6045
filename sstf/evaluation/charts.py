"""Plots as inline SVG: lines, grouped bars and stacked bars.

Colours are classes (`s0` to `s5`, `grid`, `axis`), so that a page's style decides them in light and dark; `standalone`
adds a style for a file of its own. Every mark carries its values as a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 34, 58
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a")  # readable on white
MARKS = 6  # series are told apart up to so many


@dataclass(frozen=True)
class Bar:
    """A value, with its interval where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    x_label: str,
    y_label: str,
    y_from: float = 0.0,
    doubling: bool = False,
) -> str:
    """Lines with a mark at every point; empty without a point.

    Args:
        series: name -> (x, y) in the order of x.
        title: above the plot.
        x_label: what x counts.
        y_label: what y measures.
        y_from: where the y axis starts, at most the lowest point.
        doubling: the x axis doubles with every step of the same width; x is above 0.
    """
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    place = math.log2 if doubling else float
    low, high = min(place(x) for x, _ in points), max(place(x) for x, _ in points)
    low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
    plot = _Plot(title, x_label, y_label, y_from, max(y for _, y in points), list(series))

    def across(x: float) -> float:
        return LEFT + 12 + (place(x) - low) / (high - low) * (WIDTH - LEFT - RIGHT - 24)

    shown = sorted({x for x, _ in points})
    for x in shown[:: max(1, math.ceil(len(shown) / 10))]:
        plot.tick(across(x), f"{x:g}")
    for number, (name, line) in enumerate(series.items()):
        path = " ".join(f"{across(x):.1f},{plot.down(y):.1f}" for x, y in line)
        plot.parts.append(f'<polyline points="{path}" class="line s{number % MARKS}"/>')
        plot.parts += [
            f'<circle cx="{across(x):.1f}" cy="{plot.down(y):.1f}" r="3.5" class="mark s{number % MARKS}">'
            f"<title>{escape(name)}: {x:g}, {_shown(y)}</title></circle>"
            for x, y in line
        ]
    return plot.close()


def bars(groups: Sequence[str], series: Mapping[str, Sequence[Bar | None]], title: str, y_label: str) -> str:
    """Groups of bars along x, one of every series in each; empty without a bar.

    Args:
        groups: names along x.
        series: name -> one bar a group; None leaves a gap.
        title: above the plot.
        y_label: what the bars measure.
    """
    known = [bar for row in series.values() for bar in row if bar]
    if not known:
        return ""
    names = list(series) if len(series) > 1 else []
    plot = _Plot(title, "", y_label, 0.0, max(bar.high or bar.value for bar in known), names)
    room = (WIDTH - LEFT - RIGHT) / len(groups)
    slanted = 6.2 * max(map(len, groups)) > room
    wide = 0.8 * room / len(series)
    for place, group in enumerate(groups):
        plot.tick(LEFT + (place + 0.5) * room, group, slanted)
        for number, (name, row) in enumerate(series.items()):
            bar = row[place]
            if bar is None:
                continue
            x, top = LEFT + place * room + 0.1 * room + number * wide, plot.down(bar.value)
            span = f" ({_shown(bar.low)} to {_shown(bar.high)})" if bar.low is not None and bar.high is not None else ""
            plot.parts.append(
                f'<rect x="{x:.1f}" y="{top:.1f}" width="{max(1.0, wide - 1):.1f}" '
                f'height="{plot.down(0.0) - top:.1f}" class="mark s{number % MARKS}">'
                f"<title>{escape(group)}, {escape(name)}: {_shown(bar.value)}{span}</title></rect>"
            )
            if bar.low is not None and bar.high is not None:
                middle = x + (wide - 1) / 2
                plot.parts.append(
                    f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{plot.down(bar.low):.1f}" '
                    f'y2="{plot.down(bar.high):.1f}" class="axis"/>'
                )
    return plot.close()


def stacked(names: Sequence[str], parts: Mapping[str, Sequence[float]], title: str, x_label: str) -> str:
    """One horizontal bar a name, made of its parts one behind the other; empty where all are 0.

    Args:
        names: of the bars.
        parts: name of a part -> its length in every bar, 0 or above.
        title: above the plot.
        x_label: what the lengths measure.
    """
    totals = [sum(lengths[i] for lengths in parts.values()) for i in range(len(names))]
    longest = max(totals, default=0.0)
    if longest <= 0:
        return ""
    left, row = 130, 26
    height = TOP + row * len(names) + BOTTOM
    end = ticks(0.0, longest)
    scale = (WIDTH - left - RIGHT - 30) / end[-1]
    legend, whole = _legend(list(parts), height)
    out = [_open(title, whole)]
    for x in end:
        out.append(
            f'<line x1="{left + x * scale:.1f}" x2="{left + x * scale:.1f}" y1="{TOP}" y2="{TOP + row * len(names)}" '
            f'class="grid"/>{_text(left + x * scale, TOP + row * len(names) + 15, f"{x:g}")}'
        )
    for place, name in enumerate(names):
        y, x = TOP + place * row + 3, float(left)
        out.append(_text(left - 6, y + 14, name, "end"))
        for number, (part, lengths) in enumerate(parts.items()):
            wide = lengths[place] * scale
            out.append(
                f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{row - 6}" class="mark s{number % MARKS}">'
                f"<title>{escape(name)}, {escape(part)}: {_shown(lengths[place])}</title></rect>"
            )
            x += wide
        out.append(_text(x + 4, y + 14, f"{_shown(totals[place])}", "start"))
    out += [_text(WIDTH / 2, height - 24, x_label), *legend, "</svg>"]
    return "\n".join(out) + "\n"


def standalone(svg: str) -> str:
    """The same as a file of its own, in colours for a white page."""
    style = "".join(f".line.s{i}{{stroke:{c}}}.mark.s{i}{{fill:{c}}}" for i, c in enumerate(COLOURS))
    style += ".line{fill:none;stroke-width:2}.grid{stroke:#d0d7de}.axis{stroke:#24292f}text{fill:#24292f}"
    head, _, rest = svg.partition(">")
    return (
        f'{head} xmlns="http://www.w3.org/2000/svg" width="{WIDTH}"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{rest}'
    )


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers from `low` to at least `high`.

    >>> ticks(0.0, 0.44)
    [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    """
    rough = max(high - low, 1e-9) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * 0.999)
    return [round(low + i * step, 10) for i in range(max(1, math.ceil((high - low) / step - 1e-9)) + 1)]


class _Plot:
    """The frame of a plot with a vertical scale."""

    def __init__(
        self, title: str, x_label: str, y_label: str, y_from: float, y_to: float, names: Sequence[str]
    ) -> None:
        marks = ticks(y_from, y_to)
        self.low, self.high = y_from, max(marks[-1], y_to)
        self.legend, height = _legend(names, HEIGHT)
        self.parts = [_open(title, height)]
        for y in marks:
            self.parts.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.down(y):.1f}" y2="{self.down(y):.1f}" '
                f'class="grid"/>{_text(LEFT - 6, self.down(y) + 4, f"{y:g}", "end")}'
            )
        self.parts.append(_text(WIDTH / 2, HEIGHT - 24, x_label))
        self.parts.append(
            f'<text transform="translate(13 {(HEIGHT - BOTTOM + TOP) / 2}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_label)}</text>"
        )

    def down(self, y: float) -> float:
        return HEIGHT - BOTTOM - (y - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def tick(self, x: float, text: str, slanted: bool = False) -> None:
        y = HEIGHT - BOTTOM + 14
        if slanted:
            self.parts.append(
                f'<text transform="translate({x:.1f} {y - 4}) rotate(-25)" text-anchor="end" font-size="10">'
                f"{escape(text[:18])}</text>"
            )
        else:
            self.parts.append(_text(x, y, text))

    def close(self) -> str:
        return "\n".join([*self.parts, *self.legend, "</svg>"]) + "\n"


def _open(title: str, height: float) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}" font-family="sans-serif" '
        f'font-size="11">\n<text x="{LEFT}" y="18" font-size="13" font-weight="bold">{escape(title)}</text>'
    )


def _shown(value: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _legend(names: Sequence[str], height: float) -> tuple[list[str], float]:
    """Below a plot that is `height` high without further rows; with the height that the legend makes it."""
    out, x, y = [], float(LEFT), height - 14
    for number, name in enumerate(names):
        wide = 26 + 6.3 * len(name)
        if x > LEFT and x + wide > WIDTH + 12:
            x, y = float(LEFT), y + 15
        out.append(f'<rect x="{x:.1f}" y="{y}" width="9" height="9" class="mark s{number % MARKS}"/>')
        out.append(_text(x + 13, y + 8, name, "start"))
        x += wide
    return out, y + 14
