"""What `/metrics` tells, in Prometheus' text format.

Acceptance has the names and formulas of the reports (`evaluation/metrics.py`), over everything since the start:

| name | |
|---|---|
| `sstf_accepted_length` | tokens emitted by verify passes / verify passes, the bonus token included |
| `sstf_survival{position}` | passes that accepted draft position i (from 0) / passes |
| `sstf_acceptance_rate{position}` | passes that accepted position i / passes that accepted position i - 1 |

The counters below them are for rates over a time of one's own choice. A pass counts once for every sequence in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sstf.decode import Step
from sstf.evaluation.metrics import acceptance_rate

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)


class Acceptance(Collector):
    """Counts of verify passes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.passes = self.emitted = self.drafted = self.accepted = 0
        self.survived: list[int] = []  # passes that accepted draft position i

    def observe(self, step: Step) -> None:
        """One sequence's part of a pass. The last pass of a text may be cut short, as in reports."""
        with self._lock:
            self.passes += 1
            self.emitted += len(step.tokens)
            self.drafted += step.drafted
            self.accepted += step.accepted
            self.survived += [0] * (len(step.tokens) - 1 - len(self.survived))
            for position in range(len(step.tokens) - 1):
                self.survived[position] += 1

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client.registry.Collector`."""
        with self._lock:
            passes, survived = self.passes, list(self.survived)
            counts = {"emitted": self.emitted, "drafted": self.drafted, "accepted": self.accepted}
        survival = [count / passes for count in survived]
        length = counts["emitted"] / passes if passes else 0.0
        yield GaugeMetricFamily("sstf_accepted_length", "Tokens per verify pass, bonus token included.", length)
        share = GaugeMetricFamily("sstf_survival", "Share of passes that accepted a position.", labels=["position"])
        rate = GaugeMetricFamily(
            "sstf_acceptance_rate", "Share of the passes that reached a position.", labels=["position"]
        )
        at = CounterMetricFamily(
            "sstf_accepted_tokens_per_position", "Draft tokens accepted at a position.", labels=["position"]
        )
        for position, (part, conditional) in enumerate(zip(survival, acceptance_rate(survival), strict=True)):
            share.add_metric([str(position)], part)
            if conditional is not None:
                rate.add_metric([str(position)], conditional)
            at.add_metric([str(position)], survived[position])
        yield from (share, rate, at)
        yield CounterMetricFamily("sstf_verify_passes", "Verify passes, one a sequence.", passes)
        yield CounterMetricFamily("sstf_verified_tokens", "Tokens emitted by verify passes.", counts["emitted"])
        yield CounterMetricFamily("sstf_draft_tokens", "Draft tokens verified.", counts["drafted"])
        yield CounterMetricFamily("sstf_accepted_tokens", "Draft tokens accepted and emitted.", counts["accepted"])


class Metrics:
    """All of a server's."""

    def __init__(self) -> None:
        self.registry = to = CollectorRegistry()
        self.acceptance = Acceptance()
        to.register(self.acceptance)
        ProcessCollector(registry=to)
        self.requests = Counter("sstf_requests", "Answered requests.", ["path", "status"], registry=to)
        self.ended = Counter("sstf_answers", "Answers by why they ended.", ["reason"], registry=to)
        self.prompt_tokens = Counter("sstf_prompt_tokens", "Tokens of prompts taken in.", registry=to)
        self.new_tokens = Counter("sstf_generation_tokens", "Tokens generated.", registry=to)
        self.running = Gauge("sstf_requests_running", "Requests being decoded.", registry=to)
        self.waiting = Gauge("sstf_requests_waiting", "Requests in the queue.", registry=to)
        self.queued_s = Histogram("sstf_queue_time_seconds", "From arrival to the slot.", buckets=SECONDS, registry=to)
        self.first_s = Histogram(
            "sstf_time_to_first_token_seconds", "From arrival to the first token.", buckets=SECONDS, registry=to
        )
        self.token_s = Histogram(
            "sstf_time_per_output_token_seconds", "Of an answer, after its first token.", buckets=PER_TOKEN, registry=to
        )
        self.latency_s = Histogram(
            "sstf_e2e_request_latency_seconds", "From arrival to the end of an answer.", buckets=SECONDS, registry=to
        )

    def watch(self, running: Callable[[], float], waiting: Callable[[], float]) -> None:
        """Where the gauges look."""
        self.running.set_function(running)
        self.waiting.set_function(waiting)

    def text(self) -> bytes:
        """For Prometheus."""
        return generate_latest(self.registry)
