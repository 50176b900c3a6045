"""Live traffic, mirrored: a proxy on loopback serves its clients by the baseline and sends copies to the candidate.

The baseline's answers pass through byte by byte as they come, and are timed on the way. A copy differs from its request
in the model's name only, and nothing that happens to it reaches a client. Requests for other than completions pass
through unmirrored. Both servers work at the same time here, so on one machine each slows the other: compare latencies
from a replay of what was recorded (`record`) when that matters.

A recording holds requests' bodies, and no headers: keys are not in it, but what users wrote is.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import httpx
import uvicorn
from anyio import CancelScope
from starlette.applications import Starlette
from starlette.requests import Request as Incoming
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sstf.bench.arrivals import Level
from sstf.bench.client import Answer, BadAnswer, Server, Stream, refusal
from sstf.bench.drive import Load, Measured, Round
from sstf.bench.requests import CHAT, TEXT, Request, request_of
from sstf.errors import ConfigError, DataError

LONGEST_BODY = 16 << 20  # bytes
COPIES_AT_ONCE = 64
GRACE_S = 30  # for answers under way when it ends
METHODS = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]


@dataclass
class Mirror:
    """The proxy's state. `limit`: it ends after so many mirrored requests."""

    baseline: Server
    candidate: Server
    limit: int | None
    record: TextIO | None
    end: Callable[[], None]
    began: float = field(default_factory=time.perf_counter)
    requests: list[Request] = field(default_factory=list)
    answers: tuple[dict[str, Answer], dict[str, Answer]] = field(default_factory=lambda: ({}, {}))
    dropped: int = 0  # not copied, as the candidate was so far behind
    left: int = 0  # clients that did not wait for their answer
    _copies: set[asyncio.Task[None]] = field(default_factory=set)
    _known: int = 0
    _waiting: int = 0  # mirrored, and not answered yet

    async def serve(self, incoming: Incoming) -> Response:
        """One request, whatever it is."""
        now, content = time.perf_counter(), bytearray()
        async for part in incoming.stream():
            content += part
            if len(content) > LONGEST_BODY:
                return _error(413, f"the body is longer than {LONGEST_BODY:,} bytes")
        request = self._mirrored(incoming, bytes(content), now)
        copy = self._copy(request, now) if request else None
        query = f"?{incoming.url.query}" if incoming.url.query else ""
        try:
            reply = await self.baseline.forward(
                incoming.method, f"{incoming.url.path}{query}", bytes(content), dict(incoming.headers)
            )
        except httpx.HTTPError as error:
            words = f"the baseline does not answer ({error or type(error).__name__})"
            if request:
                self._keep(request, Answer(request.id, 0.0, error=words, lost=True))
            return _error(502, words)
        kind = reply.headers.get("content-type", "application/json")
        relayed = self._relay(reply, request, copy, now)
        return StreamingResponse(relayed, reply.status_code, headers={"content-type": kind})

    async def finish(self) -> None:
        """Wait for copies that are under way."""
        if self._copies:
            await asyncio.wait(self._copies, timeout=GRACE_S)
        for copy in list(self._copies):
            copy.cancel()

    def load(self) -> Load:
        """All pairs, as of one round."""
        wall = time.perf_counter() - self.began
        old, new = ([side[r.id] for r in self.requests if r.id in side] for side in self.answers)
        return Load(Level("mirrored"), self.requests, Measured([Round(old, wall)]), Measured([Round(new, wall)]))

    def _mirrored(self, incoming: Incoming, content: bytes, now: float) -> Request | None:
        path = incoming.url.path.removeprefix("/v1/")
        if incoming.method != "POST" or path not in (CHAT, TEXT):
            return None
        if self.limit is not None and len(self.requests) + self._waiting >= self.limit:
            return None
        try:
            body = json.loads(content)
            request = request_of("request", str(self._known + 1), {"at": now - self.began, "path": path, "body": body})
        except (ValueError, RecursionError, DataError):
            return None  # for the baseline to refuse
        if len(self._copies) >= COPIES_AT_ONCE:
            self.dropped += 1
            return None
        self._known += 1
        self._waiting += 1
        if self.record:
            self.record.write(json.dumps({"at": request.at, "path": path, "body": body}, ensure_ascii=False) + "\n")
            self.record.flush()
        # As it came: whether it is streamed is its client's choice.
        return Request(request.id, path, {key: value for key, value in body.items() if key != "model"}, request.at)

    def _copy(self, request: Request, now: float) -> asyncio.Task[None]:
        async def send() -> None:
            self.answers[1][request.id] = await self.candidate.send(request, {}, now)

        copy = asyncio.create_task(send())
        self._copies.add(copy)
        copy.add_done_callback(self._copies.discard)
        return copy

    async def _relay(
        self, reply: httpx.Response, request: Request | None, copy: asyncio.Task[None] | None, now: float
    ) -> AsyncIterator[bytes]:
        stream, whole, error, broken = Stream(), bytearray(), None, None
        streamed = "event-stream" in reply.headers.get("content-type", "")
        try:
            async for data in reply.aiter_raw():
                if request and error is None:
                    whole += b"" if streamed and reply.status_code == 200 else data
                    try:
                        if streamed:
                            stream.feed(data, time.perf_counter())
                    except BadAnswer as bad:
                        error = str(bad)
                yield data
        except httpx.HTTPError as failure:
            broken = failure
            error = f"the connection failed ({failure or type(failure).__name__})"
        except BaseException:  # the client is gone, and with it the wish for an answer
            if request and copy:
                self.left += 1
                self._waiting -= 1
                copy.cancel()
            raise
        finally:
            # Also when the client is gone, so that the baseline stops writing.
            with CancelScope(shield=True), suppress(httpx.HTTPError):
                await reply.aclose()
        if request:
            self._keep(request, _answer(request, reply, stream, bytes(whole), error, now))
        if broken:
            raise broken  # the client's connection breaks as the baseline's did

    def _keep(self, request: Request, answer: Answer) -> None:
        self._waiting -= 1
        self.requests.append(request)
        self.answers[0][request.id] = answer
        if len(self.requests) == self.limit:
            self.end()


