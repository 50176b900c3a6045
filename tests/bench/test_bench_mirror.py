"""The mirror: clients get the baseline's own bytes, whatever the candidate does, and every pair is compared."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from stand_in import Reply, StandIn

from sstf.bench.client import Server
from sstf.bench.mirror import LONGEST_BODY, Mirror, mirror
from sstf.bench.requests import read_recorded
from sstf.errors import ConfigError

Serve = Callable[..., StandIn]
PATIENCE_S = 60.0
HELLO = {"model": "target", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}


def mirrored(
    baseline: StandIn,
    candidate: StandIn,
    ask: Callable[[httpx.AsyncClient], Awaitable[Any]],
    limit: int | None = None,
    record: Path | None = None,
    key: str = "",
) -> Mirror:
    """What `ask` leaves behind. Without a limit it is stopped when `ask` is done, as an interrupt would."""

    async def go() -> Mirror:
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        async with (
            Server("baseline", baseline.url, "target", key, PATIENCE_S) as old,
            Server("candidate", candidate.url, candidate.name, key, PATIENCE_S) as new,
        ):
            note = lambda line: ready.set_result(line.split()[1].removesuffix("/v1"))  # noqa: E731
            work = asyncio.create_task(mirror(old, new, 0, limit, record, note))
            async with httpx.AsyncClient(base_url=await ready, timeout=PATIENCE_S, trust_env=False) as client:
                await ask(client)
            if limit is None:
                signal.raise_signal(signal.SIGINT)
            return await asyncio.wait_for(work, PATIENCE_S)

    return asyncio.run(go())


def whole(text: str) -> bytes:
    reply = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": {"completion_tokens": 4}}
    return json.dumps(reply).encode()


def test_clients_get_the_baselines_bytes_and_copies_are_compared(serve: Serve, tmp_path: Path) -> None:
    def behave(number: int, body: dict) -> Reply:
        return Reply(["One ", "two"], 2) if body.get("stream") else Reply(body=whole("All."))

    baseline, candidate = serve(behave=behave), serve(name="new", behave=behave)
    found: list[bytes] = []

    async def ask(client: httpx.AsyncClient) -> None:
        for body in ({**HELLO, "stream": True}, HELLO):
            reply = await client.post("/v1/chat/completions", json=body)
            found.append(reply.content)
            direct = httpx.post(f"{baseline.url}/v1/chat/completions", json={**body, "max_tokens": 8}, trust_env=False)
            assert reply.headers["content-type"].split(";")[0] in ("text/event-stream", "application/json")
            assert direct.status_code == reply.status_code == 200

    seen = mirrored(baseline, candidate, ask, limit=2, record=tmp_path / "recorded.jsonl")
    assert b'"content": "One "' in found[0] and found[0].endswith(b"data: [DONE]\n\n")
    assert found[1] == whole("All.")
    old, new = seen.load().aligned()
    assert [(answer.text, answer.tokens, len(answer.gaps_s)) for answer in old] == [("One two", 2, 1), ("All.", 4, 0)]
    assert [(answer.text, answer.tokens, len(answer.gaps_s)) for answer in new] == [("One two", 2, 1), ("All.", 4, 0)]
    assert old[1].ttft_s == old[1].e2e_s > 0  # not streamed: all of it comes at the end
    assert [request.greedy for request in seen.requests] == [True, True]
    # The copies are the requests, but for the model
    assert candidate.requests[0][1] == {**HELLO, "model": "new", "stream": True}
    first, second = read_recorded(tmp_path / "recorded.jsonl")
    assert first.body == second.body == {name: value for name, value in HELLO.items() if name != "model"}
    assert first.at is not None and second.at is not None and 0 < first.at < second.at


def test_a_candidate_that_fails_reaches_no_client(serve: Serve) -> None:
    candidate = serve()
    candidate.stop()

    async def ask(client: httpx.AsyncClient) -> None:
        for _ in range(3):
            reply = await client.post("/v1/chat/completions", json={**HELLO, "stream": True})
            assert reply.status_code == 200 and reply.text.endswith("data: [DONE]\n\n")

    old, new = mirrored(serve(), candidate, ask).load().aligned()
    assert [answer.error for answer in old] == [None] * 3
    assert all(answer.error and answer.lost for answer in new)


def test_what_is_no_completion_passes_through(serve: Serve) -> None:
    baseline, candidate = serve(), serve()
    baseline.behave = lambda number, body: Reply(status=400, body=b'{"error": {"message": "n is 1 here"}}')

    async def ask(client: httpx.AsyncClient) -> None:
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "target"
        assert (await client.get("/nowhere")).status_code == 404
        several = await client.post("/v1/chat/completions", json={**HELLO, "n": 2})
        assert (several.status_code, several.json()["error"]["message"]) == (400, "n is 1 here")

    seen = mirrored(baseline, candidate, ask)
    assert (seen.requests, candidate.requests) == ([], [])


def test_a_refusal_is_a_failure_of_both(serve: Serve) -> None:
    behave = lambda number, body: Reply(status=400, body=b'{"error": {"message": "too long"}}')  # noqa: E731

    async def ask(client: httpx.AsyncClient) -> None:
        assert (await client.post("/v1/chat/completions", json=HELLO)).json()["error"]["message"] == "too long"

    old, new = mirrored(serve(behave=behave), serve(behave=behave), ask, limit=1).load().aligned()
    assert (old[0].error, new[0].error) == ("400: too long", "400: too long")


def test_a_body_without_end_is_refused(serve: Serve) -> None:
    baseline = serve()

    async def ask(client: httpx.AsyncClient) -> None:
        reply = await client.post("/v1/chat/completions", content=b" " * (LONGEST_BODY + 1))
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, 413)

    mirrored(baseline, serve(), ask)
    assert baseline.requests == []


def test_a_baseline_that_is_gone_is_a_502(serve: Serve) -> None:
    baseline = serve()

    async def ask(client: httpx.AsyncClient) -> None:
        baseline.stop()
        reply = await client.post("/v1/chat/completions", json=HELLO)
        assert reply.status_code == 502
        assert "the baseline does not answer" in reply.json()["error"]["message"]

    seen = mirrored(baseline, serve(behave=lambda number, body: Reply(body=whole("x"))), ask)
    old, new = seen.load().aligned()
    assert old[0].error is not None and new[0].error is None


def test_an_answer_that_breaks_off_breaks_off_for_the_client(serve: Serve) -> None:
    async def ask(client: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/v1/chat/completions", json={**HELLO, "stream": True})

    old, _ = mirrored(serve(behave=lambda number, body: Reply(reset_after=1)), serve(), ask).load().aligned()
    assert old[0].error is not None and "the connection failed" in old[0].error


def test_a_client_that_leaves_is_not_compared_and_stops_the_baseline(serve: Serve) -> None:
    gone = threading.Event()

    def endless(number: int, body: dict) -> Reply:
        class Pieces(list):
            def __iter__(self):  # type: ignore[no-untyped-def]
                try:
                    while True:
                        yield "word " * 1000
                finally:
                    gone.set()  # writing failed: nobody reads any more

        return Reply(Pieces())

    baseline = serve(behave=endless)

    async def ask(client: httpx.AsyncClient) -> None:
        async with client.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True}) as reply:
            async for _ in reply.aiter_raw():
                break
        assert await asyncio.to_thread(gone.wait, PATIENCE_S)
        baseline.behave = lambda number, body: Reply()
        await client.post("/v1/chat/completions", json={**HELLO, "stream": True})

    seen = mirrored(baseline, serve(), ask, limit=1)  # the one that left does not count
    assert (seen.left, [request.id for request in seen.requests]) == (1, ["2"])


def test_whose_key_is_sent(serve: Serve) -> None:
    baseline, candidate = serve(key="clients"), serve(key="ours")

    async def ask(client: httpx.AsyncClient) -> None:
        headers = {"Authorization": "Bearer clients"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200

    mirrored(baseline, candidate, ask)  # no key of our own: the client's passes
    ours = serve(key="ours")
    mirrored(ours, candidate, ask, key="ours")


def test_a_port_that_is_taken(serve: Serve) -> None:
    server = serve()

    async def go() -> None:
        async with Server("baseline", server.url, "target", "", 1.0) as one:
            await mirror(one, one, server.port, None, None, print)

    with pytest.raises(ConfigError, match=f"port {server.port} cannot be listened at"):
        asyncio.run(go())


def test_the_command_ends_with_an_interrupt_and_advises(serve: Serve, tmp_path: Path) -> None:
    baseline = serve(behave=lambda number, body: Reply(["a", "b"], 2))
    candidate = serve(behave=lambda number, body: Reply(["a", "c"], 2))
    command = [sys.executable, "-m", "sstf", "bench", "--baseline", baseline.url, "--candidate", candidate.url]
    command += ["--mirror", "0", "--json", str(tmp_path / "report.json"), "--limit", "requests=3"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        url = process.stderr.readline().split()[1]
        for _ in range(3):
            reply = httpx.post(f"{url}/chat/completions", json={**HELLO, "stream": True}, trust_env=False)
            assert reply.status_code == 200
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 1, err
    assert "NO-GO" in out and "identical greedy answers 0% (0 of 3)" in out
    assert "Traceback" not in out + err
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["partial"], report["advice"]["compared"]) == (None, 3)
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0])), 1):
        pass


def test_a_mirror_that_nobody_uses_says_so(serve: Serve) -> None:
    server = serve()
    command = [sys.executable, "-m", "sstf", "bench", "--baseline", server.url, "--candidate", server.url]
    process = subprocess.Popen([*command, "--mirror", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr and "mirroring" in process.stderr.readline()
        process.terminate()
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 1, err
    assert "PARTIAL: no request came to be mirrored" in out
