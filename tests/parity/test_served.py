"""Reading vLLM's counters, and the lives of servers. `tests/engines` serves with vLLM itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sstf.errors import HeadError, WorkerError
from sstf.parity.served import LEASH, DraftCounters, Serving, read_counters, served, since

METRICS = """
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
vllm:spec_decode_num_drafts_total{engine="0",model_name="target"} 4.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="target"} 2.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="target"} 12.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="target"} 5.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="target",position="1"} 2.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="target",position="0"} 3.0
"""


def test_counters() -> None:
    found = read_counters(METRICS)
    assert found == DraftCounters(6.0, 12.0, 5.0, [3.0, 2.0])
    assert since(DraftCounters(0.0, 0.0, 0.0, []), found) == found
    assert since(DraftCounters(2.0, 2.0, 1.0, [1.0, 0.0]), found) == DraftCounters(4.0, 10.0, 4.0, [2.0, 2.0])
    assert read_counters("vllm:num_requests_running 0.0") is None
    assert since(None, found) is None


def environment(folder: Path, program: str) -> Path:
    """What stands where vLLM's environment should, and runs `program` in its place."""
    package = folder / "lib/python3/site-packages/vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (folder / "bin").mkdir()
    python = folder / "bin/python"
    python.write_text(f"#!/bin/sh\n{program}\n")
    python.chmod(0o755)
    return folder


def serving(venv: Path) -> Serving:
    return Serving(
        venv, Path("/target"), {"method": "eagle3", "model": "/head", "num_speculative_tokens": 3}, "float32", 128
    )


def test_no_environment(tmp_path: Path) -> None:
    with pytest.raises(HeadError, match="no virtual environment with vLLM"), served(serving(tmp_path)):
        pass


def test_a_server_that_ends_while_starting_says_why(tmp_path: Path) -> None:
    program = "echo '(pid=1) WARNING 11-29 limits can cause OSError: [Errno 24]'; "  # which did not happen
    program += "echo 'ValueError: the head has no fc'; echo 'RuntimeError: Engine core initialization failed'; exit 1"
    with (
        pytest.raises(WorkerError, match=r"vLLM ended while starting: ValueError: the head has no fc"),
        served(serving(environment(tmp_path, program))),
    ):
        pass


def gone(pid: int, within: float = 10.0) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        # A child of ours that nobody has waited for yet is no process any more.
        state = Path(f"/proc/{pid}/stat")
        if state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_the_leash_ends_a_server_whose_parent_was_killed(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    parent = subprocess.Popen(
        [
            sys.executable, "-c",
            "import subprocess, sys, time\n"
            "subprocess.Popen(['sh', '-c', sys.argv[1], 'sh', 'sh', '-c', 'echo $$ > '+sys.argv[2]+'; sleep 60'],"
            " stdin=subprocess.PIPE, start_new_session=True)\n"
            "time.sleep(60)",
            LEASH, str(file),
        ]
    )  # fmt: skip
    while not file.exists() or not file.read_text().strip():
        time.sleep(0.02)
    server = int(file.read_text())
    assert not gone(server, within=0.2)
    parent.kill()
    parent.wait()
    assert gone(server)
