"""What is known of a running training, and how its figures are written: shared by the live view and the lines."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from itertools import pairwise

SIMULATED, REAL = "val/simulated_accepted_length", "val/tau_real"
ACCEPTED = {SIMULATED: "simulated accepted length", REAL: "real accepted length"}
# Names that trackers get, in the order of the screen; others follow under their own names.
SCALARS: dict[str, Callable[[float], str]] = {
    "tokens_per_second": lambda v: f"{v:,.0f} tokens/s",
    "waiting_share": lambda v: f"waiting for data {v:.1%}",
    "memory_gib": lambda v: f"memory {v:.2f} GiB",
    "memory_peak_gib": lambda v: f"peak {v:.2f} GiB",
    "lr": lambda v: f"learning rate {v:.2e}",
    "grad_norm": lambda v: f"gradient norm {v:.3g}",
}
HIDDEN = {"eta_seconds"}  # the views have a clock of their own, which goes on between two sets of figures
CURVE_POINTS = 512
BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-~=+*#"


class Curve:
    """A figure over the steps, in at most `CURVE_POINTS` means of equally many values each."""

    def __init__(self) -> None:
        self.points: list[float] = []
        self._each, self._sum, self._count = 1, 0.0, 0

    def add(self, value: float) -> None:
        """One more value; those that are not finite are left out."""
        if not math.isfinite(value):
            return
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count == self._each:
            self.points.append(self._sum / self._each)
            self._sum, self._count = 0.0, 0
        if len(self.points) == CURVE_POINTS:
            self.points = [(a + b) / 2 for a, b in zip(self.points[::2], self.points[1::2], strict=True)]
            self._each *= 2

    def draw(self, width: int, blocks: str = BLOCKS) -> str:
        """At most `width` characters, from the lowest value to the highest.

        >>> curve = Curve()
        >>> for value in (4, 3, 2, 1): curve.add(value)
        >>> curve.draw(4, "_-=#"), curve.draw(2, "_-=#")
        ('#=-_', '#_')
        """
        points = list(self.points)  # another thread may add some
        count = min(width, len(points))
        if count <= 0:
            return ""
        edges = [i * len(points) // count for i in range(count + 1)]
        means = [sum(points[a:b]) / (b - a) for a, b in pairwise(edges)]
        low, span = min(means), max(means) - min(means)
        top = len(blocks) - 1
        return "".join(blocks[round((mean - low) / span * top) if span > 0 else 0] for mean in means)


class TrainingState:
    """Steps, time, the latest figures, their curves and the best validation."""

    def __init__(
        self,
        total: int,
        done: int = 0,
        best: float = 0.0,
        best_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.done, self._first, self._clock = total, done, done, clock
        self._started = self._stepped = clock()
        self.latest: dict[str, float] = {}
        self.at: dict[str, int] = {}  # the step of each
        self.best: dict[str, tuple[float, int]] = {SIMULATED: (best, best_step)} if best_step else {}
        self.curves: dict[str, Curve] = {}

    def step(self, done: int) -> None:
        """So many steps are done."""
        self.done, self._stepped = done, self._clock()

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """New figures, of `step`."""
        for name, value in figures.items():
            self.latest[name], self.at[name] = value, step
            self.curves.setdefault(name, Curve()).add(value)
            if name in ACCEPTED and (name not in self.best or value > self.best[name][0]):
                self.best[name] = (value, step)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    @property
    def left(self) -> float | None:
        """Seconds to the end, at the mean pace of this start, validation included; None before the first step."""
        steps = self.done - self._first
        return (self._stepped - self._started) / steps * (self.total - self.done) if steps > 0 else None


def duration(seconds: float | None) -> str:
    """As a clock shows it.

    >>> duration(75), duration(4000), duration(200_000), duration(None)
    ('1:15', '1:06:40', '2 d 7:33:20', '?')
    """
    if seconds is None or not math.isfinite(seconds):
        return "?"
    days, rest = divmod(round(seconds), 86_400)
    hours, rest = divmod(rest, 3600)
    clock = f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours or days else f"{rest // 60}:{rest % 60:02}"
    return f"{days} d {clock}" if days else clock


def split_name(name: str) -> tuple[str, int] | None:
    """Row and position of `prefix/name/<i>`; None for other names. What is trained on goes without its prefix.

    >>> split_name("train/loss/2"), split_name("val/loss/0"), split_name("lr")
    (('loss', 2), ('val loss', 0), None)
    """
    *row, last = name.split("/")
    if not row or not last.isdecimal():
        return None
    return " ".join(row[1:] if row[0] == "train" and len(row) > 1 else row), int(last)


def table(figures: Mapping[str, float], decimals: int) -> list[tuple[str, list[str]]]:
    """(row, one text a position) of all figures that are by position, in their order."""
    rows: dict[str, dict[int, float]] = {}
    for name, value in figures.items():
        if place := split_name(name):
            rows.setdefault(place[0], {})[place[1]] = value
    return [
        (row, [f"{values[i]:.{decimals}f}" if i in values else "-" for i in range(max(values) + 1)])
        for row, values in rows.items()
    ]


def pieces(state: TrainingState, figures: Mapping[str, float]) -> list[str]:
    """All figures that are not by position, as short texts."""
    out = [write(figures[name]) for name, write in SCALARS.items() if name in figures]
    for name, label in ACCEPTED.items():
        if name in figures:
            best, best_step = state.best[name]
            out += [f"{label} {figures[name]:.3f} (step {state.at[name]})", f"best {best:.3f} (step {best_step})"]
    known = SCALARS.keys() | ACCEPTED.keys() | HIDDEN
    return out + [
        f"{name} {value:.4g}" for name, value in figures.items() if name not in known and split_name(name) is None
    ]
