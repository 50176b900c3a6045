"""Figures of a card as SVG, written by hand: a line chart needs no plotting library, and every browser shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a")  # readable on white
WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 36, 44


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]], title: str, x_label: str, y_label: str, y_from: float = 0.0
) -> str:
    """Lines with a mark at every point.

    Args:
        series: name -> (x, y) in the order of x; at least one point in all.
        title: above the figure.
        x_label: what x counts.
        y_label: what y measures.
        y_from: where the y axis starts, at most the lowest point.
    """
    points = [point for line in series.values() for point in line]
    heading = title if len(series) > 1 else f"{title}: {next(iter(series))}"
    x_low, x_high = _span([x for x, _ in points])
    ticks = _ticks(y_from, max(y for _, y in points))
    y_high = max(ticks[-1], max(y for _, y in points))

    def across(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_from) / (y_high - y_from) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#24292f">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(heading)}</text>',
        _label(WIDTH / 2, HEIGHT - 8, x_label),
        f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
    ]
    for y in ticks:
        parts.append(
            f'<line x1="{LEFT}" y1="{down(y):.1f}" x2="{WIDTH - RIGHT}" y2="{down(y):.1f}" stroke="#d0d7de"/>'
            f'<text x="{LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
        )
    shown = sorted({x for x, _ in points})
    for x in shown[:: max(1, len(shown) // 10)]:
        parts.append(_label(across(x), HEIGHT - BOTTOM + 16, f"{x:g}"))
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        drawn = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3" fill="{colour}"/>' for x, y in line]
        if len(series) > 1:
            parts.append(
                f'<text x="{WIDTH - RIGHT}" y="{TOP + 14 + 16 * number}" text-anchor="end" fill="{colour}">'
                f"{escape(name)}</text>"
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _label(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>'


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from `low` to at least `high`.

    >>> _ticks(0.0, 0.44)
    [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    """
    rough = max(high - low, 1e-9) / 5
    power = 10.0 ** _floor_log10(rough)
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * 0.999)
    count = 1
    while low + count * step < high:
        count += 1
    return [round(low + i * step, 10) for i in range(count + 1)]


def _floor_log10(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])
