from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sstf.dashboard.board import Board, Follower, Told, known_window
from sstf.dashboard.tables import Curve, Window
from sstf.errors import ConfigError


@pytest.fixture
def log(tmp_path: Path) -> Path:
    folder = tmp_path / "train" / "k"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "lr": 0.5}\n')
    return folder / "metrics.jsonl"


def test_nothing_and_twice_the_same() -> None:
    with pytest.raises(ConfigError, match="nothing to watch"):
        Board([], [])
    with pytest.raises(ConfigError, match="two engines have one name"):
        Board([], ["http://h:1", "http://h:1/v1"])


def test_a_page_hears_what_changed(log: Path, tmp_path: Path) -> None:
    board = Board([tmp_path], [])
    follower = Follower(board, 900)
    board.runs[0].poll()
    news = follower.news()
    assert news is not None
    assert [source["id"] for source in news["sources"]] == ["run-0", "machine"]
    assert news["sources"][0]["table"] == {"columns": ["lr"], "width": 1, "since": None, "first": 1, "rows": [[1, 0.5]]}
    assert follower.news() is None
    with log.open("a") as file:
        file.write('{"step": 2, "lr": 0.25}\n')
    board.runs[0].poll()
    news = follower.news()
    assert news is not None and [source["id"] for source in news["sources"]] == ["run-0"]
    table = news["sources"][0]["table"]
    assert (table["since"], table["rows"]) == (1, [[1, 0.5], [2, 0.25]]), "the last row again: it may have changed"


def test_alarms_are_heard_once_and_kept_for_who_comes_later(log: Path, tmp_path: Path) -> None:
    board = Board([tmp_path], [])
    board.alarms.raise_("head", "down", "before", 1.0)
    follower = Follower(board, 900)
    news = follower.news()
    assert news is not None and news["new_alarms"] == [] and [alarm["text"] for alarm in news["alarms"]] == ["before"]
    board.alarms.end("head", "down", "after", 2.0)
    news = follower.news()
    assert news is not None and [alarm["text"] for alarm in news["new_alarms"]] == ["after"]
    assert news["alarms"] == [] and len(news["log"]) == 2
    assert follower.news() is None


class Shown:
    """What page/table.js does with a table's news."""

    rows: list[Any] = []

    def take(self, news: dict[str, Any]) -> None:
        if news["since"] is None:
            self.rows = news["rows"]
        else:
            kept = [row for row in self.rows if news["first"] <= row[0] < news["since"]]
            self.rows = kept + news["rows"]


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=80), st.integers(2, 12))
def test_the_parts_make_the_whole(steps: list[tuple[int, bool]], limit: int) -> None:
    """Whatever came, and whenever the page was told: it shows the table."""
    for table in (Curve(width=1, rows=limit), Window(width=2, rows=limit)):
        told, shown, x = Told(), Shown(), 0
        for gap, tell in steps:
            x += gap
            table.add(x, {"loss": float(x % 7)})
            if tell:
                shown.take(told.news(table))
        shown.take(told.news(table))
        assert shown.rows == table.rows()


def test_windows() -> None:
    assert [known_window(s) for s in (0, 900, 10_800, 86_400, 5)] == [900, 900, 10_800, 86_400, 900]
