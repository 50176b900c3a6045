"""`sstf dashboard` as a process of its own, and what a page hears from it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

PATIENCE = 90.0


@dataclass
class Dashboard:
    process: subprocess.Popen[str]
    url: str

    def get(self, path: str, **headers: str) -> HTTPResponse:
        return urlopen(Request(self.url + path, headers=headers), timeout=PATIENCE)  # type: ignore[no-any-return]

    def refusal(self, path: str, **headers: str) -> tuple[int, str]:
        """Status and challenge of a request that is refused."""
        try:
            self.get(path, **headers).close()
        except HTTPError as error:
            with error:
                return error.code, error.headers.get("www-authenticate", "")
        raise AssertionError(f"{path} was answered")

    def state(self) -> dict[str, Any]:
        with self.get("state") as answer:
            return dict(json.load(answer))

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=PATIENCE)


@contextmanager
def dashboard(*arguments: str | Path, **environment: str) -> Iterator[Dashboard]:
    process = subprocess.Popen(
        [sys.executable, "-m", "sstf", "dashboard", *map(str, arguments), "--port", "0"],
        stdout=subprocess.PIPE, text=True, env=os.environ | environment,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert "dashboard at http" in line, line
        yield Dashboard(process, line.split()[2].replace("0.0.0.0", "127.0.0.1"))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def events(answer: HTTPResponse) -> Iterator[tuple[str, Any]]:
    """Events of a stream, as (name, content)."""
    name = ""
    for line in answer:
        key, _, value = line.decode().rstrip("\n").partition(": ")
        if key == "event":
            name = value
        elif key == "data":
            yield name, json.loads(value)


@dataclass
class Engine:
    """A stand-in for an engine: /metrics with counters that a test moves."""

    drafts: int = 0
    accepted: int = 0
    requests: int = 0
    url: str = ""
    asked: list[str] = field(default_factory=list)

    def work(self, passes: int, accepted: int) -> None:
        self.drafts += passes
        self.accepted += accepted
        self.requests += 1

    @contextmanager
    def working(self, passes: int, accepted: int) -> Iterator[None]:
        """A request of so much every 50 ms."""
        stop = threading.Event()

        def work() -> None:
            while not stop.wait(0.05):
                self.work(passes, accepted)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def metrics(self) -> bytes:
        rows = {
            "vllm:generation_tokens_total": self.drafts + self.accepted,
            "vllm:request_success_total": self.requests,
            "vllm:num_requests_running": 1,
            "vllm:num_requests_waiting": 0,
            "vllm:kv_cache_usage_perc": 0.5,
            "vllm:spec_decode_num_drafts_total": self.drafts,
            "vllm:spec_decode_num_accepted_tokens_total": self.accepted,
            'vllm:time_to_first_token_seconds_bucket{le="0.5"}': self.requests,
            'vllm:time_to_first_token_seconds_bucket{le="+Inf"}': self.requests,
        }
        return "".join(f"{name} {value}\n" for name, value in rows.items()).encode()


@contextmanager
def served(engine: Engine) -> Iterator[Engine]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            engine.asked.append(self.path)
            body = engine.metrics()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    engine.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield engine
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
