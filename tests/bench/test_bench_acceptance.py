"""Engines' counters, read from pages as the engines write them, and the figures worked out by hand."""

from __future__ import annotations

import pytest

from sstf.bench.acceptance import Acceptance, Counters, acceptance, read_counters

VLLM = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="target"} 40.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="target"} 10.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="target"} 1.79e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="target"} 80.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="target"} 25.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="target",position="0"} 20.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="target",position="1"} 5.0
vllm:request_success_total{finished_reason="a } b"} 3.0
not a line
"""
SGLANG = """\
sglang:spec_verify_calls_total{model_name="target",tp_rank="0"} 30.0
sglang:spec_accept_length{model_name="target"} 2.5
"""


def test_vllms_page() -> None:
    assert read_counters(VLLM) == Counters(50.0, 25.0, None, {0: 20.0, 1: 5.0})


def test_sglangs_page() -> None:
    assert read_counters(SGLANG) == Counters(30.0)


@pytest.mark.parametrize(
    "page", ["", "vllm:num_requests_running 1.0\n", "<html>", "vllm:spec_decode_num_drafts_total x"]
)
def test_an_engine_that_does_not_speculate(page: str) -> None:
    assert read_counters(page) is None


def test_figures_by_hand() -> None:
    before, after = Counters(10.0, 5.0, None, {0: 4.0, 1: 1.0}), Counters(50.0, 35.0, None, {0: 24.0, 1: 11.0})
    # 40 passes; 20 accepted the first draft, 10 the second; 68 tokens in 2 answers were received
    assert acceptance(before, after, 68, 2) == Acceptance(40, 1.75, 1.65, [0.5, 0.25], [0.5, 0.5])
    assert acceptance(Counters(0.0, 0.0), after, None, 2) == Acceptance(
        50, 1.7, None, [0.48, 0.22], [0.48, pytest.approx(0.22 / 0.48)]
    )


def test_our_own_servers_page() -> None:
    before = "sstf_verify_passes_total 0.0\nsstf_verified_tokens_total 0.0\nsstf_accepted_tokens_total 0.0\n"
    after = """\
# HELP sstf_survival Share of passes that accepted a position.
sstf_survival{position="0"} 0.5
sstf_accepted_tokens_per_position_total{position="0"} 2.0
sstf_accepted_tokens_per_position_total{position="1"} 1.0
sstf_verify_passes_total 4.0
sstf_verified_tokens_total 7.0
sstf_draft_tokens_total 8.0
sstf_accepted_tokens_total 4.0
"""
    found = acceptance(read_counters(before), read_counters(after), 8, 1)
    # 7 tokens in 4 passes, though 4 drafts were accepted: the last pass of an answer was cut at its end
    assert found == Acceptance(4, 1.75, 1.75, [0.5, 0.25], [0.5, 0.5])


def test_without_accepted_tokens_received_ones_count() -> None:
    assert acceptance(Counters(10.0), Counters(50.0), 102, 2) == Acceptance(40, 2.5, 2.5, [], [])
    assert acceptance(Counters(10.0), Counters(50.0), None, 2) is None


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, Counters(1.0)), (Counters(1.0), None), (Counters(5.0), Counters(5.0)), (Counters(5.0), Counters(1.0))],
)
def test_nothing_counted_is_no_figure(before: Counters | None, after: Counters | None) -> None:
    assert acceptance(before, after, 10, 1) is None


def test_positions_that_nobody_reached_have_no_rate() -> None:
    found = acceptance(Counters(0.0, 0.0), Counters(4.0, 0.0, None, {0: 0.0, 1: 0.0, 2: 0.0}), 4, 1)
    assert found is not None
    assert (found.accepted_length, found.survival) == (1.0, [0.0, 0.0, 0.0])
    assert found.acceptance_rate == [0.0, None, None]
