"""A server's life: listen, load, serve until a signal, end well."""

from __future__ import annotations

import asyncio
import signal
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import uvicorn
from rich.console import Console
from rich.text import Text

from sstf.cores import leave_cores_to_others
from sstf.errors import ConfigError
from sstf.opening import open_decoder
from sstf.serve.app import make_app
from sstf.serve.config import USUAL_CONTEXT, ServeConfig, read_keys
from sstf.serve.metrics import Metrics
from sstf.serve.worker import Worker

BACKLOG = 1024


def serve(
    name: str,
    config: ServeConfig,
    target_name: str | None,
    experience: Path | None,
    draft: bool,
    err: Console,
) -> None:
    """Serve a head's target until SIGINT or SIGTERM; what runs then gets `config.grace` seconds.

    Args:
        name: a head's folder, also a published one's, the folder of a run with one finished head, or a method that
            needs none.
        config: where and how.
        target_name: in place of the target that the head names.
        experience: what decoding learned earlier, if the file exists; written at the end.
        draft: False decodes plainly.
        err: is told where the server is, and what its operator should know.

    Raises:
        SstfError: an option, the head or the target cannot be used, or the address is taken.
    """
    keys = read_keys(config)
    leave_cores_to_others()  # to the worker, which decodes
    listening = listen(config)  # before the minutes that loading may take
    with listening:
        with err.status(Text("loading")) if err.is_terminal else nullcontext():
            opened = open_decoder(name, config.policy, target_name, experience, draft)
            decoder, target = opened.decoder, opened.decoder.target
            capacity = min(config.context or USUAL_CONTEXT, target.context)
            if config.context and config.context > target.context:
                raise ConfigError(f"--context is {config.context}, and the target has {target.context}; lower it")
            slots = config.slots if target.takes_trees else 1
            metrics = Metrics()
            worker = Worker(decoder, slots, capacity, config.queue, metrics, lambda line: _say(err, line))
            warnings.simplefilter("ignore")  # what a user should know was noted
            worker.start()
        for note in opened.notes:
            _say(err, f"note: {note}")
        what = f"drafted for by {opened.drafter}" if decoder.head else "nothing is drafted"
        _say(err, f"{target.spec.name} ({target.spec.dtype}, {target.device}), {what}")
        _say(err, f"{slots} at once, {capacity} tokens each, at most {config.queue} waiting")
        try:
            app = make_app(worker, metrics, keys, config.max_new_tokens, config.loopback)
            _say(err, f"listening on {address(listening)}/v1")
            asyncio.run(Server(worker, app, config.grace).serve(sockets=[listening]))
        finally:
            worker.stop()
            if experience:
                decoder.experience.save(experience)
        _say(err, "stopped")


def listen(config: ServeConfig) -> socket.socket:
    """The socket, open for clients.

    Raises:
        ConfigError: the address is taken, or is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {config.host}, port {config.port} ({error.strerror or error}); choose another --port or "
            "--host, or 0 for a free port"
        ) from None


def address(listening: socket.socket) -> str:
    """As a URL."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's, which on a signal drains the worker, and ends the process as a success."""

    def __init__(self, worker: Worker, app: object, grace: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                log_level="error",
                access_log=False,
                lifespan="off",
                backlog=BACKLOG,
                ws="none",
                server_header=False,
                # Streams are ended by the worker in good form; this is for clients that read none of it.
                timeout_graceful_shutdown=int(grace) + 10,
            )
        )
        self.worker, self.grace = worker, grace

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's, which raises the signal anew at the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.end)
        yield

    def end(self) -> None:
        """Take no more, let what runs end in time; at the second call, at once."""
        grace = 0.0 if self.should_exit else self.grace
        self.should_exit = True
        self.worker.drain()
        asyncio.get_running_loop().call_later(grace, self.worker.halt)


def _say(err: Console, text: str) -> None:
    # As `Text`: brackets in it are no markup.
    err.print(Text(text), soft_wrap=True)
