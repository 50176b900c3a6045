from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sstf.dashboard.tables import COLUMNS, WINDOWS, Curve, History, Window

DAY = 86_400


def test_a_bucket_is_the_weighted_mean() -> None:
    table = Window(width=10)
    table.add(20.0, {"accepted": 2.0}, {"accepted": 30})
    table.add(29.9, {"accepted": 4.0, "rate": 5.0}, {"accepted": 10})
    table.add(30.0, {"rate": 7.0})
    # (2 * 30 + 4 * 10) / 40 = 2.5: tokens over passes of both intervals
    assert table.columns == ["accepted", "rate"]
    assert table.rows() == [[20.0, 2.5, 5.0], [30.0, None, 7.0]]
    assert table.rows(since=30) == [[30.0, None, 7.0]]
    assert (table.first, table.last, table.changed) == (20, 30, 30)


def test_what_is_no_number_leaves_a_gap() -> None:
    table = Window(width=1)
    table.add(1, {"loss": math.nan, "lr": 0.5})
    table.add(2, {"loss": math.inf, "lr": 0.25}, {"lr": 0})
    assert table.columns == ["lr"]
    assert table.rows() == [[1, 0.5], [2, None]]
    json.dumps(table.rows(), allow_nan=False)


def test_a_window_forgets_and_a_curve_widens() -> None:
    window, curve = Window(width=1, rows=4), Curve(width=1, rows=4)
    for step in range(1, 6):
        window.add(step, {"loss": float(step)})
        curve.add(step, {"loss": float(step)})
    assert window.rows() == [[2, 2.0], [3, 3.0], [4, 4.0], [5, 5.0]]
    assert curve.rows() == [[0, 1.0], [2, 2.5], [4, 4.5]], "steps 1, 2-3 and 4-5"
    assert (curve.width, curve.changed) == (2, -math.inf), "all rows are others now"
    curve.add(6, {"loss": 6.0})
    assert curve.changed == 6


@given(st.lists(st.tuples(st.integers(0, 10_000), st.floats(-5, 5)), min_size=1, max_size=200), st.integers(1, 20))
def test_a_curve_keeps_its_mean_and_its_bound(samples: list[tuple[int, float]], rows: int) -> None:
    curve, count = Curve(width=1, rows=rows), {}
    for step, value in samples:
        curve.add(step, {"loss": value})
    assert len(curve) <= rows
    for step, _ in samples:
        bucket = step // curve.width
        count[bucket] = count.get(bucket, 0) + 1
    shown = {row[0] / curve.width: row[1] for row in curve.rows()}
    assert set(shown) == set(count)
    total = sum(shown[bucket] * n for bucket, n in count.items())  # type: ignore[operator]
    assert total == pytest.approx(sum(value for _, value in samples), abs=0.01)
    assert all(a[0] < b[0] for a, b in pairwise(curve.rows()))  # type: ignore[operator]


def test_a_day_of_samples_stays_small() -> None:
    """24 hours at a sample every two seconds: rows, columns and what goes to the page stop growing."""
    history, curve, sizes = History(), Curve(width=1), []
    for hour in range(24):
        for i in range(1800):
            x = hour * 3600 + i * 2
            history.add(x, {f"figure/{n}": math.sin(x + n) for n in range(8)})
            curve.add(hour * 1800 + i, {f"loss/{n}": math.cos(x + n) for n in range(8)})
        tables = [*history.windows.values(), curve]
        sizes.append(sum(len(json.dumps(table.rows())) for table in tables))
        assert all(len(table) <= table.limit for table in tables)
    assert {shown: len(window) for shown, window in history.windows.items()} == {900: 450, 10_800: 540, 86_400: 540}
    assert sizes[-1] < 300_000, "bytes, of all windows together"
    assert sizes[-1] < 1.3 * max(sizes[:12]), "the second half of the day adds the rest of the day's window alone"
    assert history.windows[DAY].first == 0 and history.windows[DAY].last == DAY - 160
    assert curve.rows()[0][0] == 0, "the first step is there still"


def test_thousands_of_names_do_not_become_columns() -> None:
    table = Window(width=1)
    for i in range(10 * COLUMNS):
        table.add(0, {f"junk/{i}": 1.0})
    assert len(table.columns) == COLUMNS == len(table.rows()[0]) - 1


def test_rows_of_every_window_fit_its_span() -> None:
    assert all(shown % width == 0 and shown // width <= 600 for shown, width in WINDOWS.items())
