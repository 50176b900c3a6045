"""Degenerate repetition in generated token ids (Holtzman et al. 2020): a model that got stuck.

A head learns such loops at once and accepts whole passes of them, so they inflate every figure and teach nothing.
Two signs are looked for, in time linear in the number of tokens:

- a **cycle**: the same tokens over and over, that either runs to the end or fills half of the answer. Engines stop at
  the former (vLLM's `repetition_detection`), after 3 or 4 copies;
- **little that is new**: most 16-grams stood in the answer before, a loop in which a number or a name changes. The
  filters of pre-training text count repeated n-grams likewise (Rae et al. 2021, "Gopher", table A1).

Lists, tables, code and refrains repeat themselves too, but shortly: they have many 4-grams twice (60 % in a JSON list)
and few 16-grams (11 %), and a cycle in them, such as a matrix of zeros, does not last. An answer that gives a text of
its own a second time, as a corrected program, has at most half of its 16-grams twice, and is not reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MIN_TOKENS = 48  # shorter cycles are laughter, separators and emphasis
COPIES = 3  # two are a correction or a refrain
FILLED = 0.5  # share of the answer that a cycle fills which does not run to the end
END_SLACK = 1  # tokens after a cycle that runs to the end: the end token
GRAM = 16
REPEATED = 0.5  # more than this share of 16-grams stood before; two copies of a text stay under it


@dataclass(frozen=True)
class Repetition:
    """Where ids repeat themselves.

    `period` is the length of the cycle in tokens, None where there is no exact one. The repetition begins at `start`,
    the first token of the first cycle; ids[: start + period] holds it once. `share` is the part of the answer that
    the cycle fills, or without a period the share of 16-grams that stood before (defined as the repetition rate of the
    evaluation, with n = 16).
    """

    period: int | None
    start: int
    share: float


def repetition(ids: Sequence[int]) -> Repetition | None:
    """The loop that one generated answer got stuck in, or None.

    Args:
        ids: Token ids of one answer, with or without its end token.

    >>> repetition([7, 8, 9] + [1, 2, 3, 4] * 20)
    Repetition(period=4, start=3, share=0.963855421686747)
    """
    if len(ids) < MIN_TOKENS:
        return None
    lags = _lags(ids)
    # A cycle that runs to the end shows in the last lag, or in the one before the end token. One that fills half of
    # the answer gives a third of all lags, so it is among the most common.
    common = Counter(lag for lag in lags if lag).most_common(3)
    cycle = _longest_cycle(ids, {*lags[-1 - END_SLACK :], *(lag for lag, _ in common)} - {0})
    if cycle is not None:
        return cycle
    again = [position for position, lag in enumerate(lags) if lag]
    if len(again) > REPEATED * len(lags):
        return Repetition(None, again[0] - lags[again[0]], len(again) / len(lags))
    return None


def _lags(ids: Sequence[int]) -> list[int]:
    """For each 16-gram in order, how many tokens before it last stood; 0 if never."""
    last: dict[tuple[int, ...], int] = {}
    lags = []
    for position in range(len(ids) - GRAM + 1):
        gram = tuple(ids[position : position + GRAM])
        lags.append(position - last.get(gram, position))
        last[gram] = position
    return lags


def _longest_cycle(ids: Sequence[int], periods: Iterable[int]) -> Repetition | None:
    """The longest cycle of one of the periods that counts as degenerate; of equals the shortest period."""
    found: list[tuple[int, int, int]] = []
    values = np.asarray(ids)
    for period in sorted(periods):
        same = np.concatenate([[False], values[period:] == values[:-period], [False]])
        begins, ends = np.flatnonzero(np.diff(same.astype(np.int8))).reshape(-1, 2).T
        for start, end in zip(begins.tolist(), (ends + period).tolist(), strict=True):
            length = end - start
            degenerate = end >= len(ids) - END_SLACK or length >= FILLED * len(ids)
            if degenerate and length >= max(MIN_TOKENS, COPIES * period):
                found.append((length, -period, start))
    if not found:
        return None
    length, negative_period, start = max(found)
    return Repetition(-negative_period, start, length / len(ids))
