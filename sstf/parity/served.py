"""A vLLM server in an environment of its own: how it is started and ended, what it is asked, what it counts.

Nothing but the standard library, so that scripts run it in any environment. The server listens on loopback, fetches
nothing and reports nothing home. Acceptance comes from the counters of its /metrics page: a round is a verify pass,
which emits the accepted tokens and one more. vLLM counts before it cuts an answer at its end or limit, so what is
divided by rounds here are tokens that were received.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sstf.errors import HeadError, WorkerError

MODEL = "target"  # the name under which it is served
HEALTH_TIMEOUT_S = 5.0
START_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 300.0
GRACE_S = 15.0
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is local: no proxy
# Ends the server and all that it started when this process is gone, which closes the pipe that `cat` reads, and ends
# itself when the server is.
LEASH = '{ "$@"; kill -TERM 0; } & cat >/dev/null; kill -TERM 0'
INDENTED = re.compile(r"(?:\(.*?\))?\s{2,}(\S.*)")  # behind the name of a process
ERROR = re.compile(r"\b\w*(?:Error|Exception): .*")


@dataclass(frozen=True)
class DraftCounters:
    """vLLM's counters over a span of requests. `accepted_at[i]` counts accepted draft tokens at position i."""

    rounds: float
    drafted: float
    accepted: float
    accepted_at: list[float]


@dataclass(frozen=True)
class Counted:
    """One prompt's greedy answer, and the verify passes that wrote it."""

    token_ids: list[int]
    rounds: int


@dataclass(frozen=True)
class Serving:
    """What is served: the target with a head that drafts chains."""

    venv: Path  # with vLLM
    target: Path  # a model folder
    speculative: Mapping[str, Any]  # vLLM's --speculative-config: the method, the head's folder, the depth
    dtype: str  # of both
    context: int  # tokens of the longest sequence


def count(
    serving: Serving, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Sequence[int]
) -> list[Counted]:
    """Serve, and answer token ids greedily, one prompt after the other.

    Args:
        serving: what is served.
        prompts: token ids.
        max_new_tokens: at most so many an answer.
        ends: token ids that end an answer.

    Raises:
        HeadError: there is no vLLM in the environment.
        WorkerError: the server ends, does not start in time, or does not speculate.
    """
    with served(serving) as url:
        _complete(url, [*prompts[0]], 4, ends)  # first passes allocate
        found = []
        for prompt in prompts:
            before = fetch_counters(url)
            token_ids = _complete(url, [*prompt], max_new_tokens, ends)
            counted = since(before, fetch_counters(url))
            if counted is None:
                raise WorkerError("vLLM counts no drafts: it serves the target without the head")
            found.append(Counted(token_ids, round(counted.rounds)))
        return found


