"""What engines count of their drafts, read from their /metrics pages before and after a load.

| engine | verify passes | accepted draft tokens |
|---|---|---|
| vLLM | `vllm:spec_decode_num_drafts_total` | `vllm:spec_decode_num_accepted_tokens[_per_pos]_total` |
| `sstf serve` | `sstf_verify_passes_total` | `sstf_accepted_tokens[_per_position]_total` |
| SGLang | `sglang:spec_verify_calls_total` | not counted: `spec_accept_length` is the last interval's |

A counter has one line for each process, and they are summed. Traffic of others between the two readings is counted too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sstf.evaluation.metrics import acceptance_rate
from sstf.prometheus import read_metrics

# Of each engine: verify passes, accepted draft tokens, tokens emitted by verify passes, and accepted draft tokens by
# position; "" is not counted.
ENGINES = (
    (
        "vllm:spec_decode_num_drafts_total",
        "vllm:spec_decode_num_accepted_tokens_total",
        "",
        "vllm:spec_decode_num_accepted_tokens_per_pos_total",
    ),
    (
        "sstf_verify_passes_total",
        "sstf_accepted_tokens_total",
        "sstf_verified_tokens_total",
        "sstf_accepted_tokens_per_position_total",
    ),
    ("sglang:spec_verify_calls_total", "", "", ""),
)
WANTED = frozenset(name for names in ENGINES for name in names if name)


@dataclass(frozen=True)
class Counters:
    """At one moment; what is not counted is None, or empty.

    `accepted` are draft tokens, `accepted_at[i]` those at draft position i, and `emitted` the tokens that verify passes
    gave out, an answer's last ones cut at its end.
    """

    passes: float
    accepted: float | None = None
    emitted: float | None = None
    accepted_at: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Acceptance:
    """The glossary's figures over a load; see `evaluation.metrics`.

    `received_length` is (received tokens - answers) / passes: the first token of an answer comes from its prefill.
    `accepted_length` is emitted / passes; where only accepted tokens are counted, 1 + accepted / passes; without
    either, `received_length`. vLLM counts before it cuts an answer at its end or limit, so that its own figure lies a
    little above the received one.
    """

    passes: int
    accepted_length: float
    received_length: float | None
    survival: list[float]
    acceptance_rate: list[float | None]

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return dict(vars(self))


def read_counters(page: str) -> Counters | None:
    """The counters of a /metrics page; None for an engine that does not speculate, or does not say so."""
    scrape = read_metrics(page, WANTED)
    sums = scrape.values
    for passes, accepted, emitted, accepted_at in ENGINES:
        if passes in sums:
            at = scrape.by_position.get(accepted_at, {})
            return Counters(sums[passes], sums.get(accepted), sums.get(emitted), at)
    return None


def acceptance(
    before: Counters | None, after: Counters | None, received: int | None, answers: int
) -> Acceptance | None:
    """What was accepted between two readings.

    Args:
        before: the load.
        after: the load.
        received: tokens of its answers, None if the server gave no count.
        answers: how many.

    Returns:
        None where nothing was counted: no speculation, no /metrics, or an engine that was started anew.
    """
    if before is None or after is None or after.passes <= before.passes:
        return None
    passes = after.passes - before.passes
    received_length = None if received is None else (received - answers) / passes
    if after.emitted is not None and before.emitted is not None:
        length = (after.emitted - before.emitted) / passes
    elif after.accepted is not None and before.accepted is not None:
        length = 1 + (after.accepted - before.accepted) / passes
    elif received_length is not None:
        length = received_length
    else:
        return None
    survival = [(after.accepted_at[i] - before.accepted_at.get(i, 0.0)) / passes for i in sorted(after.accepted_at)]
    return Acceptance(round(passes), length, received_length, survival, acceptance_rate(survival))
