"""Real children: they answer, they die, they are stopped with all that they started."""

from __future__ import annotations

import os
import queue
import signal
import sys
import time
from typing import Any

import pytest

from sstf.child_process import ChildProcess

ECHO = """
import json, sys
for line in sys.stdin:
    print(json.dumps({"back": json.loads(line)}), flush=True)
"""


def start(code: str) -> tuple[ChildProcess, queue.Queue[tuple[ChildProcess, dict[str, Any] | None]]]:
    answers: queue.Queue[tuple[ChildProcess, dict[str, Any] | None]] = queue.Queue()
    return ChildProcess([sys.executable, "-c", code], "child", answers, {"SSTF_TEST": "x"}), answers


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{pid}/stat") as file:  # a zombie that nobody waited for
        return file.read().rsplit(")", 1)[1].split()[0] == "Z"


def test_lines_go_and_come() -> None:
    child, answers = start(ECHO)
    with child:
        for n in range(3):
            child.send({"n": n, "text": "grün\n"})
        assert [answers.get(timeout=20) for _ in range(3)] == [
            (child, {"back": {"n": n, "text": "grün\n"}}) for n in range(3)
        ]
    assert answers.get(timeout=20) == (child, None)
    assert gone(child.pid)
    assert not child.log.exists()


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("import os; os.kill(os.getpid(), 9)", r"was killed (signal 9, as the system does when memory runs out)"),
        ("import os; os.kill(os.getpid(), 15)", "was ended by signal 15"),
        ("raise ValueError('no such thing')", "ended with code 1 (ValueError: no such thing)"),
        ("raise SystemExit(7)", "ended with code 7"),
    ],
)
def test_how_it_ended(code: str, how: str) -> None:
    child, answers = start(code)
    with child:
        assert answers.get(timeout=20) == (child, None)
        child.send({"n": 1})  # too late, and no error
        assert child.how_it_ended() == how


def test_what_it_started_ends_with_it() -> None:
    code = """
import json, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(json.dumps({"pid": inner.pid}), flush=True)
sys.stdin.read()
"""
    child, answers = start(code)
    with child:
        _, answer = answers.get(timeout=20)
        assert answer is not None
        assert not gone(answer["pid"])
    deadline = time.monotonic() + 10
    while not gone(answer["pid"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_child_without_a_parent_ends() -> None:
    """The parent is killed; the child reads the end of its input."""
    outer = f"""
import queue, sys, time
from sstf.child_process import ChildProcess
child = ChildProcess([sys.executable, "-c", {ECHO!r}], "inner", queue.Queue(), {{}})
print('{{"pid": ' + str(child.pid) + '}}', flush=True)
time.sleep(600)
"""
    parent, answers = start(outer)
    with parent:
        _, answer = answers.get(timeout=20)
        assert answer is not None
        os.kill(parent.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while not gone(answer["pid"]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
