"""A server on a free port of loopback, in threads of the test's process, and ways to reach it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sstf.decode import SpeculativeDecoder
from sstf.methods import NgramConfig, build_method
from sstf.methods.checkpoint import DraftHead
from sstf.serve.app import make_app
from sstf.serve.config import ServeConfig
from sstf.serve.metrics import Metrics
from sstf.serve.server import Server, address, listen
from sstf.serve.worker import Worker
from sstf.targets import Target
from sstf.trees import Chain

PATIENCE = 120.0  # seconds; the machine may be busy


@dataclass
class Running:
    """A server and ways to reach it."""

    url: str
    worker: Worker
    server: Server
    log: list[str]
    clients: dict[str, openai.OpenAI] = field(default_factory=dict)

    def client(self, key: str = "none") -> openai.OpenAI:
        """One a key."""
        if key not in self.clients:
            self.clients[key] = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, timeout=PATIENCE, max_retries=0)
        return self.clients[key]

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE)

    def metrics(self, key: str = "") -> dict[tuple[str, ...], float]:
        """By name and the values of labels."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with self.http() as http:
            answer = http.get("/metrics", headers=headers)
        assert answer.status_code == 200
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }

    def wait(self, condition: object) -> None:
        """Until it holds."""
        assert callable(condition)
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "it never came to be"
            time.sleep(0.01)


@contextmanager
def running(
    decoder: SpeculativeDecoder,
    slots: int = 3,
    context: int = 200,
    queue: int = 256,
    keys: tuple[str, ...] = (),
    longest: int | None = None,
    grace: float = 20.0,
) -> Iterator[Running]:
    """A server until the block ends."""
    log: list[str] = []
    metrics = Metrics()
    worker = Worker(decoder, slots, context, queue, metrics, log.append)
    worker.start()
    listening = listen(ServeConfig(port=0))
    server = Server(worker, make_app(worker, metrics, keys, longest), grace)
    thread = threading.Thread(target=lambda: asyncio.run(_serve(server, listening)), daemon=True)
    thread.start()
    running = Running(address(listening), worker, server, log)
    try:
        yield running
    finally:
        for client in running.clients.values():
            client.close()
        server.should_exit = True
        worker.stop()
        thread.join(PATIENCE)
        listening.close()
        assert not thread.is_alive()


async def _serve(server: Server, listening: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # Signals are for the main thread.
        patch.setattr(asyncio.get_running_loop(), "add_signal_handler", lambda *_: None)
        await server.serve(sockets=[listening])  # type: ignore[list-item]


def lookup(target: Target) -> SpeculativeDecoder:
    """Prompt lookup: an honest drafter without a training."""
    return SpeculativeDecoder(target, DraftHead("ngram", build_method(NgramConfig(min_n=1))), Chain(depth=4))
