"""Figures over time or over training steps, in bounded memory.

A table's rows are buckets of x, of equal width; a bucket holds the weighted mean of what fell into it. There are two
ways to stay small: a `Window` drops its oldest rows (time), a `Curve` keeps its whole past and doubles the width of its
buckets when it has too many (training steps). A `History` is three windows, coarser and longer each. Bucket edges are
multiples of the width, so the tables of two engines share their x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

ROWS = 540
COLUMNS = 64  # of one table: damage in a log must not make thousands
# The windows of a page: seconds shown -> seconds a row. 450, 540 and 540 rows.
WINDOWS = {900: 2, 10_800: 20, 86_400: 160}


@dataclass
class _Mean:
    """A weighted mean that grows: the mean accepted length of two intervals is that of all their passes."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, total: float, weight: float) -> None:
        self.total += total
        self.weight += weight


class Table:
    """Weighted means by bucket and name. Subclasses say what happens when there are too many buckets."""

    def __init__(self, width: float, rows: int = ROWS) -> None:
        self.width, self.limit = width, rows
        self.columns: list[str] = []
        self.changed = 0.0  # the leftmost x that the newest `add` touched; -inf after all rows changed
        self._buckets: dict[int, dict[str, _Mean]] = {}

    def __len__(self) -> int:
        return len(self._buckets)

    def add(self, x: float, figures: Mapping[str, float], weights: Mapping[str, float] | None = None) -> None:
        """Take `figures` at `x`. One that is not finite is left out, and so is one of weight 0.

        Args:
            x: seconds or steps.
            figures: by name.
            weights: by name; 1 where missing.
        """
        bucket = self._buckets.setdefault(math.floor(x / self.width), {})
        for name, value in figures.items():
            weight = 1.0 if weights is None else weights.get(name, 1.0)
            if not math.isfinite(value) or weight <= 0:
                continue
            if name not in self.columns:
                if len(self.columns) == COLUMNS:
                    continue
                self.columns.append(name)
            bucket.setdefault(name, _Mean()).add(value * weight, weight)
        self.changed = math.floor(x / self.width) * self.width
        if len(self._buckets) > self.limit:
            self._shrink()

    def rows(self, since: float = -math.inf) -> list[list[float | None]]:
        """Rows whose x is `since` or later, in order: x (the bucket's left edge), then a value or None a column."""
        return [
            [key * self.width, *(_rounded(bucket.get(name)) for name in self.columns)]
            for key, bucket in sorted(self._buckets.items())
            if key * self.width >= since
        ]

    @property
    def first(self) -> float | None:
        """The oldest row's x."""
        return min(self._buckets) * self.width if self._buckets else None

    @property
    def last(self) -> float | None:
        """The newest row's x."""
        return max(self._buckets) * self.width if self._buckets else None

    def _shrink(self) -> None:
        raise NotImplementedError


class Window(Table):
    """The newest rows."""

    def _shrink(self) -> None:
        del self._buckets[min(self._buckets)]


class Curve(Table):
    """All of the past, in wider and wider rows."""

    def _shrink(self) -> None:
        while len(self._buckets) > self.limit:
            self.width *= 2
            merged: dict[int, dict[str, _Mean]] = {}
            for key, bucket in self._buckets.items():
                into = merged.setdefault(key // 2, {})
                for name, mean in bucket.items():
                    into.setdefault(name, _Mean()).add(mean.total, mean.weight)
            self._buckets = merged
        self.changed = -math.inf


class History:
    """The same figures in the windows of `WINDOWS`."""

    def __init__(self) -> None:
        self.windows = {shown: Window(width, shown // width) for shown, width in WINDOWS.items()}

    def add(self, x: float, figures: Mapping[str, float], weights: Mapping[str, float] | None = None) -> None:
        """As `Table.add`, in every window."""
        for window in self.windows.values():
            window.add(x, figures, weights)


def _rounded(mean: _Mean | None) -> float | None:
    """Five significant digits are more than a plot shows, and half of the bytes on the way to it."""
    return None if mean is None else float(f"{mean.total / mean.weight:.5g}")
