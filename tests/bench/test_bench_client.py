"""The client: events cut anywhere, every kind of text, failures in a sentence, keys that stay unseen."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stand_in import Reply, StandIn

from sstf.bench.client import Answer, BadAnswer, Server, Stream, address, read_key, said
from sstf.bench.requests import CHAT, TEXT, Request
from sstf.errors import ConfigError

Serve = Callable[..., StandIn]
CHAT_REQUEST = Request("1", CHAT, {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0})
TEXT_REQUEST = Request("1", TEXT, {"prompt": "Hi"})


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields, ensure_ascii=False).encode() + b"\n\n"


def delta(**fields: object) -> bytes:
    return event(choices=[{"index": 0, "delta": fields}])


EVENTS = [
    b": a comment\n\n",
    delta(role="assistant", content=""),
    delta(content="One\u2028"),
    b"event: message\r\ndata:" + json.dumps({"choices": [{"delta": {"content": "é"}}]}).encode() + b"\r\n\r\n",
    delta(content=None),
    event(choices=[{"delta": {}, "finish_reason": "stop"}]),
    event(choices=[], usage={"completion_tokens": 5}),
    b"data: [DONE]\n\n",
]


def test_times_are_those_of_events_with_text() -> None:
    stream = Stream()
    for second, data in enumerate(EVENTS):
        stream.feed(data, 100.0 + second)
    # Due at 98, sent at 99; text at 102 and 103
    assert stream.answer("7", 98.0, 99.0) == Answer("7", 1.0, 4.0, (1.0,), 5.0, "One\u2028é", 5, "stop")


@given(st.sets(st.integers(1, len(b"".join(EVENTS)) - 1), max_size=40))
def test_events_may_be_cut_anywhere(cuts: set[int]) -> None:
    whole, stream = b"".join(EVENTS), Stream()
    edges = [0, *sorted(cuts), len(whole)]
    for start, end in pairwise(edges):
        stream.feed(whole[start:end], float(end))
    found = stream.answer("7", 0.0, 0.0)
    assert (found.text, found.tokens, found.finish, len(found.gaps_s)) == ("One\u2028é", 5, "stop", 1)


def test_reasoning_and_calls_are_text_as_well() -> None:
    stream = Stream()
    stream.feed(delta(reasoning_content="Hm. ") + delta(reasoning="So. ", content="Call: "), 1.0)
    stream.feed(delta(tool_calls=[{"index": 0, "function": {"name": "sum", "arguments": '{"a"'}}]), 2.0)
    stream.feed(delta(tool_calls=[{"index": 0, "function": {"arguments": ": 1}"}}]) + b"data: [DONE]\n", 3.0)
    assert stream.answer("1", 0.0, 0.0).text == 'Hm. So. Call: sum{"a": 1}'


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"data: {oops\n", "an event is not JSON: '{oops'"),
        (event(error={"message": "out of memory"}), "out of memory"),
        (b"data: [1]\n", "1"),
        (event(choices=["text"]), "holds no choice"),
    ],
)
def test_an_event_that_is_none(data: bytes, complaint: str) -> None:
    with pytest.raises(BadAnswer, match=complaint):
        Stream().feed(data, 0.0)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"<html>Welcome</html>", "no stream of events"),
        (delta(content="cut"), "ended before the answer"),
        (b"data: [DONE]\n", "holds no text"),
    ],
)
def test_an_answer_that_is_not_whole(data: bytes, complaint: str) -> None:
    stream = Stream()
    stream.feed(data, 0.0)
    with pytest.raises(BadAnswer, match=complaint):
        stream.answer("1", 0.0, 0.0)


def ask(server: StandIn, request: Request, due: float | None = None, key: str = "") -> Answer:
    async def go() -> Answer:
        async with Server("baseline", server.url, "target", key, 30.0) as client:
            return await client.ask(request, due)

    return asyncio.run(go())


@pytest.mark.parametrize("request_", [CHAT_REQUEST, TEXT_REQUEST])
def test_an_answer_over_a_real_connection(serve: Serve, request_: Request) -> None:
    server = serve(behave=lambda number, body: Reply(["Hello", " you", "!"], tokens=6, finish="stop"))
    found = ask(server, request_)
    assert (found.text, found.tokens, found.finish, found.error) == ("Hello you!", 6, "stop", None)
    assert len(found.gaps_s) == 2
    assert found.e2e_s == pytest.approx(found.ttft_s + sum(found.gaps_s))
    path, body = server.requests[0]
    assert path == f"/v1/{request_.path}"
    assert body == {**request_.body, "model": "target", "stream": True, "stream_options": {"include_usage": True}}


def test_latency_counts_from_when_a_request_was_due(serve: Serve) -> None:
    found = ask(serve(), CHAT_REQUEST, due=time.perf_counter() - 10)
    assert found.late_s >= 10
    assert found.ttft_s >= 10
    assert found.e2e_s >= found.ttft_s


@pytest.mark.parametrize(
    ("reply", "complaint", "lost"),
    [
        (Reply(status=400, body=b'{"error": {"message": "too long"}}'), "400: too long", False),
        (Reply(status=500, body=b'{"detail": "worker died"}'), "500: worker died", False),
        (Reply(status=503), "503: it gave no reason", False),
        (Reply(body=b'{"choices": [{"message": {"content": "whole"}}]}'), "no stream of events", False),
        (Reply(reset_after=1), "the connection failed", True),
        (Reply(reset_after=0), "the connection failed", True),
        (Reply(pieces=()), "holds no text", False),
    ],
)
def test_a_failure_is_a_sentence(serve: Serve, reply: Reply, complaint: str, lost: bool) -> None:
    found = ask(serve(behave=lambda number, body: reply), CHAT_REQUEST)
    assert found.error is not None and complaint in found.error
    assert found.lost is lost


def test_a_server_that_repeats_the_key_does_not_make_us_show_it(serve: Serve) -> None:
    server = serve(behave=lambda number, body: Reply(status=401, body=b'{"error": "bad key s3cret-key"}'))
    assert ask(server, CHAT_REQUEST, key="s3cret-key").error == "401: bad key ***"


def introduced(url: str, model: str | None = None, key: str = "") -> str:
    async def go() -> str:
        async with Server("candidate", url, model, key, 30.0) as client:
            await client.introduce()
            return client.model

    return asyncio.run(go())


def test_the_only_model_is_found(serve: Serve) -> None:
    server = serve(name="org/model")
    assert introduced(f"{server.url}/v1/") == "org/model"
    assert introduced(server.url, "org/model") == "org/model"


SEVERAL = b'{"data": [{"id": "b"}, {"id": "a"}]}'


@pytest.mark.parametrize(
    ("settings", "model", "complaint"),
    [
        ({}, "other", "has no model other; choose one with --candidate-model: target"),
        ({"models": SEVERAL}, None, "serves several models; choose one with --candidate-model: a, b"),
        ({"models": b"<html>Welcome</html>"}, None, "answers 200: <html>Welcome</html>; expected the models"),
        ({"models": b'{"data": []}'}, None, "expected the models of an OpenAI-compatible server"),
        ({"key": "right"}, None, r"wants another key \(bad key Bearer \*\*\*\); see --candidate-key-env"),
    ],
)
def test_a_server_that_cannot_be_used(serve: Serve, settings: dict, model: str | None, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        introduced(serve(**settings).url, model, "wrong-key")


def test_no_server() -> None:
    with pytest.raises(ConfigError, match=r"http://127.0.0.1:9: no server answers \("):
        introduced("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("localhost:8000", "is no server's address"),
        ("ftp://host", "is no server's address"),
        ("http://", "is no server's address"),
        ("http://host:0", "is no server's address"),
        ("http://host:99999", "is no server's address"),
        ("http://host/v 1", "is no server's address"),
        ("http://xn--", "is no server's address"),
        ("http://[::1", "is no server's address"),
        ("http://user:pass@host", "without user, password"),
        ("http://user:pa ss@host", "without user, password"),
        ("http://host/v1?key=x", "without user, password"),
    ],
)
def test_an_address_that_is_none(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as found:
        address(text)
    assert "ss@" not in str(found.value)


def test_addresses() -> None:
    assert address("http://127.0.0.1:8000/v1/") == address("http://127.0.0.1:8000") == "http://127.0.0.1:8000"
    assert address("https://host/api/v1") == "https://host/api"


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_KEY", " s3cret ")
    assert read_key("BENCH_KEY") == "s3cret"
    assert read_key(None) == ""
    monkeypatch.setenv("BENCH_KEY", "s3 cret")
    with pytest.raises(ConfigError, match="BENCH_KEY holds something") as found:
        read_key("BENCH_KEY")
    assert "cret" not in str(found.value)
    monkeypatch.delenv("BENCH_KEY")
    with pytest.raises(ConfigError, match="BENCH_KEY is not set"):
        read_key("BENCH_KEY")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"error": {"message": "a\\nb"}}', "a b"),
        (b'{"object": "error", "message": "c"}', "c"),
        (b'{"detail": "d"}', "d"),
        (b"plain", "plain"),
        (b"", "it gave no reason"),
        (b"x" * 5000, "x" * 300),
    ],
)
def test_what_a_server_says(content: bytes, words: str) -> None:
    assert said(content) == words
