"""A figure that is known within bounds: a plan prints these, since a bare number claims more than is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.96  # standard errors to each side of a 95 % interval


@dataclass(frozen=True)
class Interval:
    """From `low` to `high`; equal where the figure is exact."""

    low: float
    high: float

    @staticmethod
    def exact(value: float) -> Interval:
        """No uncertainty."""
        return Interval(value, value)

    @property
    def middle(self) -> float:
        """Half way."""
        return (self.low + self.high) / 2

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Interval:
        """Scaled by a factor of 0 or more."""
        return Interval(self.low * factor, self.high * factor)


def mean_of(values: Sequence[float], population: int | None = None) -> Interval:
    """The mean of a population of which `values` were drawn at random: 95 %, normal approximation.

    Args:
        values: at least one. A single value says nothing about the spread, so it counts as 0 to twice itself.
        population: how many there are in all; None for very many. When all were drawn, the mean is exact.

    >>> mean_of([2, 4, 6], population=3)
    Interval(low=4.0, high=4.0)
    """
    count = len(values)
    mean = sum(values) / count
    if population is not None and count >= population:
        return Interval.exact(mean)
    if count == 1:
        return Interval(0.0, 2 * mean)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    left_out = 1.0 if population is None else math.sqrt(1 - count / population)
    error = Z * deviation / math.sqrt(count) * left_out
    return Interval(max(0.0, mean - error), mean + error)


def mean_length(observed: Sequence[tuple[int, bool]], limit: int) -> Interval:
    """Mean length of texts that end by themselves or at `limit` tokens, from texts some of which were cut before.

    With texts that were all watched to their end it is their mean. Otherwise each token is taken to end its text with
    the same chance h, whose estimate is ends / tokens watched (the maximum-likelihood estimate for cut observations);
    the mean is then (1 - (1 - h)^limit) / h. Texts seldom end with their first words, so a short look overstates the
    length; the interval (95 %, Poisson) reaches up to `limit` where few ends were seen.

    Args:
        observed: tokens seen of each text, and whether it ended.
        limit: at which every text ends.
    """
    if all(ended or length >= limit for length, ended in observed):
        return mean_of([length for length, _ in observed])
    watched = sum(length for length, _ in observed)
    ends = sum(ended for _, ended in observed)

    def mean(chance: float) -> float:
        chance = min(chance, 1.0)
        return (1 - (1 - chance) ** limit) / chance if chance > 0 else float(limit)

    # No end among n tokens bounds the chance by 3 / n with 95 % confidence.
    most = (ends + Z * math.sqrt(ends)) / watched if ends else 3 / watched
    return Interval(mean(most), mean(max(0.0, ends - Z * math.sqrt(ends)) / watched))
