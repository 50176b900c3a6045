"""Clients that leave, queues that fill, decoders that break, memory, and the end."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from loopback_server import PATIENCE, Running, lookup, running
from rich.console import Console

from sstf.cli import main
from sstf.decode import SpeculativeDecoder
from sstf.decode.engine import Session
from sstf.errors import ConfigError
from sstf.serve import ServeConfig, serve
from sstf.serve.config import read_keys
from sstf.serve.server import listen
from sstf.serve.worker import Job, Worker
from sstf.targets import Target


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """Passes wait for it."""
    semaphore, step = threading.Semaphore(0), Session.step

    def gated(session: Session) -> None:
        if session.active:
            assert semaphore.acquire(timeout=PATIENCE)
        step(session)

    monkeypatch.setattr(Session, "step", gated)
    yield semaphore
    semaphore.release(10_000)


def endless(target: Target, monkeypatch: pytest.MonkeyPatch) -> SpeculativeDecoder:
    """Answers end at the limit only; one token a pass."""
    monkeypatch.setattr(Target, "end_tokens", frozenset())
    return SpeculativeDecoder(target)


def ask(server: Running, key: str = "none", **options: Any) -> str:
    fields: dict[str, Any] = {"prompt": "Hi", "temperature": 0, "max_tokens": 4} | options
    return server.client(key).completions.create(model="tiny", **fields).choices[0].text


def open_gates(server: Running, gate: threading.Semaphore) -> None:
    """Let everything run to its end."""
    gate.release(10_000)
    server.wait(lambda: not server.worker.running and not len(server.worker.waiting))


# ---- clients that leave ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(
    stream: bool, tiny_target: Target, gate: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(endless(tiny_target, monkeypatch), slots=1) as server:
        body = json.dumps({"model": "tiny", "prompt": "Hi", "max_tokens": 150, "stream": stream}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=PATIENCE)
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        server.wait(lambda: len(server.worker.running) == 1)
        (job,) = server.worker.running
        gate.release(3)
        raw.close()
        server.wait(lambda: job.dropped)
        gate.release(1)  # the pass that was under way
        server.wait(lambda: not server.worker.running)
        gate.release(100)
        assert ask(server)  # the slot is free


def test_a_client_that_leaves_the_queue(
    tiny_target: Target, gate: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(endless(tiny_target, monkeypatch), slots=1) as server, ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, server)
        server.wait(lambda: len(server.worker.running) == 1)
        with server.http() as http, pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json={"model": "tiny", "prompt": "Hello"}, timeout=0.5)
        server.wait(lambda: len(server.worker.waiting) == 0)
        gate.release(100)
        assert first.result(PATIENCE)
        assert server.metrics()["sstf_prompt_tokens_total",] == 1  # the other prompt was never taken in


# ---- waiting ---------------------------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_back(
    tiny_target: Target, gate: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = endless(tiny_target, monkeypatch)
    with running(decoder, slots=1, queue=2) as server, ThreadPoolExecutor(3) as pool:
        some = [pool.submit(ask, server)]
        server.wait(lambda: len(server.worker.running) == 1)
        some += [pool.submit(ask, server) for _ in range(2)]
        server.wait(lambda: len(server.worker.waiting) == 2)
        found = server.metrics()
        assert (found["sstf_requests_running",], found["sstf_requests_waiting",]) == (1, 2)
        with pytest.raises(openai.RateLimitError, match="2 requests are waiting already") as refused:
            ask(server)
        assert refused.value.response.headers["retry-after"] == "1"
        gate.release(1000)
        assert len({one.result(PATIENCE) for one in some}) == 1
        assert server.metrics()["sstf_requests_total", "/v1/completions", "429"] == 1


def test_keys_take_turns(tiny_target: Target, gate: threading.Semaphore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five waiting requests of one key and one of another, that one is the second."""
    order: list[int] = []
    decoder = endless(tiny_target, monkeypatch)
    add = Session.add

    def noting(session: Session, ids: Any, *rest: Any) -> Any:
        order.append(len(ids))
        return add(session, ids, *rest)

    with running(decoder, slots=1, keys=("crowd", "single")) as server, ThreadPoolExecutor(8) as pool:
        monkeypatch.setattr(Session, "add", noting)
        some: list[Future[str]] = []
        for waiting, (key, length) in enumerate([("crowd", n) for n in range(1, 7)] + [("single", 9)]):
            some.append(pool.submit(ask, server, key, prompt=[5] * length))
            if waiting == 0:
                server.wait(lambda: len(server.worker.running) == 1)
            else:
                server.wait(lambda waiting=waiting: len(server.worker.waiting) == waiting)
        gate.release(1000)
        for one in some:
            one.result(PATIENCE)
    assert order == [1, 2, 9, 3, 4, 5, 6]


