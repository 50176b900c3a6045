"""The real wandb, trackio and tensorboard, without keys and without a network."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tracked import Figures, in_jsonl, in_tensorboard, in_trackio, in_wandb, wandb_ids

from sstf.tracking import TrackerName, open_trackers

ALL: tuple[TrackerName, ...] = ("wandb", "trackio", "tensorboard")
CONFIG = {"train": {"learning_rate": 1e-3}, "path": None}


def figures(step: int) -> dict[str, float]:
    # Exact in float32, which TensorBoard keeps.
    return {"train/loss/0": step / 4, "train/loss/1": step / 2, "lr": step / 8}


def expected(*steps: int) -> Figures:
    return {(step, name): value for step in steps for name, value in figures(step).items()}


def log_steps(folder: Path, resume_step: int, *steps: int) -> list[str]:
    notes: list[str] = []
    trackers = open_trackers(ALL, "tiny", folder, CONFIG, resume_step, notes.append)
    for step in steps:
        for tracker in trackers:
            tracker.log(step, figures(step))
    for tracker in trackers:
        tracker.close()
    return notes


def trackio_run(notes: list[str], home: Path) -> Figures:
    (note,) = [note for note in notes if note.startswith("trackio: run ")]
    return in_trackio(home / "sstf.db", note.split()[2].rstrip(";"))


def test_all_get_the_same_names_and_steps_and_a_resumed_run_goes_on(tmp_path: Path, offline: Path) -> None:
    database = Path(os.environ["TRACKIO_DIR"])
    folder = tmp_path / "run"
    notes = log_steps(folder, 0, 1, 2, 3, 4)
    first = expected(1, 2, 3, 4)
    assert in_jsonl(folder) == in_tensorboard(folder) == in_wandb(folder) == first
    assert trackio_run(notes, database) == first
    time.sleep(1.1)  # wandb names a start by the second
    # Stopped after step 4, the last checkpoint at step 2: steps 3 and 4 are made again.
    assert log_steps(folder, 2, 3, 4, 5) == notes  # the same runs
    both = expected(1, 2, 3, 4, 5)
    assert in_jsonl(folder) == in_tensorboard(folder) == in_wandb(folder) == both
    assert trackio_run(notes, database) == both
    assert len(wandb_ids(folder)) == 1 and len(list((folder / "wandb").glob("offline-run-*"))) == 2


def test_a_run_of_another_folder_is_another_run(tmp_path: Path, offline: Path) -> None:
    one, two = log_steps(tmp_path / "one", 0, 1), log_steps(tmp_path / "two", 0, 1)
    database = Path(os.environ["TRACKIO_DIR"])
    assert trackio_run(one, database) == trackio_run(two, database) == expected(1)
    assert wandb_ids(tmp_path / "one") != wandb_ids(tmp_path / "two")


def test_tensorboard_forgets_steps_that_are_not_made_again(tmp_path: Path) -> None:
    """As after a rewind to an older checkpoint."""
    for resume_step, steps in ((0, (1, 2, 3, 4)), (2, (3,))):
        for tracker in open_trackers(("tensorboard",), "tiny", tmp_path, CONFIG, resume_step, print):
            for step in steps:
                tracker.log(step, figures(step))
            tracker.close()
    assert in_tensorboard(tmp_path) == expected(1, 2, 3)


def test_tensorboard_starts_within_one_second_are_read_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is the second, the host, the process: the second start's number may be the lower one."""
    for resume_step, steps, process in ((0, (1, 2, 3), 20), (2, (3, 4), 10)):
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        for tracker in open_trackers(("tensorboard",), "tiny", tmp_path, CONFIG, resume_step, print):
            for step in steps:
                tracker.log(step, figures(step))
            tracker.close()
    assert in_tensorboard(tmp_path) == expected(1, 2, 3, 4)


def test_a_tracker_that_is_added_later_gets_the_history(tmp_path: Path, offline: Path) -> None:
    for tracker in open_trackers((), "tiny", tmp_path, CONFIG, 0):
        for step in (1, 2, 3):
            tracker.log(step, figures(step))
        tracker.close()
    notes = log_steps(tmp_path, 2, 3, 4)
    everything = expected(1, 2, 3, 4)
    assert in_jsonl(tmp_path) == in_tensorboard(tmp_path) == in_wandb(tmp_path) == everything
    assert trackio_run(notes, Path(os.environ["TRACKIO_DIR"])) == everything


KEPT = 20  # steps that wandb has in its file before the kill
CHILD = f"""
import sys, time
from pathlib import Path

def audit(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"):
        address = arguments[-1] if event != "socket.getaddrinfo" else arguments[0]
        if not isinstance(address, (str, bytes)) and address[0] not in ("127.0.0.1", "::1"):
            print("SOCKET", event, address, flush=True)

sys.addaudithook(audit)
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_real_trackers import ALL, CONFIG, figures
from sstf.tracking import open_trackers

trackers = open_trackers(ALL, "tiny", Path(sys.argv[1]), CONFIG, 0, lambda text: print(text, flush=True))
for step in range(1, 10**6):
    for tracker in trackers:
        tracker.log(step, figures(step))
    print("step", step, flush=True)
    time.sleep(0.02)
"""


def test_killed_and_resumed_without_a_socket_or_a_key(
    tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is there twice, and nothing of a secret."""
    folder, secret = tmp_path / "run", "0123456789abcdef" * 2 + "feedbeef"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    monkeypatch.setenv("WANDB_MODE", "offline")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    seen: list[str] = []
    for line in child.stdout:
        seen.append(line.strip())
        if child.poll() is None and (KEPT, "lr") in in_wandb(folder):  # its own process writes at its leisure
            child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not [line for line in seen if line.startswith("SOCKET")]
    last = int(seen[-1].split()[1])
    notes = log_steps(folder, 10, *range(11, last + 3))
    everything = expected(*range(1, last + 3))
    assert trackio_run(notes, Path(os.environ["TRACKIO_DIR"])) == everything
    assert in_jsonl(folder) == everything
    for synced in (in_wandb(folder), in_tensorboard(folder)):  # both write from a thread or process of their own
        lost = {step for step, _ in everything.keys() - synced.keys()}
        assert synced.items() <= everything.items()
        assert lost <= set(range(KEPT + 1, last + 2))  # the last may not have been printed
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in written if secret.encode() in file.read_bytes()]
