"""A small training behind a real pseudo-terminal, and behind a pipe, as a shell would start it."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

CHILD = """
import math, sys, time
from rich.console import Console
from sstf.progress_display import display

# Logistic regression by gradient descent.
data = [(x / 10, float(x > 3)) for x in range(-20, 21)]
weight = bias = 0.0
with display(Console(stderr=True)).training(60) as view:
    for step in range(1, 61):
        predicted = [1 / (1 + math.exp(-weight * x - bias)) for x, _ in data]
        weight -= sum((p - y) * x for p, (x, y) in zip(predicted, data))
        bias -= sum(p - y for p, (_, y) in zip(predicted, data))
        view.step(step)
        if step % 5 == 0:
            loss = -sum(math.log(p if y else 1 - p) for p, (_, y) in zip(predicted, data)) / len(data)
            hits = sum((p > 0.5) == y for p, (_, y) in zip(predicted, data)) / len(data)
            view.figures(step, {"train/loss/0": loss, "train/accuracy/0": hits, "tokens_per_second": 41.0})
        time.sleep(0.02)
open(sys.argv[1], "w").write("trained")
"""


def start(error: int, done: Path, term: str = "xterm") -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR")}
    environment |= {"TERM": term, "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", CHILD, str(done)]
    return subprocess.Popen(command, stderr=error, env=environment, start_new_session=True)


def pseudo_terminal(columns: int) -> tuple[int, int]:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    return ours, theirs


def read_all(terminal: int) -> str:
    data = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the last process that had it open ended
            part = b""
        if not part:
            return data.decode()
        data += part


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_behind_a_terminal_of_sixty_columns(tmp_path: Path, term: str) -> None:
    ours, theirs = pseudo_terminal(60)
    child = start(theirs, tmp_path / "done", term)
    os.close(theirs)
    text = read_all(ours)
    os.close(ours)
    assert child.wait(60) == 0 and (tmp_path / "done").exists()
    if term == "dumb":
        assert "\x1b" not in text and "step 60/60: loss 0." in text and "training done at step 60" in text
        return
    assert text.count("\x1b[2K") > 10 and text.rstrip().endswith("\x1b[?25h")  # redrawn, and the cursor is back
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert max(len(line) for line in re.split(r"[\r\n]+", plain)) <= 60
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.split("\x1b[2K")[-1])
    for part in ("training 60/60", "100%", "0:00 left", "tokens/s", "TTT step", "accuracy", "█"):
        assert part in last, part


def test_behind_a_pipe(tmp_path: Path) -> None:
    child = start(subprocess.PIPE, tmp_path / "done")
    text = child.communicate(timeout=60)[1].decode()
    lines = text.splitlines()
    assert child.returncode == 0 and "\x1b" not in text
    assert [line.split(":")[0] for line in lines[:-1]] == [f"step {i}/60" for i in range(5, 61, 5)]


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_closed_while_training_goes_on(tmp_path: Path, kind: str) -> None:
    ours, theirs = pseudo_terminal(80) if kind == "terminal" else os.pipe()
    child = start(theirs, tmp_path / "done")
    os.close(theirs)
    os.read(ours, 100)
    time.sleep(0.1)
    os.close(ours)
    child.wait(60)
    assert (tmp_path / "done").read_text() == "trained"
