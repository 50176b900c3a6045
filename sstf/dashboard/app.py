"""The page, its files and its stream of events over HTTP, on loopback unless there is a key.

`/events` is a stream of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html): `state`
with what changed, `alarm` for each alarm that begins or ends. `/state` is the whole state once, for scripts.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sstf.dashboard.board import Board, Follower, known_window
from sstf.errors import ConfigError

PAGE = Path(__file__).parent / "page"
TICK = 1.0  # seconds
KEEP_ALIVE = 15  # ticks without news, after which a comment tells that the line stands
LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(board: Board, key: str | None, stopping: Callable[[], bool], stop: Callable[[], None]) -> FastAPI:
    """The application; it watches `board` while it is up, in `app.state.watching`.

    Args:
        board: what is watched.
        key: wanted as the password of HTTP basic authentication (any user), or as a bearer token. Without one, only
            requests to a loopback name are answered.
        stopping: streams end when it says True.
        stop: called when the watching ends: a page that shows old figures as live ones is worse than none.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.watching = watching = asyncio.create_task(board.watch())
        watching.add_done_callback(lambda _: stop())
        yield
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching

    app = FastAPI(title="sstf dashboard", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/state")
    async def state(window: int = 0) -> JSONResponse:
        return JSONResponse(Follower(board, known_window(window)).news())

    @app.get("/events")
    async def events(window: int = 0) -> StreamingResponse:
        stream = _events(Follower(board, known_window(window)), stopping)
        return StreamingResponse(stream, media_type="text/event-stream")

    app.mount("/page", StaticFiles(directory=PAGE))
    app.add_middleware(_Guard, key=key)
    return app


async def _events(follower: Follower, stopping: Callable[[], bool]) -> AsyncIterator[str]:
    yield "retry: 2000\n\n"
    quiet = 0
    while not stopping():
        news = follower.news()
        quiet = 0 if news else quiet + 1
        if news:
            for alarm in news.pop("new_alarms"):
                yield _event("alarm", alarm)
            yield _event("state", news)
        elif quiet % KEEP_ALIVE == 0:
            yield ": still here\n\n"
        await asyncio.sleep(TICK)


def _event(name: str, content: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(content, allow_nan=False)}\n\n"


class _Guard:
    """Who may ask, and the headers that keep the page to itself. ASGI, so that streams pass through unbuffered."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = POLICY
                headers["x-content-type-options"] = "nosniff"
                headers["referrer-policy"] = "no-referrer"
                headers["cache-control"] = "no-store"
            await send(message)

        headers = Headers(scope=scope)
        if self._key is None and _host(headers.get("host", "")) not in LOOPBACK:
            # Another site's name that was pointed at this machine (DNS rebinding).
            refused = PlainTextResponse("ask for this page as 127.0.0.1 or localhost\n", 403)
            await refused(scope, receive, sealed)
        elif self._key is not None and not _knows(headers.get("authorization", ""), self._key):
            challenge = {"www-authenticate": 'Basic realm="sstf dashboard: any user, the key as password"'}
            await PlainTextResponse("the key is missing or wrong\n", 401, challenge)(scope, receive, sealed)
        else:
            await self._app(scope, receive, sealed)


def _host(header: str) -> str:
    """Without the port.

    >>> _host("[::1]:8765"), _host("localhost:8765")
    ('::1', 'localhost')
    """
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def _knows(authorization: str, key: str) -> bool:
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return secrets.compare_digest(given.encode(), key.encode())


def serve(board: Board, host: str, port: int, key: str | None, announce: Callable[[str], None]) -> None:
    """Serve the page until SIGINT or SIGTERM; both end it well.

    Args:
        board: what is watched.
        host: a loopback address, or with a key any.
        port: 0 takes a free one.
        key: see `make_app`.
        announce: told the page's address.

    Raises:
        ConfigError: the port is taken, or the address is not this machine's; a host beyond loopback without a key.
    """
    if host not in LOOPBACK and not key:
        raise ConfigError(
            f"--host {host} shows the page to others: name with --api-key-env a variable that holds a key, "
            "or leave it at 127.0.0.1 and reach it through an SSH tunnel"
        )
    bound = _bind(host, port)
    server: uvicorn.Server

    def stop() -> None:
        server.should_exit = True

    app = make_app(board, key, lambda: server.should_exit, stop)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="critical", access_log=False, ws="none", timeout_graceful_shutdown=3)
    )
    shown = f"[{host}]" if ":" in host else host
    announce(f"http://{shown}:{bound.getsockname()[1]}/")
    # uvicorn raises the signal that ended it once more, for these.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        bound.close()
    watching: asyncio.Task[None] = app.state.watching
    if not watching.cancelled():
        watching.result()  # raises what ended it


def _bind(host: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen()  # whoever reads the address may ask at once
    except (OSError, OverflowError) as error:
        bound.close()
        raise ConfigError(f"cannot listen on {host} port {port} ({error}); choose another --port") from None
    return bound
