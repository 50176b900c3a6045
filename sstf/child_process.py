"""Child processes that are spoken to in JSON, one object a line, over their standard input and output.

A child leads a session of its own: Ctrl-C reaches the parent alone, which then ends the child and all that it started.
A child that loses its parent reads the end of its input, and ends too.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

GRACE_S = 5.0
# The last line of a traceback. The first in a log is the cause; others follow from it in other processes.
ERROR = re.compile(r"\b\w*(?:Error|Exception): .*")


class ChildProcess:
    """A running child. Its answers arrive in `answers` as pairs (child, object), and (child, None) when it ended.

    Args:
        command: program and arguments.
        name: for messages.
        answers: may be shared by several children.
        environment: variables to set beside the parent's own.
    """

    def __init__(
        self,
        command: Sequence[str],
        name: str,
        answers: queue.Queue[tuple[ChildProcess, dict[str, Any] | None]],
        environment: Mapping[str, str],
    ) -> None:
        self.name, self._answers = name, answers
        with tempfile.NamedTemporaryFile("wb", prefix="sstf-child-", suffix=".log", delete=False) as log:
            self.log = Path(log.name)
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **environment},
                start_new_session=True,
                text=True,
                encoding="utf-8",
            )
        self._reader = threading.Thread(target=self._read, name=f"answers of {name}", daemon=True)
        self._reader.start()

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the process, and of its group."""
        return self._process.pid

    def send(self, value: dict[str, Any]) -> None:
        """One line for the child. Nothing happens if it has ended: its end is among the answers."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()

    def stop(self) -> None:
        """End it: by the end of its input, then by force. Its log is deleted."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        for wanted in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.pid, wanted)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
                break
        with suppress(ProcessLookupError):  # what it started and did not end
            os.killpg(self.pid, signal.SIGKILL)
        self._reader.join(GRACE_S)
        self._process.stdout.close()
        self.log.unlink(missing_ok=True)

    def how_it_ended(self) -> str:
        """Of a child that has ended: by which signal, or with what error.

        >>> "was killed (signal 9, as the system does when memory runs out)"  # doctest: +SKIP
        """
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "was killed (signal 9, as the system does when memory runs out)"
        if code < 0:
            return f"was ended by signal {-code}"
        error = ERROR.search(self.log.read_text(errors="replace"))
        return f"ended with code {code}" + (f" ({_short(error[0])})" if error else "")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put((self, json.loads(line)))
        self._answers.put((self, None))


def _short(line: str) -> str:
    return line if len(line) <= 300 else f"{line[:300]}..."
