"""A real HTTP server that speaks the completions protocol and misbehaves on demand, over real sockets.

Its "model" writes ids that depend on the prompt, the temperature and the seed only, so that the right answer to every
request is known.
"""

from __future__ import annotations

import hashlib
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from transformers import PreTrainedTokenizerBase

from sstf.types import Sampled, SamplingParams


@dataclass(frozen=True)
class Fault:
    """What happens to one request in place of (`kind`), or before (`delay_s`), its answer."""

    kind: str = "none"  # none, status, half, body, cut (the connection ends with a reset)
    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    delay_s: float = 0.0


@dataclass
class Settings:
    """How this server differs from vLLM; tests change it."""

    form: str = "token_ids"  # token_ids, tokens_as_ids, content, text
    gives_end: bool = True  # whether ids include the end token
    takes_seeds: bool = True
    prompt_extra: tuple[int, ...] = ()  # ids that it puts before every prompt
    models: tuple[dict[str, Any], ...] = ({"id": "tiny", "root": "/models/tiny", "max_model_len": 512},)
    key: str = ""
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda reply: reply
    # Called with the number of the request (from 0, completions of id prompts only) and its body.
    fault: Callable[[int, dict[str, Any]], Fault] = lambda number, body: Fault()


def written(
    letters: Sequence[int], end: int, prompt: Sequence[int], seed: int, temperature: float, limit: int
) -> Sampled:
    """What the model answers."""
    key = f"{list(prompt)} {seed if temperature else 0} {temperature}".encode()
    draw = random.Random(hashlib.sha256(key).digest())
    ids = [draw.choice(letters) for _ in range(draw.randint(1, 30))]
    return Sampled([*ids, end], True) if len(ids) < limit else Sampled(ids[:limit], False)


@dataclass
class FaultyServer:
    """`start` listens, `stop` goes away with all connections; the port stays the same."""

    tokenizer: PreTrainedTokenizerBase
    letters: list[int]
    end: int
    settings: Settings = field(default_factory=Settings)
    requests: list[dict[str, Any]] = field(default_factory=list)  # completions of id prompts, in order of arrival
    answered: list[tuple[int, ...]] = field(default_factory=list)  # prompts that were answered wholly
    most_at_once: int = 0
    port: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._at_once = 0
        self._open: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def expect(self, prompt: Sequence[int], params: SamplingParams) -> Sampled:
        """The right result for a prompt."""
        seed = params.seed & 0x7FFFFFFF if self.settings.takes_seeds else 0
        return written(self.letters, self.end, prompt, seed, params.temperature, params.max_new_tokens)

    def start(self) -> None:
        outer = self

        class Handler(_Handler):
            owner = outer

        self._server = _Listener(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), name="faulty-server", daemon=True).start()

    def stop(self) -> None:
        """Gone: nothing listens, and what was open is reset."""
        if self._server is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._server = None
        with self._lock:
            for connection in list(self._open):
                reset(connection)

    def busy(self, change: int) -> None:
        with self._lock:
            self._at_once += change
            self.most_at_once = max(self.most_at_once, self._at_once)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests."""


def reset(connection: socket.socket) -> None:
    """End a connection with a TCP reset."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


class _Handler(BaseHTTPRequestHandler):
    owner: FaultyServer
    protocol_version = "HTTP/1.1"  # keep-alive
    disable_nagle_algorithm = True  # it would hold back every answer for 40 ms

    def setup(self) -> None:
        super().setup()
        with self.owner._lock:
            self.owner._open.add(self.connection)

    def finish(self) -> None:
        with self.owner._lock:
            self.owner._open.discard(self.connection)
        with suppress(OSError, ValueError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        if self._unauthorised():
            return
        if self.path == "/v1/models":
            self._send(200, json.dumps({"object": "list", "data": list(self.owner.settings.models)}).encode())
        else:
            self._send(404, b'{"detail":"Not Found"}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._unauthorised():
            return
        if self.path != "/v1/completions":
            self._send(404, b'{"detail":"Not Found"}')
            return
        probe = isinstance(body["prompt"], str)
        fault = Fault()
        if not probe:
            with self.owner._lock:
                number = len(self.owner.requests)
                self.owner.requests.append(body)
            fault = self.owner.settings.fault(number, body)
        self.owner.busy(1)
        try:
            self._answer(body, fault, probe)
        finally:
            self.owner.busy(-1)

    def _answer(self, body: dict[str, Any], fault: Fault, probe: bool) -> None:
        time.sleep(fault.delay_s)
        if "seed" in body and not self.owner.settings.takes_seeds:
            message = "torch.Generator: per-request seed is not supported on this backend"
            self._send(400, json.dumps({"error": {"message": message}}).encode())
            return
        if fault.kind in ("status", "body"):
            self._send(fault.status, fault.body, fault.headers)
            return
        if fault.kind == "cut":
            reset(self.connection)
            self.close_connection = True
            return
        content = json.dumps(self.owner.settings.change(self._reply(body))).encode()
        if fault.kind == "half":
            self._send(200, content[: len(content) // 2], length=len(content))
            self.close_connection = True
            return
        self._send(200, content)
        if not probe:
            with self.owner._lock:
                self.owner.answered.append(tuple(body["prompt"]))

    def _reply(self, body: dict[str, Any]) -> dict[str, Any]:
        owner, settings = self.owner, self.owner.settings
        prompt = body["prompt"]
        if isinstance(prompt, str):
            prompt = owner.tokenizer.encode(prompt, add_special_tokens=False)
        sampled = written(
            owner.letters, owner.end, prompt, body.get("seed", 0), body["temperature"], body["max_tokens"]
        )
        ids = sampled.token_ids if settings.gives_end or not sampled.finished else sampled.token_ids[:-1]
        text = owner.tokenizer.decode(sampled.token_ids[:-1] if sampled.finished else sampled.token_ids)
        read = [*settings.prompt_extra, *prompt]
        choice: dict[str, Any] = {
            "index": 0,
            "text": text,
            "logprobs": None,
            "finish_reason": "stop" if sampled.finished else "length",
        }
        if settings.form == "token_ids" and body.get("return_token_ids"):
            choice |= {"stop_reason": None, "token_ids": ids, "prompt_token_ids": read}
        if settings.form == "tokens_as_ids" and body.get("logprobs") and body.get("return_tokens_as_token_ids"):
            choice["logprobs"] = {"tokens": [f"token_id:{token}" for token in ids], "token_logprobs": [-0.5] * len(ids)}
        if settings.form == "content" and body.get("logprobs"):
            choice["logprobs"] = {"content": [{"id": token, "token": "x", "logprob": -0.5} for token in ids]}
        usage = {"prompt_tokens": len(read), "completion_tokens": len(sampled.token_ids)}
        return {"object": "text_completion", "model": "tiny", "choices": [choice], "usage": usage}

    def _unauthorised(self) -> bool:
        sent = self.headers.get("Authorization", "")
        if self.owner.settings.key and sent != f"Bearer {self.owner.settings.key}":
            # As careless as a server can be: it repeats what it was sent.
            self._send(401, json.dumps({"error": {"message": f"bad credentials: {sent}"}}).encode())
            return True
        return False

    def _send(
        self,
        status: int,
        content: bytes,
        headers: Sequence[tuple[str, str]] = (),
        length: int | None = None,
    ) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content) if length is None else length))
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # the client went away, or `stop` closed the connection
            self.close_connection = True
