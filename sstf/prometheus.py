"""Reading an engine's /metrics: the Prometheus text format, and percentiles of its histograms.

https://prometheus.io/docs/instrumenting/exposition_formats (text format 0.0.4; of OpenMetrics what is the same).
Samples that differ in labels alone (one model, engine index or finish reason each) are added up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import TypeVar

Key = TypeVar("Key")
SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?[ \t]+([^ \t]+)")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')


@dataclass
class Scrape:
    """What was read: sums by name, by name and draft position, and by name and upper bucket edge (cumulative)."""

    values: dict[str, float] = field(default_factory=dict)
    by_position: dict[str, dict[int, float]] = field(default_factory=dict)
    buckets: dict[str, dict[float, float]] = field(default_factory=dict)


def read_metrics(text: str, wanted: Set[str]) -> Scrape:
    """The samples of `text` whose names are in `wanted`. A histogram is wanted by its name without `_bucket`.

    Lines that cannot be read, and values that are not finite, are passed over: they are the engine's.
    """
    scrape = Scrape()
    for line in text.splitlines():
        found = SAMPLE.match(line)
        if found is None:
            continue
        name, labels, value = found[1], found[2] or "", _number(found[3])
        histogram = name.removesuffix("_bucket")
        if value is None or not math.isfinite(value) or (name not in wanted and histogram not in wanted):
            continue
        known = dict(LABEL.findall(labels))
        edge = _number(known.get("le", ""))
        if histogram != name and edge is not None:
            _add(scrape.buckets.setdefault(histogram, {}), edge, value)
            continue
        _add(scrape.values, name, value)
        if known.get("position", "").isdecimal():
            _add(scrape.by_position.setdefault(name, {}), int(known["position"]), value)
    return scrape


def percentile(counts: Mapping[float, float], share: float) -> float | None:
    """The value below which `share` of a histogram's observations lie, as Prometheus' `histogram_quantile` has it.

    Linear within a bucket; of the last, open bucket its lower edge; None without observations.

    Args:
        counts: observations up to each upper edge, cumulative, `inf` among the edges.
        share: 0 .. 1.

    >>> percentile({1.0: 0, 2.0: 10, math.inf: 10}, 0.5)
    1.5
    """
    edges = sorted(counts)
    if not edges or counts[edges[-1]] <= 0:
        return None
    rank, low, below = share * counts[edges[-1]], 0.0, 0.0
    for edge in edges:
        if counts[edge] >= rank and counts[edge] > below:
            if math.isinf(edge):
                return low
            return low + (edge - low) * (rank - below) / (counts[edge] - below)
        low, below = edge, max(below, counts[edge])
    return low


def difference(new: Mapping[float, float], old: Mapping[float, float]) -> dict[float, float]:
    """Observations between two scrapes of one histogram."""
    return {edge: count - old.get(edge, 0.0) for edge, count in new.items()}


def fell(new: Mapping[str, float], old: Mapping[str, float], counters: Iterable[str]) -> bool:
    """Whether a counter went down: the engine was started again."""
    return any(new.get(name, 0.0) < old.get(name, 0.0) for name in counters)


def _add(into: dict[Key, float], key: Key, value: float) -> None:
    into[key] = into.get(key, 0.0) + value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