@contextmanager
def served(serving: Serving) -> Iterator[str]:
    """The address of a server, which is ended with the context.

    Raises:
        HeadError: there is no vLLM in the environment.
        WorkerError: the server ends, or does not start in time.
    """
    python = serving.venv / "bin" / "python"
    if not python.is_file() or not list(serving.venv.glob("lib/python*/site-packages/vllm/__init__.py")):
        raise HeadError(
            f"{serving.venv}: no virtual environment with vLLM; `scripts/verify_vllm.sh --install-only` makes one for "
            "machines without a GPU"
        )
    port = free_port()
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(serving.target), "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port),
        "--dtype", serving.dtype, "--enforce-eager", "--max-num-seqs", "1",
        "--generation-config", "vllm",  # the target's own may hold penalties: greedy must mean greedy
        "--max-model-len", str(serving.context), "--speculative-config", json.dumps(dict(serving.speculative)),
    ]  # fmt: skip
    environment = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    # By itself vLLM's CPU build chooses cores, whatever OMP_NUM_THREADS says, and may leave some out.
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    with tempfile.NamedTemporaryFile(prefix="sstf-vllm-", suffix=".log") as log:
        process = subprocess.Popen(
            ["sh", "-c", LEASH, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment | os.environ,  # the user's own settings win
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(url, process, Path(log.name))
            yield url
        except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException) as error:
            raise WorkerError(f"vLLM stopped answering ({_cause(Path(log.name)) or error})") from None
        finally:
            _end(process)


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_healthy(url):
        if process.poll() is not None:
            raise WorkerError(f"vLLM ended while starting: {_cause(log) or 'it gave no reason'}")
        if time.monotonic() > deadline:
            raise WorkerError(f"vLLM did not answer within {START_TIMEOUT_S:.0f} s of its start")
        time.sleep(0.5)


def _cause(log: Path) -> str:
    """The first error in a log: it is the cause, and others follow from it in other processes. Warnings may name errors
    that did not happen."""
    lines = log.read_text(errors="replace").splitlines()
    for line, behind in zip(lines, [*lines[1:], ""], strict=True):
        found = ERROR.search(line)
        if found and " WARNING " not in line and " INFO " not in line:
            more = INDENTED.fullmatch(behind)  # pydantic's errors say what is wrong in the line behind
            return f"{found[0]}{f' {more[1]}' if more else ''}"[:300]
    return ""


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    for wanted in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, wanted)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        deadline = time.monotonic() + GRACE_S
        while _group_lives(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_healthy(url: str) -> bool:
    """Whether the server has loaded its model and answers."""
    try:
        with OPENER.open(f"{url}/health", timeout=HEALTH_TIMEOUT_S) as reply:
            return bool(reply.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def _complete(url: str, prompt: list[int], max_new_tokens: int, ends: Sequence[int]) -> list[int]:
    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": max_new_tokens,
        "stop_token_ids": list(ends),
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with OPENER.open(request, timeout=ANSWER_TIMEOUT_S) as reply:
            answer = json.load(reply)
    except urllib.error.HTTPError as error:
        raise WorkerError(f"vLLM refused a prompt: {error.read().decode(errors='replace')[:300]}") from None
    token_ids: list[int] = answer["choices"][0]["token_ids"]
    return token_ids


def read_counters(metrics: str) -> DraftCounters | None:
    """Reads the spec_decode counters from the text of a /metrics page; None when it has none.

    A counter has one line for each engine process (and position), for example
    `vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="target",position="2"} 5.0`.
    """
    sums: dict[str, float] = {}
    at: dict[int, float] = {}
    for line in metrics.splitlines():
        found = re.fullmatch(r"vllm:spec_decode_num_(\w+)_total(?:\{(.*)\})? (\S+)", line)
        if found is None:
            continue
        name, labels, value = found.group(1), found.group(2) or "", float(found.group(3))
        position = re.search(r'position="(\d+)"', labels)
        if name == "accepted_tokens_per_pos" and position is not None:
            at[int(position.group(1))] = at.get(int(position.group(1)), 0.0) + value
        else:
            sums[name] = sums.get(name, 0.0) + value
    if "drafts" not in sums:
        return None
    return DraftCounters(
        rounds=sums["drafts"],
        drafted=sums["draft_tokens"],
        accepted=sums["accepted_tokens"],
        accepted_at=[at[i] for i in sorted(at)],
    )


def fetch_counters(url: str) -> DraftCounters | None:
    """The server's spec_decode counters now."""
    with OPENER.open(f"{url}/metrics", timeout=ANSWER_TIMEOUT_S) as reply:
        return read_counters(reply.read().decode())


def since(before: DraftCounters | None, after: DraftCounters | None) -> DraftCounters | None:
    """What the counters counted between two readings."""
    if before is None or after is None:
        return None
    earlier = before.accepted_at or [0.0] * len(after.accepted_at)
    return DraftCounters(
        rounds=after.rounds - before.rounds,
        drafted=after.drafted - before.drafted,
        accepted=after.accepted - before.accepted,
        accepted_at=[now - then for now, then in zip(after.accepted_at, earlier, strict=True)],
    )
