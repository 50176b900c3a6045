"""What is sent and when: recordings, suites, traces, Poisson arrivals, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sstf.bench.arrivals import levels, poisson, read_trace
from sstf.bench.requests import CHAT, TEXT, from_suite, read_recorded, take
from sstf.errors import ConfigError, DataError

CHAT_BODY = {"model": "m", "messages": [{"role": "user", "content": "Hi\u2028there"}], "stream": False}


def written(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "recorded.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def test_recorded_bodies_and_records(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        CHAT_BODY,
        "",
        {"at": 1.5, "path": "completions", "body": {"prompt": [1, 2], "temperature": 0, "seed": 7}},
    )
    chat, text = read_recorded(path)
    assert (chat.id, chat.path, chat.at, chat.greedy) == ("1", CHAT, None, False)
    assert chat.body == {"messages": CHAT_BODY["messages"]}  # the client sets model and streaming
    assert (text.id, text.path, text.at, text.greedy) == ("3", TEXT, 1.5, True)
    assert text.body == {"prompt": [1, 2], "temperature": 0, "seed": 7}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "expected JSON"),
        ("[1]", "`messages` or `prompt`"),
        ({"input": "an embedding"}, "`messages` or `prompt`"),
        ({"body": "text"}, "`messages` or `prompt`"),
        ({**CHAT_BODY, "n": 2}, "several answers"),
        ({"prompt": ["a", "b"]}, "several answers"),
        ({"path": "completions", "body": CHAT_BODY}, "'completions'"),
        ({"at": -1, "body": CHAT_BODY}, "`at` is -1"),
        ({"at": True, "body": CHAT_BODY}, "`at` is True"),
        ("", "holds no request"),
    ],
)
def test_a_line_that_is_no_request_is_refused(tmp_path: Path, line: object, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        read_recorded(written(tmp_path, line))


def test_a_recording_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_recorded(tmp_path / "absent.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(DataError, match="byte 16 is not UTF-8"):
        read_recorded(tmp_path / "latin.jsonl")


def test_requests_of_a_suite() -> None:
    requests = from_suite("builtin", 1000, 32, 0.0)
    assert len({request.id for request in requests}) == len(requests) == 64
    assert requests[0].body["max_tokens"] == 32
    assert requests[0].greedy
    assert requests[0].body["messages"][-1]["role"] == "user"
    assert "chat_template_kwargs" not in requests[0].body


def test_a_prompts_mode_reaches_the_chat_template(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "a", "mode": "thinking"}, {"prompt": "b", "mode": "plain"}, {"prompt": "c"})
    given = [request.body.get("chat_template_kwargs") for request in from_suite(str(path), 3, 32, 0.7)]
    assert given == [{"enable_thinking": True}, {"enable_thinking": False}, None]


def test_requests_are_taken_in_turn_and_keep_names_of_their_own() -> None:
    requests = from_suite("builtin", 3, 32, 0.0)
    first, second, third = (request.id for request in requests)
    assert [r.id for r in take(requests, 2, 5)] == [third, f"{first}#2", f"{second}#2", f"{third}#2", f"{first}#3"]
    assert take(requests, 3, 1)[0].body == requests[0].body


def test_closed_loads() -> None:
    assert [(level.name, level.concurrency) for level in levels("closed", (1, 4), 8, 0)] == [
        ("concurrency 1", 1),
        ("concurrency 4", 4),
    ]
    assert [level.concurrency for level in levels("closed", None, 8, 0)] == [1]


def test_poisson_arrivals_are_drawn_once_and_have_their_rate() -> None:
    slow, fast = levels("poisson:0.5,2", None, 4000, 3)
    assert (slow.name, fast.name) == ("poisson 0.5/s", "poisson 2/s")
    assert slow.due is not None and fast.due is not None
    assert fast.due == poisson(2.0, 4000, 3)
    gaps = [after - before for before, after in zip((0.0, *fast.due), fast.due, strict=False)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.5, rel=0.05)
    # Of an exponential distribution: as spread as its mean, and e**-1 of the gaps above it
    assert (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.1)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)


def test_a_trace_starts_at_its_first_arrival(tmp_path: Path) -> None:
    path = written(tmp_path, "2.5", {"at": 3, "body": CHAT_BODY}, "4.5")
    assert read_trace(path) == (0.0, 0.5, 2.0)
    (level,) = levels(f"trace:{path}", None, 2, 0)
    assert (level.name, level.due) == ("trace recorded.jsonl", (0.0, 0.5))


@pytest.mark.parametrize(
    ("arrival", "complaint"),
    [
        ("poisson:0", "poisson:0"),
        ("poisson:fast", "poisson:fast"),
        ("poisson:inf", "poisson:inf"),
        ("poisson:", "above 0"),
        ("bursty", "expected closed, poisson:RATE or trace:FILE"),
        ("trace:", "expected closed, poisson:RATE or trace:FILE"),
    ],
)
def test_an_arrival_that_is_none(arrival: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        levels(arrival, None, 8, 0)


def test_open_arrival_has_no_concurrency_and_a_trace_is_long_enough(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--concurrency is for closed arrival"):
        levels("poisson:1", (2,), 8, 0)
    with pytest.raises(ConfigError, match="2 arrivals, expected at least --requests 3"):
        levels(f"trace:{written(tmp_path, '0', '1')}", None, 3, 0)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["1", "0.5"], ":2: 0.5 s comes after 1 s"),
        (["soon"], "expected JSON"),
        (["null"], "expected seconds"),
        ([""], "no"),
    ],
)
def test_a_trace_that_cannot_be_used(tmp_path: Path, lines: list[str], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        read_trace(written(tmp_path, *lines))
