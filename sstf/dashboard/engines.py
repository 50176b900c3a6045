"""A serving engine, seen through its /metrics: vLLM, SGLang and `sstf serve`.

All figures are of the last `SPAN` seconds: differences of the engine's counters and histograms over them (two seconds
of a quiet engine are a handful of tokens), or its gauges of now. Accepted length counts the bonus token; the acceptance
rate of position i is that of the passes which accepted position i - 1.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from sstf.dashboard.alarms import Alarms, Band, Clock, Drift
from sstf.dashboard.tables import History
from sstf.errors import ConfigError
from sstf.prometheus import Scrape, difference, fell, percentile, read_metrics

SPAN = 30.0  # seconds
LIMIT = 8 << 20  # bytes of an answer
TIMEOUT = 5.0
LONGEST_WAIT = 60.0
SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
POSITIONS = 16


@dataclass(frozen=True)
class Names:
    """What an engine calls its figures; empty where it has none. Counters, where nothing else is said."""

    tokens: str
    requests: str
    first_token: str  # histograms, in seconds
    between_tokens: str
    whole: str
    running: str  # gauges
    waiting: str
    cache: str = ""  # gauge, 0 .. 1
    drafts: str = ""  # verify passes that had a draft
    accepted: str = ""  # draft tokens
    emitted: str = ""  # tokens of those passes, bonus token included, where the engine counts them itself
    accepted_at: str = ""  # with a label `position`
    throughput: str = ""  # gauges, for an engine whose counters do not tell
    accept_length: str = ""


ENGINES = {
    # vllm/v1/metrics/loggers.py and vllm/v1/spec_decode/metrics.py, 0.32.0
    "vLLM": Names(
        tokens="vllm:generation_tokens_total",
        requests="vllm:request_success_total",
        first_token="vllm:time_to_first_token_seconds",
        between_tokens="vllm:inter_token_latency_seconds",
        whole="vllm:e2e_request_latency_seconds",
        running="vllm:num_requests_running",
        waiting="vllm:num_requests_waiting",
        cache="vllm:kv_cache_usage_perc",
        drafts="vllm:spec_decode_num_drafts_total",
        accepted="vllm:spec_decode_num_accepted_tokens_total",
        accepted_at="vllm:spec_decode_num_accepted_tokens_per_pos_total",
    ),
    # sglang/srt/observability/metrics_collector.py. Its token counter moves when a request ends, and acceptance is a
    # gauge; its server needs --enable-metrics.
    "SGLang": Names(
        tokens="sglang:generation_tokens_total",
        requests="sglang:num_requests_total",
        first_token="sglang:time_to_first_token_seconds",
        between_tokens="sglang:inter_token_latency_seconds",
        whole="sglang:e2e_request_latency_seconds",
        running="sglang:num_running_reqs",
        waiting="sglang:num_queue_reqs",
        cache="sglang:token_usage",
        throughput="sglang:gen_throughput",
        accept_length="sglang:spec_accept_length",
    ),
    # `sstf serve`: its own (docs/serving.md). Between tokens: the mean of an answer.
    "sstf": Names(
        tokens="sstf_generation_tokens_total",
        requests="sstf_answers_total",
        first_token="sstf_time_to_first_token_seconds",
        between_tokens="sstf_time_per_output_token_seconds",
        whole="sstf_e2e_request_latency_seconds",
        running="sstf_requests_running",
        waiting="sstf_requests_waiting",
        drafts="sstf_verify_passes_total",
        emitted="sstf_verified_tokens_total",
        accepted_at="sstf_accepted_tokens_per_position_total",
    ),
}
WANTED = frozenset(name for names in ENGINES.values() for name in vars(names).values() if name)


class EngineWatch:
    """One engine. `poll` asks it; `version` counts what changed."""

    def __init__(self, text: str, ident: str, alarms: Alarms, clock: Clock, band: Band | None = None) -> None:
        """Of `URL` or `NAME=URL`.

        Raises:
            ConfigError: the address is none.
        """
        name, equals, url = text.partition("=")
        if not equals or "/" in name:
            name, url = "", text
        parts = _split(url)
        self.id, self.name, self.version = ident, name or parts, 0
        self.url = url.rstrip("/").removesuffix("/metrics").removesuffix("/v1") + "/metrics"
        self.history = History()
        self.engine = ""
        self.state, self.reason, self.restarts = "waiting", "", 0
        self.latest: dict[str, float] = {}
        self.drift = Drift(self.name, alarms, band)
        self._alarms, self._clock = alarms, clock
        self._past: deque[tuple[float, Scrape]] = deque()
        self._failures = 0

    async def poll(self, client: httpx.AsyncClient) -> None:
        """Ask the engine once."""
        try:
            self.take(await self._fetch(client), self._clock())
        except httpx.HTTPError as error:
            self._down(_reason(error))
        except ConfigError as error:
            self._down(str(error))

    @property
    def patience(self) -> float:
        """Seconds to wait until it is asked again: 0, and twice as long each time that it did not answer."""
        return min(LONGEST_WAIT, 2.0 ** min(self._failures, 10)) if self._failures else 0.0

    def to_json(self) -> dict[str, Any]:
        """All but the table."""
        band = self.drift.band
        return {
            "id": self.id,
            "kind": "engine",
            "name": self.name,
            "url": self.url,
            "engine": self.engine,
            "state": self.state,
            "reason": self.reason,
            "restarts": self.restarts,
            "latest": self.latest,
            "band": band and [band.low, None if band.high == float("inf") else band.high],
            "learning": self.drift.learning,
        }

    def take(self, text: str, now: float) -> None:
        """What /metrics answered at `now`, seconds since 1970."""
        scrape = read_metrics(text, WANTED)
        found = [(engine, names) for engine, names in ENGINES.items() if names.tokens in scrape.values]
        if not found:
            self._down("it answers, but has no figures of vLLM, SGLang or sstf (SGLang needs --enable-metrics)")
            return
        self.engine, names = found[0]
        if self.state != "up":
            self._alarms.end(self.name, "down", "answers again", now)
            self._past.clear()  # what happened in between has no time
        self.state, self.reason, self._failures = "up", "", 0
        self.version += 1
        if self._past and fell(scrape.values, self._past[-1][1].values, (names.tokens, names.requests, names.drafts)):
            self.restarts += 1
            self._past.clear()
        if self._past:
            self._note(names, now, scrape)
        self._past.append((now, scrape))
        while now - self._past[0][0] > SPAN and len(self._past) > 2:
            self._past.popleft()

    def _note(self, names: Names, now: float, scrape: Scrape) -> None:
        (start, oldest), (before, newest) = self._past[0], self._past[-1]
        if now <= before:
            return
        self.latest = figures(names, oldest, scrape, now - start)
        passes = _grown(names.drafts, oldest, scrape)
        weights = {n: passes for n in self.latest if passes and n.startswith(("accepted_length", "acceptance_rate/"))}
        self.history.add(now, self.latest, weights)
        # The alarm counts every pass once: what happened since the last look.
        step = figures(names, newest, scrape, now - before)
        if "accepted_length" in step:
            passes = _grown(names.drafts, newest, scrape)
            if names.accept_length:
                passes = step["tokens_per_second"] * (now - before) / step["accepted_length"]
            self.drift.add(now, step["accepted_length"], passes)

    async def _fetch(self, client: httpx.AsyncClient) -> str:
        body = bytearray()
        async with client.stream("GET", self.url, timeout=TIMEOUT) as answer:
            if answer.status_code != 200:
                raise ConfigError(f"it answers with status {answer.status_code} at {self.url}")
            async for part in answer.aiter_bytes():
                body += part
                if len(body) > LIMIT:
                    raise ConfigError(f"its answer is longer than {LIMIT >> 20} MiB")
        return body.decode("utf-8", errors="replace")

    def _down(self, reason: str) -> None:
        if self.state == "up":
            self._alarms.raise_(self.name, "down", f"does not answer: {reason}", self._clock())
        self.state, self.reason, self.latest = "down", reason, {}
        self._failures += 1
        self.version += 1


def figures(names: Names, old: Scrape, new: Scrape, seconds: float) -> dict[str, float]:
    """What an engine did between two scrapes `seconds` apart, by the names of the page.

    `accepted_length` and `acceptance_rate/<i>` where there were verify passes, `ttft`, `itl` and `e2e` (`/p50`, `/p95`,
    `/p99`, in seconds) where there were observations.
    """
    values = new.values
    out = {
        "tokens_per_second": _grown(names.tokens, old, new) / seconds,
        "requests_per_second": _grown(names.requests, old, new) / seconds,
        "running": values.get(names.running, 0.0),
        "waiting": values.get(names.waiting, 0.0),
    }
    if names.cache:
        out["cache_use"] = values.get(names.cache, 0.0)
    if names.throughput in values:
        out["tokens_per_second"] = values[names.throughput]
    passes = _grown(names.drafts, old, new)
    if passes > 0:
        emitted = _grown(names.emitted, old, new) if names.emitted else passes + _grown(names.accepted, old, new)
        out["accepted_length"] = emitted / passes
        reached = passes
        at, before = new.by_position.get(names.accepted_at, {}), old.by_position.get(names.accepted_at, {})
        for position in sorted(at)[:POSITIONS]:
            accepted = at[position] - before.get(position, 0.0)
            if reached <= 0:
                break
            out[f"acceptance_rate/{position}"] = accepted / reached
            reached = accepted
    elif values.get(names.accept_length, 0.0) >= 1 and out["tokens_per_second"] > 0:
        out["accepted_length"] = values[names.accept_length]
    for name, histogram in (("ttft", names.first_token), ("itl", names.between_tokens), ("e2e", names.whole)):
        counts = difference(new.buckets.get(histogram, {}), old.buckets.get(histogram, {}))
        for label, share in SHARES.items():
            value = percentile(counts, share)
            if value is not None:
                out[f"{name}/{label}"] = value
    return out


def _grown(name: str, old: Scrape, new: Scrape) -> float:
    return new.values.get(name, 0.0) - old.values.get(name, 0.0)


def _split(url: str) -> str:
    """Host and port of the address."""
    try:
        httpx.URL(url)
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or True)
    except (ValueError, httpx.InvalidURL):
        known = False
    if not known:
        raise ConfigError(f"--engine {url} is no address; expected [NAME=]http://HOST:PORT")
    if parts.username or parts.password:
        raise ConfigError("--engine takes no user and password: the address is shown in the page")
    return parts.netloc


def _reason(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.ConnectError):
        return "nothing listens there"
    if isinstance(error, httpx.TimeoutException):
        return f"no answer within {TIMEOUT:g} s"
    return str(error) or type(error).__name__
