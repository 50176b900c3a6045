"""A real HTTP server that streams completions whose text, order and failures a test decides, over real sockets."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """To one completion: events of one piece each, or a status with a body; a reset ends it after so many pieces."""

    pieces: Sequence[str] = ("a", "b")
    tokens: int | None = 2  # of the usage; None: there is none
    status: int = 200
    body: bytes = b""
    reset_after: int | None = None
    finish: str | None = "length"


@dataclass
class StandIn:
    """`requests` are (path, body) in order of arrival, warm-ups left out; `log` may be shared by two servers."""

    name: str = "target"
    behave: Callable[[int, dict[str, Any]], Reply] = lambda number, body: Reply()
    models: bytes | None = None  # what /v1/models answers in place of the list
    metrics: Callable[[], str] = lambda: ""
    key: str = ""
    log: list[tuple[str, str]] = field(default_factory=list)
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    warm_ups: int = 0
    most_at_once: int = 0

    def __post_init__(self) -> None:
        self.lock, self.at_once, self._open = threading.Lock(), 0, set[socket.socket]()
        outer = self

        class Handler(_Handler):
            owner = outer

        self._server = _Listener(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Gone: nothing listens, and what was open is reset. Also from within `behave`."""
        server = self._server

        def close() -> None:
            server.shutdown()
            self._thread.join()

        # The listening socket closes at once; the loop that accepts ends when it can.
        server.socket.close()
        threading.Thread(target=close, daemon=True).start()
        with self.lock:
            for connection in list(self._open):
                reset(connection)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests."""


def reset(connection: socket.socket) -> None:
    """End a connection with a TCP reset."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    owner: StandIn
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        with self.owner.lock:
            self.owner._open.add(self.connection)

    def finish(self) -> None:
        with self.owner.lock:
            self.owner._open.discard(self.connection)
        with suppress(OSError, ValueError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.owner.key and self.headers.get("Authorization") != f"Bearer {self.owner.key}":
            said = f"bad key {self.headers.get('Authorization')}"
            return self._send(401, json.dumps({"error": {"message": said}}).encode())
        if self.path == "/v1/models":
            listed = json.dumps({"object": "list", "data": [{"id": self.owner.name}]}).encode()
            return self._send(200, self.owner.models or listed)
        if self.path == "/metrics":
            return self._send(200, self.owner.metrics().encode(), "text/plain")
        return self._send(404, b"{}")

    def do_POST(self) -> None:
        owner = self.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        warm_up = body.get("max_tokens") == 8
        with owner.lock:
            number = len(owner.requests)
            if warm_up:
                owner.warm_ups += 1
            else:
                owner.requests.append((self.path, body))
                owner.log.append((owner.name, json.dumps(body.get("messages") or body.get("prompt"))))
            owner.at_once += 1
            owner.most_at_once = max(owner.most_at_once, owner.at_once)
        try:
            self._answer(Reply() if warm_up else owner.behave(number, body), "chat" in self.path)
        finally:
            with owner.lock:
                owner.at_once -= 1

    def _answer(self, reply: Reply, chat: bool) -> None:
        if reply.status != 200 or reply.body:
            return self._send(reply.status, reply.body)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if chat:
            self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for number, piece in enumerate(reply.pieces):
            if number == reply.reset_after:
                return reset(self.connection)
            part: dict[str, Any] = {"delta": {"content": piece}} if chat else {"text": piece}
            self._event({"choices": [{"index": 0, **part}]})
        if reply.reset_after is not None and reply.reset_after >= len(reply.pieces):
            return reset(self.connection)
        if reply.finish:
            part = {"delta": {}} if chat else {"text": ""}
            self._event({"choices": [{"index": 0, "finish_reason": reply.finish, **part}]})
        if reply.tokens is not None:
            self._event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": reply.tokens}})
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")
        return None

    def _event(self, event: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