def _answer(
    request: Request, reply: httpx.Response, stream: Stream, whole: bytes, error: str | None, now: float
) -> Answer:
    """What passed by."""
    if error is None and reply.status_code != 200:
        error = refusal(reply.status_code, whole)
    if error is not None:
        return Answer(request.id, 0.0, error=error)
    try:
        if whole:
            stream.take_whole(whole, time.perf_counter())
        return stream.answer(request.id, now, now)
    except BadAnswer as bad:
        return Answer(request.id, 0.0, error=str(bad))


def _error(status: int, words: str) -> JSONResponse:
    return JSONResponse({"error": {"message": words, "type": "proxy_error", "code": status}}, status)


class _Listener(uvicorn.Server):
    """Leaves signals to `mirror`: uvicorn would raise them again once it has ended."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def mirror(
    baseline: Server,
    candidate: Server,
    port: int,
    limit: int | None,
    record: Path | None,
    note: Callable[[str], None],
) -> Mirror:
    """Serve on loopback until `limit` requests are mirrored, or an interrupt or SIGTERM comes.

    Raises:
        ConfigError: the port cannot be listened at, or the recording cannot be written.
    """
    loop = asyncio.get_running_loop()
    try:
        recording = record.open("a", encoding="utf-8") if record else None
    except OSError as error:
        raise ConfigError(f"--record {record} cannot be written ({error.strerror})") from None
    try:
        state = Mirror(baseline, candidate, limit, recording, lambda: setattr(listener, "should_exit", True))
        app = Starlette(routes=[Route("/{path:path}", state.serve, methods=METHODS)])
        settings: dict[str, Any] = {"log_level": "critical", "access_log": False, "server_header": False}
        listener = _Listener(
            uvicorn.Config(app, "127.0.0.1", port, lifespan="off", timeout_graceful_shutdown=GRACE_S, **settings)
        )
        try:
            listening = socket.create_server(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(f"port {port} cannot be listened at ({error.strerror}); choose another") from None
        with listening:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, state.end)
            note(f"mirroring http://127.0.0.1:{listening.getsockname()[1]}/v1 to both servers; Ctrl-C ends it")
            await listener.serve([listening])
        await state.finish()
        return state
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        if recording:
            recording.close()
