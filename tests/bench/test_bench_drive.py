"""The order in which two servers are asked, how many requests run at once, and what a server that goes away leaves."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import psutil
import pynvml
import pytest
from stand_in import Reply, StandIn

from sstf.bench.arrivals import Level
from sstf.bench.client import Server
from sstf.bench.drive import UNSENT, Course, Load, Measured, Round, drive
from sstf.bench.requests import CHAT, Request
from sstf.bench.run import _client
from sstf.bench.usage import GpuSamples, Usage, Watch, listening
from sstf.errors import ConfigError

Serve = Callable[..., StandIn]
PATIENCE_S = 60.0  # longer than any machine needs; only a failing test waits for it


def requests(count: int) -> list[Request]:
    return [Request(f"r{i}", CHAT, {"messages": [{"role": "user", "content": f"m{i}"}]}) for i in range(count)]


def driven(baseline: StandIn, candidate: StandIn, levels: list[Level], count: int, rounds: int = 2) -> Course:
    async def go() -> Course:
        async with (
            Server("baseline", baseline.url, baseline.name, "", PATIENCE_S) as old,
            Server("candidate", candidate.url, candidate.name, "", PATIENCE_S) as new,
        ):
            draw = lambda number: requests(count)  # noqa: E731
            return await drive(old, new, levels, draw, rounds, (None, None), lambda line: None)

    return asyncio.run(go())


ALONE = [Level("concurrency 1", concurrency=1)]


def test_servers_take_turns_and_get_the_same_requests(serve: Serve) -> None:
    log: list[tuple[str, str]] = []
    course = driven(serve(name="a", log=log), serve(name="b", log=log), ALONE, 5, rounds=3)
    order = [(name, text.split('"m')[1][0]) for name, text in log]
    # Rounds of requests 0, 1-2 and 3-4; the order of the servers turns
    assert order == [
        *[("a", "0"), ("b", "0")],
        *[("b", "1"), ("b", "2"), ("a", "1"), ("a", "2")],
        *[("a", "3"), ("a", "4"), ("b", "3"), ("b", "4")],
    ]
    (load,) = course.loads
    assert course.broken is None
    for measured in (load.baseline, load.candidate):
        assert [answer.request for answer in measured.answers] == [f"r{i}" for i in range(5)]
        assert len(measured.rounds) == 3
        assert measured.wall_s >= sum(answer.e2e_s for answer in measured.answers)


def test_a_warm_up_as_wide_as_the_load_is_not_counted(serve: Serve) -> None:
    baseline, candidate = serve(), serve()
    driven(baseline, candidate, [Level("concurrency 3", concurrency=3), *ALONE], 3)
    assert (baseline.warm_ups, len(baseline.requests)) == (4, 6)
    assert (candidate.warm_ups, len(candidate.requests)) == (4, 6)


def all_at_once(count: int) -> Callable[[int, dict], Reply]:
    """Answers come only when `count` requests are there."""
    barrier = threading.Barrier(count)

    def behave(number: int, body: dict) -> Reply:
        barrier.wait(PATIENCE_S)
        return Reply()

    return behave


def test_so_many_users_ask_at_once_and_no_more(serve: Serve) -> None:
    baseline, candidate = serve(behave=all_at_once(3)), serve(behave=all_at_once(3))
    course = driven(baseline, candidate, [Level("concurrency 3", concurrency=3)], 12)
    assert (baseline.most_at_once, candidate.most_at_once) == (3, 3)
    assert all(answer.error is None for answer in course.loads[0].baseline.answers)


def test_open_arrivals_do_not_wait_for_answers(serve: Serve) -> None:
    due = tuple(i / 1000 for i in range(8))
    baseline, candidate = serve(behave=all_at_once(4)), serve(behave=all_at_once(4))
    course = driven(baseline, candidate, [Level("trace", due=due)], 8)
    assert (baseline.most_at_once, candidate.most_at_once) == (4, 4)  # the rounds have 4 each
    answers = course.loads[0].candidate.answers
    assert [answer.request for answer in answers] == [f"r{i}" for i in range(8)]
    assert all(answer.error is None and answer.ttft_s >= answer.late_s >= 0 for answer in answers)


def test_one_failure_is_counted_and_the_run_goes_on(serve: Serve) -> None:
    def behave(number: int, body: dict) -> Reply:
        return [Reply(), Reply(reset_after=1), Reply(status=500), Reply()][number]

    course = driven(serve(), serve(behave=behave), ALONE, 4, rounds=1)
    assert course.broken is None
    assert [answer.error is None for answer in course.loads[0].candidate.answers] == [True, False, False, True]


def test_a_server_that_goes_away_leaves_a_partial_run(serve: Serve) -> None:
    baseline, candidate = serve(), serve()

    def behave(number: int, body: dict) -> Reply:
        if number == 5:
            candidate.stop()
        return Reply()

    candidate.behave = behave
    levels = [Level("concurrency 2", concurrency=2), *ALONE]
    course = driven(baseline, candidate, levels, 8)
    assert course.broken is not None and course.broken.startswith(f"candidate {candidate.url} is gone: ")
    (load,) = course.loads  # the second was not begun
    old, new = load.aligned()
    assert len(old) == len(new) == 8
    assert all(answer.error is None for answer in new[:4])  # the first round
    assert any(answer.error == UNSENT for answer in new)
    assert [answer.request for answer in new] == [f"r{i}" for i in range(8)]


def test_a_server_that_fails_a_whole_round_ends_the_run(serve: Serve) -> None:
    behave = lambda number, body: Reply() if number < 2 else Reply(status=500, body=b'{"detail": "worker died"}')  # noqa: E731
    candidate = serve(behave=behave)
    course = driven(serve(), candidate, ALONE, 6, rounds=3)
    assert course.broken == f"candidate {candidate.url} failed all 2 requests of a round (500: worker died)"
    assert len(course.loads[0].candidate.answers) == 4


def test_a_server_that_refuses_its_first_request_is_bad_input(serve: Serve) -> None:
    baseline = serve()
    baseline.models = b'{"data": [{"id": "target"}]}'
    candidate = serve()
    candidate._server.RequestHandlerClass._answer = (  # type: ignore[attr-defined]
        lambda self, reply, chat: self._send(400, b'{"error": {"message": "no chat template"}}')
    )
    with pytest.raises(ConfigError, match=r"candidate .* failed its first request: 400: no chat template"):
        driven(baseline, candidate, ALONE, 2)


def test_counters_are_read_around_the_requests_only(serve: Serve) -> None:
    candidate = serve()
    passes = 'vllm:spec_decode_num_drafts_total{{engine="0"}} {}\n'
    candidate.metrics = lambda: passes.format(100 * candidate.warm_ups + len(candidate.requests))
    (load,) = driven(serve(), candidate, ALONE, 6).loads
    assert load.baseline.before is load.baseline.after is None
    assert load.candidate.before is not None and load.candidate.after is not None
    assert load.candidate.after.passes - load.candidate.before.passes == 6


def test_usage_of_a_process_and_of_what_it_starts() -> None:
    held = 64 << 20
    burn = f"x = bytearray(b'1') * {held}; print('ready', flush=True)\nwhile True: pass"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    process = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        watch = Watch(process.pid)
        watch.start()
        time.sleep(0.5)
        used = watch.stop()
    finally:
        os.killpg(process.pid, 9)
        process.wait()
        process.stdout.close()
    assert used.wall_s >= 0.5
    assert 0 < used.cpu_s < 1.5 * used.wall_s  # one thread; the clock of CPU time is coarse
    assert used.peak_bytes >= held
    assert used.cores == pytest.approx(used.cpu_s / used.wall_s)


def test_what_others_use_is_told_apart() -> None:
    burn = [sys.executable, "-c", "print('ready', flush=True)\nwhile True: pass"]
    idle = [sys.executable, "-c", "print('ready', flush=True)\nimport time; time.sleep(600)"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for command in (burn, idle)]
    try:
        for process in processes:
            assert process.stdout and process.stdout.readline() == b"ready\n"
        watch, burning = Watch(processes[1].pid), psutil.Process(processes[0].pid)
        before = burning.cpu_times().user
        watch.start()
        time.sleep(0.5)
        burnt = burning.cpu_times().user - before
        used = watch.stop()
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]
    assert used.cpu_s <= 0.05
    assert used.others_cpu_s >= burnt - 0.1  # the machine's clock ticks 100 times a second


def test_spans_of_usage_add_up() -> None:
    both = Usage(1.0, 0.5, 0.2, 10, 0.2, 7).plus(Usage(3.0, 1.5, 0.4, 8, 0.6, 9))
    assert both == Usage(4.0, 2.0, pytest.approx(0.6), 10, pytest.approx(0.5), 9)
    assert (both.cores, both.others_cores) == (0.5, pytest.approx(0.15))
    assert Usage().plus(Usage(2.0, 1.0, 0.5, 5)) == Usage(2.0, 1.0, 0.5, 5)


def test_gpus_of_the_servers_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three GPUs hold the server; the functions that are replaced here exist in NVML's binding."""
    held = {0: [(7, 100), (8, 10)], 1: [(9, 1000)], 2: [(8, 50), (7, None)]}
    busy = {0: 40, 1: 90, 2: 80}
    rates = lambda device: SimpleNamespace(gpu=busy[device])  # noqa: E731
    running = lambda device: [SimpleNamespace(pid=p, usedGpuMemory=b) for p, b in held[device]]  # noqa: E731
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 3)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", running)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", rates)
    seen = GpuSamples()
    assert (seen.busy, seen.held) == (None, None)
    seen.add(pynvml, {7, 8})
    assert (seen.busy, seen.held) == (pytest.approx(0.6), 160)
    busy[0], held[0] = 0, [(7, 20)]
    seen.add(pynvml, {7, 8})
    assert (seen.busy, seen.held) == (pytest.approx(0.5), 160)  # a mean, and the most
    seen.add(pynvml, {1})
    assert seen.busy == pytest.approx(0.5)


def test_a_client_that_is_busy_itself_says_so() -> None:
    quick = Measured([Round([], 2.0, 0.2), Round([], 2.0, 0.4)])
    assert quick.client_share == pytest.approx(0.15)
    load = Load(ALONE[0], [], quick, Measured([Round([], 4.0, 3.0)]))
    assert _client([Load(ALONE[0], [], quick, quick)]) == []
    assert _client([load])[0].startswith("this client used 0.75 of a core")


def test_no_such_process() -> None:
    with pytest.raises(ConfigError, match="no process 4194305"):
        Watch(4194305)  # above the highest that Linux gives


def test_who_listens_at_an_address(serve: Serve) -> None:
    server = serve()
    assert listening(server.url) == os.getpid()
    assert listening("http://127.0.0.1:9") is None
    assert listening(f"http://example.org:{server.port}") is None
