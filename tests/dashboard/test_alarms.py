from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import count

import pytest

from sstf.dashboard.alarms import KEPT, LEARNT, WINDOW, Alarms, Band, Drift
from sstf.errors import ConfigError


def feed(drift: Drift, values: Sequence[float], start: float = 0.0, passes: float = 400.0) -> float:
    """One value a window."""
    time = start
    for value in values:
        drift.add(time, value, passes)
        time += WINDOW
    return time


def test_a_band_is_read() -> None:
    assert Band.parse("1.5:2.5") == Band(1.5, 2.5)
    assert Band.parse("1.5") == Band(1.5, math.inf)
    for text in ("", "a:b", "2:1", "0.5:2", "1.5:1.5", "nan", "1:2:3"):
        with pytest.raises(ConfigError, match="--band"):
            Band.parse(text)


def test_two_windows_below_raise_and_two_within_end() -> None:
    alarms = Alarms()
    drift = Drift("head", alarms, Band(1.5, 2.5))
    time = feed(drift, [2.0, 2.0, 1.2])  # the first value opens the window
    assert not alarms.active, "one window below"
    time = feed(drift, [1.2], time)
    assert alarms.active["head", "acceptance"].text == "accepted length 1.20 is below its band, 1.50 to 2.50"
    time = feed(drift, [1.2, 2.0, 1.2, 2.0], time)
    assert alarms.active and len(alarms.log) == 1, "raised once"
    feed(drift, [2.0], time)
    assert not alarms.active
    assert [alarm.active for alarm in alarms.log] == [True, False]


def test_a_loop_raises_too() -> None:
    alarms = Alarms()
    feed(Drift("head", alarms, Band(1.5, 2.5)), [3.9] * 4)
    assert "above its band" in alarms.active["head", "acceptance"].text


def test_an_idle_engine_raises_none() -> None:
    alarms = Alarms()
    drift = Drift("head", alarms, Band(1.5, 2.5))
    time = feed(drift, [1.0] * 95, passes=2)
    assert not alarms.active, "190 passes in 24 minutes are no window"
    feed(drift, [1.0] * 120, time, passes=2)
    assert alarms.active


def test_a_band_is_learnt_and_noise_stays_within() -> None:
    """Accepted lengths around 2 with a standard deviation of 0.05: no alarm in two hours, one soon after a fall."""
    generator, alarms = random.Random(0), Alarms()
    drift = Drift("head", alarms)
    assert drift.learning == 1
    time = feed(drift, [generator.gauss(2, 0.05) for _ in range(LEARNT + 1)])
    assert drift.learning == 0 and drift.band is not None
    assert drift.band.low == pytest.approx(1.8, abs=0.12) and drift.band.high == pytest.approx(2.2, abs=0.12)
    time = feed(drift, [generator.gauss(2, 0.05) for _ in range(480)], time)
    assert not alarms.log
    feed(drift, [generator.gauss(1.6, 0.05) for _ in range(3)], time)
    assert ("head", "acceptance") in alarms.active


def test_a_steady_value_leaves_room() -> None:
    drift = Drift("head", Alarms())
    feed(drift, [2.0] * (LEARNT + 1))
    assert drift.band == Band(1.9, 2.1), "5 % at least"


def test_the_log_keeps_the_newest_and_knows_what_is_new() -> None:
    alarms = Alarms()
    for i in count():
        alarms.raise_("x", "down", str(i), i)
        alarms.raise_("x", "down", "again", i)
        alarms.end("x", "down", f"{i} ended", i)
        alarms.end("x", "down", "again", i)
        if alarms.raised > 2 * KEPT:
            break
    assert len(alarms.log) == KEPT
    assert alarms.since(alarms.raised) == []
    assert [alarm["text"] for alarm in alarms.since(alarms.raised - 1)] == [f"{i} ended"]
    assert len(alarms.since(0)) == KEPT
