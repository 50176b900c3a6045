"""What a client can do wrong: a status, one sentence in OpenAI's form, and nothing of the server's insides."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from loopback_server import PATIENCE, Running, lookup, running

from sstf.serve import app
from sstf.targets import Target

CHAT, WORDS = "/v1/chat/completions", "/v1/completions"
FINE: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    WORDS: {"model": "tiny", "prompt": "Hi", "max_tokens": 2},
}


def message(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text and 'File "' not in answer.text
    return str(error["message"])


@pytest.mark.parametrize("path", [CHAT, WORDS])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": -0.1}, "temperature: Input should be greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature: Input should be a valid number"),
        ({"temperature": "1"}, "temperature: Input should be a valid number"),
        ({"top_p": 0}, "top_p: Input should be greater than 0"),
        ({"top_p": 1.5}, "top_p: Input should be less than or equal to 1"),
        ({"top_k": -2}, "top_k:"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": 2.5}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 200}, "max_tokens is 200 and the prompt has"),
        ({"seed": 2**63}, "seed:"),
        ({"seed": True}, "seed: Input should be a valid integer"),
        ({"stop": ""}, "stop:"),
        ({"stop": ["a", ""]}, "stop.1:"),
        ({"stop": ["a"] * 17}, "stop:"),
        ({"stop": "a" * 201}, "stop:"),
        ({"stream": "yes"}, "stream: Input should be a valid boolean"),
        ({"stream_options": {"x": 1}}, "stream_options.x: this field is not known here"),
        ({"n": 2}, "n is not supported by this server (only 1"),
        ({"logprobs": True}, "logprobs is not supported"),
        ({"logprobs": 0}, "logprobs is not supported"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
        ({"presence_penalty": -1}, "presence_penalty is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias is not supported"),
        ({"best_of": 3}, "best_of is not supported"),
        ({"stop_token_ids": [7]}, "stop_token_ids: 7 does not end this model's answers"),
        ({"temprature": 1}, "temprature: this field is not known here"),
        ({"model": None}, "model: Field required"),
    ],
)
def test_fields(path: str, changes: dict[str, Any], said: str, served: Running) -> None:
    with served.http() as http:
        answer = http.post(path, json=FINE[path] | changes)
    assert answer.status_code == 400 and said in message(answer)
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_what_asks_for_nothing_is_taken(served: Running) -> None:
    neutral: dict[str, Any] = {
        "n": 1, "logprobs": False, "tools": [], "tool_choice": "none", "response_format": {"type": "text"},
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "seed": None, "stop": None, "top_k": -1,
        "metadata": {"a": "b"}, "stream": False, "best_of": 1, "user": "me",
    }  # fmt: skip
    with served.http() as http:
        for path, fine in FINE.items():
            assert http.post(path, json=fine | neutral).status_code == 200


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"messages": []}, 400, "messages: List should have at least 1 item"),
        ({"messages": "Hi"}, 400, "messages: Input should be a valid array"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role: Input should be 'system', 'user'"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content: Field required"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content:"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            400,
            "messages.0.content.0.type",
        ),
        ({"messages": [{"role": "user", "content": "Hi " * 200}]}, 400, "must also hold an answer"),
        ({"max_completion_tokens": 3}, 400, "are the same; send one of them"),
        ({"model": "gpt-5"}, 404, "the model 'gpt-5' does not exist; this server has tiny"),
    ],
)
def test_chats(changes: dict[str, Any], status: int, said: str, served: Running) -> None:
    with served.http() as http:
        answer = http.post(CHAT, json=FINE[CHAT] | changes)
    assert answer.status_code == status and said in message(answer)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "the prompt has no tokens"),
        ("", "the prompt has no tokens"),
        (["a", "b"], "prompt"),
        ([[5], [6]], "prompt"),
        ([5, -1], "prompt"),
        ([5, "a"], "prompt"),
        ([5, 300], "prompt: token id 300 is not in the vocabulary of 300"),
        ([5] * 200, "must also hold an answer"),
        ({"text": "a"}, "prompt"),
    ],
)
def test_prompts(prompt: object, said: str, served: Running) -> None:
    with served.http() as http:
        answer = http.post(WORDS, json=FINE[WORDS] | {"prompt": prompt})
    assert answer.status_code == 400 and said in message(answer)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"null",
        b'{"model": NaN}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model":"tiny","prompt":"\\ud800"}',
        b'{"model":"tiny","prompt":"a","temperature":1e999}',
        b'{"model":"tiny","prompt":"a","seed":' + b"9" * 5000 + b"}",
    ],
)
def test_bodies_that_are_no_request(body: bytes, served: Running) -> None:
    with served.http() as http:
        answer = http.post(WORDS, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and message(answer)


def test_paths_methods_and_content_types(served: Running) -> None:
    with served.http() as http:
        assert http.get("/v1/nothing").status_code == 404 and message(http.get("/v1/nothing"))
        assert http.get(CHAT).status_code == 405 and message(http.get(CHAT))
        plain = http.post(CHAT, content=json.dumps(FINE[CHAT]), headers={"Content-Type": "text/plain"})
        assert plain.status_code == 415 and "application/json" in message(plain)
        assert http.get("/health").json() == {"status": "ok"}
        foreign = http.get("/v1/models", headers={"Host": "evil.example:80"})
        assert foreign.status_code == 403 and "localhost only" in message(foreign)
        assert http.get("/v1/models", headers={"Host": "[::1]:80"}).status_code == 200


def test_the_client_raises_its_own_errors(served: Running) -> None:
    create = served.client().chat.completions.create
    with pytest.raises(openai.BadRequestError, match="temperature"):
        create(model="tiny", messages=[{"role": "user", "content": "Hi"}], temperature=-1)
    with pytest.raises(openai.NotFoundError) as caught:
        create(model="other", messages=[{"role": "user", "content": "Hi"}])
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        create(model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=5000)
    assert too_long.value.code == "context_length_exceeded"


# ---- sizes and times -------------------------------------------------------------------------------------------------


def test_ten_megabytes(served: Running) -> None:
    """Declared or in chunks: refused, and the server goes on."""
    big = json.dumps(FINE[WORDS] | {"prompt": "x" * 10_000_000}).encode()
    headers = {"Content-Type": "application/json"}
    with served.http() as http:
        assert "2,097,152 bytes" in message(refused := http.post(WORDS, content=big, headers=headers))
        assert refused.status_code == 413

        def pieces() -> Iterator[bytes]:
            for start in range(0, len(big), 100_000):
                yield big[start : start + 100_000]

        assert http.post(WORDS, content=pieces(), headers=headers).status_code == 413
        assert http.post(WORDS, json=FINE[WORDS]).status_code == 200


def test_a_declared_length_is_refused_before_a_byte_is_sent(served: Running) -> None:
    url = urlsplit(served.url)
    for length, status in (("10000000", b"413"), ("9" * 300, b"413")):
        with socket.create_connection((url.hostname, url.port), timeout=PATIENCE) as raw:
            head = f"POST {WORDS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            raw.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
            first = raw.recv(1000)
            assert status in first or b"400" in first  # the HTTP parser may refuse an absurd number itself


def test_a_body_that_never_comes(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_S", 0.2)
    url = urlsplit(served.url)
    with socket.create_connection((url.hostname, url.port), timeout=PATIENCE) as raw:
        raw.sendall(f"POST {WORDS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode())
        raw.sendall(b"Content-Length: 100\r\n\r\n{")
        assert b"408" in raw.recv(1000)


def test_a_client_that_leaves_in_the_middle_of_its_body(tiny_target: Target) -> None:
    with running(lookup(tiny_target)) as server:
        url = urlsplit(server.url)
        with socket.create_connection((url.hostname, url.port), timeout=PATIENCE) as raw:
            raw.sendall(f"POST {WORDS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode())
            raw.sendall(b"Content-Length: 100\r\n\r\n{")
        server.wait(lambda: ("sstf_requests_total", WORDS, "499") in server.metrics())
        assert not server.log


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_keys(tiny_target: Target) -> None:
    with running(lookup(tiny_target), keys=("first-key", "second-key")) as server, server.http() as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first-key"}):
            for path in ("/v1/models", "/metrics"):
                answer = http.get(path, headers=headers)
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
                assert "first-key" not in answer.text and "API key" in message(answer)
        assert http.get("/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        for key in ("first-key", "second-key"):
            assert [model.id for model in server.client(key).models.list()] == ["tiny"]
        assert server.metrics("first-key")["sstf_requests_total", "/v1/models", "401"] == 4


def test_many_connections_at_once(tiny_target: Target) -> None:
    """Two hundred, three slots: all are answered."""

    async def ask_all(url: str) -> list[int]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as http:
            answers = await asyncio.gather(*(http.post(WORDS, json=FINE[WORDS]) for _ in range(200)))
        return [answer.status_code for answer in answers]

    with running(lookup(tiny_target)) as server:
        assert asyncio.run(ask_all(server.url)) == [200] * 200
        assert not server.log
