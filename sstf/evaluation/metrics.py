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

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

LENGTHS = (128, 512, 2048, 8192)  # where buckets of prompt lengths begin, in tokens
CONTEXT_FROM = 64  # the first two bins of context lengths meet here; each further one is twice as wide


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
    mode: str = "default"  # what the prompt asked of the chat template
    prompt_tokens: int = 0

    @property
    def host_s(self) -> float:
        """Neither drafting nor the target."""
        return self.decode_s - self.draft_s - self.verify_s

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

    >>> repetition([1, 2, 1, 2, 1], n=2)
    0.5
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


def intervals(
    sums: NDArray[np.float64],
    figures: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    seed: int = 0,
    rounds: int = 1000,
) -> tuple[float, float]:
    """95 % interval of a figure of sums over prompts, as `bootstrap` finds it, all resamples at once.

    Args:
        sums: [prompt, column] what each prompt adds.
        figures: [round, column] totals -> [round] figures.
        seed: of the draws.
        rounds: resamples.
    """
    count = len(sums)
    times_drawn = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=rounds)
    values = np.sort(figures(times_drawn @ sums))
    return float(values[int(0.025 * rounds)]), float(values[int(0.975 * rounds) - 1])


def histogram(records: Sequence[Record]) -> list[int]:
    """Passes that emitted 1, 2, ... tokens.

    >>> histogram([Record("", "", [1, 3, 1], [], 1.0, 0.0, 0.0)])
    [2, 0, 1]
    """
    counts = Counter(length for r in records for length in r.accepted_lengths)
    return [counts[length] for length in range(1, max(counts, default=0) + 1)]


@dataclass(frozen=True)
class ContextBin:
    """Passes that began with `low` to `high` - 1 tokens in the context."""

    low: int
    high: int
    passes: int
    accepted_length: float


def by_context(records: Sequence[Record]) -> list[ContextBin]:
    """Accepted length by how many tokens, the prompt's included, stood there when a pass began."""
    lengths: defaultdict[int, list[int]] = defaultdict(list)
    for r in records:
        context = r.prompt_tokens + 1  # the prefill's token
        for length in r.accepted_lengths:
            lengths[max(0, (context // CONTEXT_FROM).bit_length())].append(length)
            context += length
    return [
        ContextBin(
            CONTEXT_FROM * 2 ** (number - 1) if number else 0,
            CONTEXT_FROM * 2**number,
            len(found),
            sum(found) / len(found),
        )
        for number, found in sorted(lengths.items())
    ]


def length_bucket(tokens: int) -> str:
    """The name of the bucket that a prompt of so many tokens falls into.

    >>> length_bucket(127), length_bucket(128), length_bucket(9000)
    ('under 128 tokens', '128 to 511 tokens', '8192 tokens and more')
    """
    if tokens < LENGTHS[0]:
        return f"under {LENGTHS[0]} tokens"
    for low, high in pairwise(LENGTHS):
        if tokens < high:
            return f"{low} to {high - 1} tokens"
    return f"{LENGTHS[-1]} tokens and more"


def sign_test(better: int, worse: int) -> float:
    """Two-sided p-value of so many improvements against so many losses, ties left out, if both were equally likely.

    >>> sign_test(5, 0)
    0.0625
    """
    count = better + worse
    tail = sum(math.comb(count, k) for k in range(min(better, worse) + 1))
    return float(min(1.0, 2 * tail / 2**count))