# ---- decoders that break ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_pass_ends_its_answers_only(
    stream: bool, tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the third pass: an error in the client's terms, and the next request is answered as ever."""
    with running(endless(tiny_target, monkeypatch)) as server:
        expected = ask(server, max_tokens=10)
        step, passes = Session.step, 0

        def breaking(session: Session) -> None:
            nonlocal passes
            passes += bool(session.active)
            if passes == 3:
                session.passes._logits = lambda hidden: torch.full((1, hidden.shape[1], 300), float("nan"))  # type: ignore[method-assign]
            step(session)

        monkeypatch.setattr(Session, "step", breaking)
        create = server.client().completions.create
        options: dict[str, Any] = dict(model="tiny", prompt="Hi", temperature=0, max_tokens=10)
        if stream:
            with pytest.raises(openai.APIError, match="NaN or infinite logits"):
                list(create(**options, stream=True))
        else:
            with pytest.raises(openai.InternalServerError, match="NaN or infinite logits"):
                create(**options)
        assert ask(server, max_tokens=10) == expected
        assert len(server.log) == 1 and "NaN" in server.log[0]


def test_insides_stay_inside(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug is the operator's to read of."""
    with running(endless(tiny_target, monkeypatch)) as server:
        monkeypatch.setattr(Session, "add", lambda *_: 1 / 0)
        with server.http() as http:
            answer = http.post("/v1/completions", json={"model": "tiny", "prompt": "Hi"})
        assert answer.status_code == 500 and "ZeroDivision" not in answer.text and "File" not in answer.text
        assert answer.json()["error"]["type"] == "server_error"
        server.wait(lambda: server.log)
        assert "ZeroDivisionError" in server.log[0]


def test_a_bug_in_a_request_is_the_operators_too(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(endless(tiny_target, monkeypatch)) as server:
        with monkeypatch.context() as patch, server.http() as http:
            patch.setattr(Worker, "submit", lambda *_: 1 / 0)
            answer = http.post("/v1/completions", json={"model": "tiny", "prompt": "Hi"})
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert "ZeroDivision" not in answer.text
        server.wait(lambda: server.log)
        assert "ZeroDivisionError" in server.log[0]
        assert ask(server)
        assert server.metrics()["sstf_requests_total", "/v1/completions", "500"] == 1


def test_a_decoder_that_cannot_start(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_target.model.lm_head, "forward", lambda x: x.new_full((*x.shape[:-1], 300), float("nan")))
    monkeypatch.setattr(
        type(tiny_target.frozen_head),
        "native_logits",
        lambda self, x: x[..., :1].new_full((*x.shape[:-1], 300), float("nan")),
    )
    from sstf.errors import DecodeError

    with pytest.raises(DecodeError, match="NaN"), running(SpeculativeDecoder(tiny_target)):
        pass


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow(tiny_target: Target) -> None:
    """A hundred and fifty requests after forty to warm up; nothing of them is left."""

    async def ask_many(url: str, count: int) -> None:
        limits = httpx.Limits(max_connections=20)
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as http:

            async def one(i: int) -> None:
                body = {"model": "tiny", "prompt": f"Hello {i} " * 5, "max_tokens": 3, "stream": i % 2 == 0}
                assert (await http.post("/v1/completions", json=body)).status_code == 200

            await asyncio.gather(*(one(i) for i in range(count)))

    with running(lookup(tiny_target)) as server:
        asyncio.run(ask_many(server.url, 40))
        gc.collect()
        before = psutil.Process().memory_info().rss
        asyncio.run(ask_many(server.url, 150))
        server.wait(lambda: not server.worker.running)
        gc.collect()
        assert sum(type(thing) is Job for thing in gc.get_objects()) <= 1  # the last, in a variable of the thread
        assert len(server.worker.waiting) == 0
        grown = psutil.Process().memory_info().rss - before
        assert grown < 10e6, f"{grown / 1e6:.1f} MB for 150 requests"


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_an_end_lets_answers_finish_and_sends_the_rest_away(
    tiny_target: Target, gate: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(endless(tiny_target, monkeypatch), slots=1) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, server)
        server.wait(lambda: len(server.worker.running) == 1)
        second = pool.submit(ask, server)
        server.wait(lambda: len(server.worker.waiting) == 1)
        server.worker.drain()
        with pytest.raises(openai.InternalServerError, match="the server is stopping"):
            second.result(PATIENCE)
        with server.http() as http:
            assert http.get("/health").status_code == 503
        with pytest.raises(openai.InternalServerError, match="the server is stopping"):
            ask(server)
        gate.release(100)
        assert first.result(PATIENCE)


def test_an_answer_that_takes_too_long_is_ended(
    tiny_target: Target, gate: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(endless(tiny_target, monkeypatch)) as server, ThreadPoolExecutor(1) as pool:
        stream = server.client().completions.create(model="tiny", prompt="Hi", max_tokens=100, stream=True)
        assert next(iter(stream)).choices[0].finish_reason is None
        rest = pool.submit(list, stream)
        server.worker.halt()
        gate.release(1)
        with pytest.raises(openai.APIError, match="the answer was not done in time"):
            rest.result(PATIENCE)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_process_ends_with_0(number: signal.Signals, tiny_target_folder: Path, tmp_path: Path) -> None:
    """A real one, in the middle of a stream, which comes to its end."""
    learned = tmp_path / "experience.json"
    command = [sys.executable, "-m", "sstf", "serve", "ngram", "--target", str(tiny_target_folder), "--port", "0"]
    command += ["--slots", "2", "--experience", str(learned), "--policy", "{kind: chain, depth: 2}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"})
    try:
        assert process.stderr is not None
        lines: list[str] = []
        while not lines or "listening on" not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        url = lines[-1].split()[-1]
        with openai.OpenAI(base_url=url, api_key="none", timeout=PATIENCE, max_retries=0) as client:
            options: dict[str, Any] = dict(model="tiny", prompt="Hi", temperature=1, seed=3, max_tokens=100)
            expected = client.completions.create(**options).choices[0].text
            stream = client.completions.create(**options, stream=True)
            text = next(iter(stream)).choices[0].text
            process.send_signal(number)
            pieces = list(stream)
        assert text + "".join(piece.choices[0].text for piece in pieces) == expected
        assert process.wait(PATIENCE) == 0
        rest = process.stderr.read()
        assert rest == "stopped\n"
        assert json.loads(learned.read_text())["format"] == 1
    finally:
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()


# ---- the operator's mistakes -----------------------------------------------------------------------------------------


def failing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said[said.index("error:") :]


def test_options(tiny_target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "lets other machines ask" in failing(["ngram", "--host", "0.0.0.0"], capsys)
    assert "slots" in failing(["ngram", "--slots", "0"], capsys)
    assert "port" in failing(["ngram", "--port", "70000"], capsys)
    assert "policy" in failing(["ngram", "--policy", "{kind: bush}"], capsys)
    assert "NO_SUCH_KEY" in failing(["ngram", "--api-key-env", "NO_SUCH_KEY"], capsys)
    assert "cannot listen" in failing(["ngram", "--host", "192.0.2.1", "--api-key-env", "PATH"], capsys)
    target = ["--target", str(tiny_target_folder), "--port", "0"]
    assert "the target has 256" in failing(["ngram", *target, "--context", "300"], capsys)
    assert "no head there" in failing([str(tmp_path), "--port", "0"], capsys)


def test_a_port_that_is_taken() -> None:
    with listen(ServeConfig(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1, port {port}"):
            serve("ngram", ServeConfig(port=port), None, None, True, Console(quiet=True))


def test_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", " one, two,")
    assert read_keys(ServeConfig(host="0.0.0.0", api_key_env="KEYS")) == ("one", "two")
    assert read_keys(ServeConfig(host="::1")) == read_keys(ServeConfig(host="localhost")) == ()
    monkeypatch.setenv("KEYS", " ,")
    with pytest.raises(ConfigError, match="holds no key"):
        read_keys(ServeConfig(api_key_env="KEYS"))
    with pytest.raises(ConfigError, match="name with --api-key-env"):
        read_keys(ServeConfig(host="example.org"))
