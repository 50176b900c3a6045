"""Alarms: the acceptance of an engine or a training leaves its band, an engine stops to answer.

A band is given, or learnt from the first minutes with traffic: the mean accepted length of `LEARNT` windows, `SPREAD`
standard deviations (and at least `MARGIN` of it) to each side. Two windows in a row outside raise an alarm, two inside
end it. A window lasts `WINDOW` seconds and until it has `PASSES` verify passes: an idle engine raises none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from sstf.errors import ConfigError

WINDOW = 15.0
PASSES = 200.0
LEARNT = 12  # windows
SPREAD = 4.0  # fewer would do, were the deviation not estimated from so few windows
MARGIN = 0.05
IN_A_ROW = 2
KEPT = 100  # of the log


@dataclass(frozen=True)
class Band:
    """Accepted lengths that are as expected, in tokens a verify pass, bonus token included."""

    low: float
    high: float

    @staticmethod
    def parse(text: str) -> Band:
        """Of `LOW:HIGH`, or `LOW` alone.

        Raises:
            ConfigError: the text is no band.

        >>> Band.parse("1.5:2.5")
        Band(low=1.5, high=2.5)
        """
        low, colon, high = text.partition(":")
        try:
            band = Band(float(low), float(high) if colon else float("inf"))
        except ValueError:
            raise ConfigError(f"--band wants accepted lengths LOW:HIGH or LOW, such as 1.5:2.5, not {text!r}") from None
        if not 1 <= band.low < band.high:
            raise ConfigError(f"--band {text}: an accepted length is 1 or more, and LOW is below HIGH")
        return band

    def __str__(self) -> str:
        return f"{self.low:.2f} or more" if self.high == float("inf") else f"{self.low:.2f} to {self.high:.2f}"


@dataclass(frozen=True)
class Alarm:
    """`active` False: it has ended. `time` in seconds since 1970, of the start or the end."""

    source: str
    kind: str
    text: str
    time: float
    active: bool


class Alarms:
    """Those that are active, and a log of the newest. `raise_` and `end` may be called again and again."""

    def __init__(self) -> None:
        self.active: dict[tuple[str, str], Alarm] = {}
        self.log: deque[Alarm] = deque(maxlen=KEPT)
        self.raised = 0  # ever; with `log` it tells which are new

    def raise_(self, source: str, kind: str, text: str, time: float) -> None:
        """Unless it is active already."""
        if (source, kind) not in self.active:
            self.active[source, kind] = Alarm(source, kind, text, time, True)
            self._note(self.active[source, kind])

    def end(self, source: str, kind: str, text: str, time: float) -> None:
        """If it is active."""
        if self.active.pop((source, kind), None) is not None:
            self._note(Alarm(source, kind, text, time, False))

    def since(self, raised: int) -> list[dict[str, Any]]:
        """What was noted after the first `raised`, the oldest first."""
        new = self.raised - raised
        return [asdict(alarm) for alarm in list(self.log)[-new:]] if new > 0 else []

    def _note(self, alarm: Alarm) -> None:
        self.log.append(alarm)
        self.raised += 1


class Drift:
    """Watches one source's accepted length, and learns its band where none is given."""

    def __init__(self, source: str, alarms: Alarms, band: Band | None = None) -> None:
        self.source, self.alarms, self.band = source, alarms, band
        self._learnt: list[float] = []
        self._start: float | None = None
        self._tokens = self._passes = 0.0
        self._outside = self._inside = 0

    @property
    def learning(self) -> float:
        """Share of the windows that are still wanted; 0 when there is a band."""
        return 0.0 if self.band else 1 - len(self._learnt) / LEARNT

    def add(self, time: float, accepted_length: float, passes: float) -> None:
        """Take what the engine did up to `time`: verify passes, and tokens a pass."""
        if self._start is None:
            self._start = time
        self._tokens += accepted_length * passes
        self._passes += passes
        if time - self._start >= WINDOW and self._passes >= PASSES:
            self._judge(time, self._tokens / self._passes)
            self._start, self._tokens, self._passes = time, 0.0, 0.0

    def _judge(self, time: float, value: float) -> None:
        if self.band is None:
            self._learnt.append(value)
            if len(self._learnt) == LEARNT:
                mean = fmean(self._learnt)
                margin = max(SPREAD * stdev(self._learnt), MARGIN * mean)
                self.band = Band(max(1.0, mean - margin), mean + margin)
            return
        within = self.band.low <= value <= self.band.high
        self._inside, self._outside = (self._inside + 1, 0) if within else (0, self._outside + 1)
        if self._outside >= IN_A_ROW:
            side = "below" if value < self.band.low else "above"
            text = f"accepted length {value:.2f} is {side} its band, {self.band}"
            self.alarms.raise_(self.source, "acceptance", text, time)
        if self._inside >= IN_A_ROW:
            text = f"accepted length {value:.2f} is back in its band, {self.band}"
            self.alarms.end(self.source, "acceptance", text, time)


Clock = Callable[[], float]  # seconds since 1970; tests bring their own
