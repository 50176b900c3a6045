"""The glossary as code. Every figure of a report is computed here, from the records of decoded prompts.

| name | formula |
|---|---|
| `accepted_length` | tokens emitted by verify passes / verify passes, the bonus token included; 1 .. depth + 1 |
| `survival[i]` | passes that accepted draft position i / passes |
| `acceptance_rate[i]` | passes that accepted position i / passes that accepted position i - 1 |
| `tokens_per_second` | tokens after the first / seconds after the prefill |
| `speedup` | tokens_per_second / the plain row's, same prompts, same run |
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One prompt decoded by one arm. Seconds and counts exclude the prefill and the token that it gives."""

    prompt: str
    category: str
    accepted_lengths: list[int]
    token_ids: list[int]
    decode_s: float
    draft_s: float
    verify_s: float

    @property
    def decoded(self) -> int:
        """Tokens emitted by verify passes."""
        return sum(self.accepted_lengths)


def accepted_length(records: Sequence[Record]) -> float:
    """Micro average: all tokens over all passes. 0 without a pass."""
    passes = sum(len(r.accepted_lengths) for r in records)
    return sum(r.decoded for r in records) / passes if passes else 0.0


def tokens_per_second(records: Sequence[Record]) -> float:
    """All tokens over all seconds of decoding."""
    seconds = sum(r.decode_s for r in records)
    return sum(r.decoded for r in records) / seconds if seconds else 0.0


def survival(records: Sequence[Record], depth: int) -> list[float]:
    """survival[i]: share of passes that accepted draft position i. The last pass of a text may be cut short.

    >>> survival([Record("", "", [1, 3, 2, 2], [], 1.0, 0.0, 0.0)], 2)
    [0.75, 0.25]
    """
    lengths = [length for r in records for length in r.accepted_lengths]
    return [sum(length > i + 1 for length in lengths) / max(1, len(lengths)) for i in range(depth)]


def acceptance_rate(survived: Sequence[float]) -> list[float | None]:
    """Conditional on the position before; None where no pass got there."""
    before = [1.0, *survived]  # one longer: nothing follows the last position
    return [now / then if then else None for now, then in zip(survived, before, strict=False)]


def repetition(token_ids: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that stood in the text before. Loops inflate accepted length.

    >>> repetition([1, 2, 3, 4, 1, 2, 3, 4], n=4)
    0.2
    """
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def bootstrap(
    figure: Callable[[Sequence[int]], float], count: int, seed: int = 0, rounds: int = 1000
) -> tuple[float, float]:
    """95 % interval of a figure over prompts drawn with replacement.

    Args:
        figure: computes it from prompt indices; pairs stay together, since all arms share the indices.
        count: number of prompts.
        seed: of the draws.
        rounds: resamples.
    """
    rng = random.Random(seed)
    values = sorted(figure([rng.randrange(count) for _ in range(count)]) for _ in range(rounds))
    return values[int(0.025 * rounds)], values[int(0.975 * rounds) - 1]
