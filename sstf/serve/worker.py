"""The thread that decodes: takes waiting requests into free slots, runs pass after pass, and sends what comes of them.

The event loop's side (`submit`, `cancel`, `drain`, `stop`) never waits for a pass: it leaves a note under a lock that
is held for moments only. The other way, tokens reach a request's `events` through the loop.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from sstf.decode import Generation, SpeculativeDecoder, Step
from sstf.decode.engine import SequenceState, Session
from sstf.errors import SstfError
from sstf.serve.metrics import Metrics
from sstf.serve.queue import FairQueue
from sstf.types import SamplingParams


@dataclass(frozen=True)
class Failed:
    """Instead of the end of an answer."""

    status: int
    message: str


@dataclass(frozen=True)
class Gone:
    """The client has left."""


Event = Step | Generation | Failed | Gone  # a generation is the end


@dataclass(eq=False)
class Job:
    """One request on its way. `events` belongs to the event loop, the rest is read by both threads."""

    client: str
    prompt: list[int]
    params: SamplingParams
    arrived: float  # time.perf_counter()
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    dropped: bool = False
    first: float | None = None  # when its first token came


class Worker:
    """Decodes for a server.

    Args:
        decoder: used by the worker's thread alone.
        slots: requests decoded at once.
        capacity: tokens of a prompt and its answer.
        queue: requests that may wait.
        metrics: hears of everything.
        log: takes a line for the operator.
    """

    def __init__(
        self,
        decoder: SpeculativeDecoder,
        slots: int,
        capacity: int,
        queue: int,
        metrics: Metrics,
        log: Callable[[str], None],
    ) -> None:
        self.decoder, self.slots, self.capacity, self.metrics, self.log = decoder, slots, capacity, metrics, log
        self.waiting: FairQueue[Job] = FairQueue(queue)
        self.running: dict[Job, SequenceState] = {}
        self._changed = threading.Condition()
        self._state: Literal["open", "draining", "stopped"] = "open"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._ready = threading.Event()
        self._broken: Exception | None = None
        metrics.watch(lambda: len(self.running), lambda: len(self.waiting))

    # ---- called from other threads ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread and wait until it can decode.

        Raises:
            SstfError: it cannot.
        """
        self._thread.start()
        self._ready.wait()
        if self._broken:
            raise self._broken

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and self._state == "open"

    def submit(self, job: Job) -> bool:
        """Put a job behind the others of its client; False if the queue is full. From the event loop."""
        self._loop = asyncio.get_running_loop()
        with self._changed:
            if self._state != "open":
                job.events.put_nowait(Failed(503, "the server is stopping; ask another one"))
                return True
            taken = self.waiting.push(job.client, job)
            self._changed.notify()
            return taken

    def cancel(self, job: Job) -> None:
        """Forget a job, wherever it is; nothing happens if it has ended."""
        with self._changed:
            self.waiting.remove(job.client, job)
            job.dropped = True

    def drain(self) -> None:
        """Take nothing more; what waits is sent away, what runs may end."""
        with self._changed:
            if self._state == "open":
                self._state = "draining"
                self._send_away(503, "the server is stopping; ask another one")
            self._changed.notify()

    def halt(self) -> None:
        """End what runs."""
        self.drain()
        with self._changed:
            self._state = "stopped"
            self._changed.notify()

    def stop(self) -> None:
        """Halt, and wait for the thread."""
        self.halt()
        if self._thread.ident:
            self._thread.join()

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._state == "open":
            try:
                with self.decoder.session(self.slots, self.capacity) as session:
                    if not self._ready.is_set():  # that the target gives numbers is found out now
                        session.drop(session.add([0], SamplingParams(max_new_tokens=1)))
                        self._ready.set()
                    self._decode(session)
                    self._fail(503, "the server is stopping, and the answer was not done in time")
            except Exception as error:
                if not self._ready.is_set():
                    self._broken = error
                    self._ready.set()
                    return
                self._fail(500, str(error) if isinstance(error, SstfError) else "the decoder failed; see its log")
                self.log(str(error) if isinstance(error, SstfError) else traceback.format_exc())
                with self._changed:
                    self._send_away(500, "the decoder failed; ask again")
                    while self._state == "open" and not self.waiting:  # one that cannot start does not try for ever
                        self._changed.wait()

    def _decode(self, session: Session) -> None:
        """Until the server stops."""
        while True:
            with self._changed:
                while not (self.waiting or self.running or self._state != "open"):
                    self._changed.wait()
                if self._state == "stopped" or (self._state == "draining" and not self.running):
                    return
                # One a pass, so that a crowd of prompts does not hold up the answers under way.
                job = self.waiting.pop() if self.waiting and session.free else None
            for left in [running for running in self.running if running.dropped]:
                session.drop(self.running.pop(left))
            if job:
                self._admit(session, job)
            session.step()
            for done, sequence in list(self.running.items()):
                if sequence.generation:
                    del self.running[done]
                    self._finish(done, sequence.generation)

    def _admit(self, session: Session, job: Job) -> None:
        self.metrics.queued_s.observe(time.perf_counter() - job.arrived)
        self.metrics.prompt_tokens.inc(len(job.prompt))

        def hear(step: Step) -> None:
            if job.first is None:
                job.first = time.perf_counter()
                self.metrics.first_s.observe(job.first - job.arrived)
            else:
                self.metrics.acceptance.observe(step)
            self.metrics.new_tokens.inc(len(step.tokens))
            self._tell(job, step)

        try:
            self.running[job] = session.add(job.prompt, job.params, hear)
        except Exception:
            self._tell(job, Failed(500, "the decoder failed on this prompt"))
            raise

    def _finish(self, job: Job, generation: Generation) -> None:
        now = time.perf_counter()
        self.metrics.latency_s.observe(now - job.arrived)
        self.metrics.ended.labels("length" if generation.ended == "length" else "stop").inc()
        if job.first is not None and len(generation.token_ids) > 1:
            self.metrics.token_s.observe((now - job.first) / (len(generation.token_ids) - 1))
        self._tell(job, generation)

    def _fail(self, status: int, message: str) -> None:
        """Everything that runs."""
        for job in self.running:
            self._tell(job, Failed(status, message))
        self.running.clear()

    def _send_away(self, status: int, message: str) -> None:
        """Everything that waits."""
        while self.waiting:
            self._tell(self.waiting.pop(), Failed(status, message))

    def _tell(self, job: Job, event: Event) -> None:
        assert self._loop is not None  # a job came through it
        if not job.dropped:
            self._loop.call_soon_threadsafe(job.events.put_nowait, event)
