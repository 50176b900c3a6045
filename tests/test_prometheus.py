from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sstf.prometheus import difference, percentile, read_metrics

TEXT = r"""
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="a \"quoted\" } name"} 120.0
vllm:generation_tokens_total{engine="1",model_name="b"} 1.5e+01
vllm:generation_tokens_created{engine="0"} 1.7e9
vllm:accepted{position="0"} 30
vllm:accepted{position="1"} 10
vllm:accepted{position="0",engine="1"} 5
vllm:ttft_bucket{le="0.1"} 3
vllm:ttft_bucket{le="+Inf"} 4
vllm:ttft_sum 0.5
plain_gauge 7 1700000000000
broken{ 1
broken
nan_gauge NaN
not_a_number eight
"""


def test_samples_are_added_up_over_their_labels() -> None:
    wanted = {"vllm:generation_tokens_total", "vllm:accepted", "vllm:ttft", "plain_gauge", "broken", "nan_gauge"}
    scrape = read_metrics(TEXT, wanted | {"not_a_number"})
    assert scrape.values == {"vllm:generation_tokens_total": 135, "vllm:accepted": 45, "plain_gauge": 7}
    assert scrape.by_position == {"vllm:accepted": {0: 35, 1: 10}}
    assert scrape.buckets == {"vllm:ttft": {0.1: 3, math.inf: 4}}


@given(st.text(max_size=200))
def test_any_text_can_be_read(text: str) -> None:
    read_metrics(text, {"a", "vllm:x"})


def test_percentiles_lie_within_their_bucket() -> None:
    counts = {0.1: 10.0, 0.5: 30.0, 1.0: 40.0, math.inf: 40.0}
    # the 20th of 40 is the 10th of the 20 between 0.1 and 0.5: 0.1 + 0.4 * 10 / 20
    assert percentile(counts, 0.5) == pytest.approx(0.3)
    assert percentile(counts, 0.25) == pytest.approx(0.1)
    assert percentile(counts, 1.0) == pytest.approx(1.0)
    assert percentile({0.1: 0.0, math.inf: 5.0}, 0.5) == 0.1, "of the open bucket its lower edge"
    assert percentile({0.1: 0.0, math.inf: 0.0}, 0.5) is None
    assert percentile({}, 0.5) is None


@given(st.lists(st.floats(0.001, 9.9), min_size=1, max_size=50), st.sampled_from([0.5, 0.95, 0.99]))
def test_a_percentile_is_off_by_less_than_its_bucket(values: list[float], share: float) -> None:
    edges = [0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0]
    counts = {edge: float(sum(v <= edge for v in values)) for edge in edges} | {math.inf: float(len(values))}
    found = percentile(counts, share)
    exact = sorted(values)[math.ceil(share * len(values) - 1e-9) - 1]
    upper = next(edge for edge in edges if exact <= edge)
    lower = max([0.0, *(edge for edge in edges if edge < upper)])
    assert found is not None and lower - 1e-9 <= found <= upper + 1e-9


def test_between_two_scrapes() -> None:
    assert difference({0.1: 7.0, math.inf: 9.0}, {0.1: 4.0}) == {0.1: 3.0, math.inf: 9.0}
