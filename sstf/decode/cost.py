"""What a step of speculative decoding costs in seconds, and how many candidates are worth that.

    speedup = accepted_length · plain_step / (depth · draft_s + verify(nodes + 1) + host_s)

The seconds are measured, on the machine and while decoding; the accepted length comes from others, as do the chances
of candidates (`sstf/trees/calibration.py`). A verify pass over n rows costs about as much as one over a single row
until the accelerator has no idle arithmetic left, then grows: so a table of knots stands for it, not a formula.

The size of a tree may follow from its candidates' chances, and still not change what is emitted, where candidates are
the top of the draft distribution, because these depend on the text so far alone. Where candidates are drawn at random
the chance of a candidate depends on the token that was drawn, and the size has to be chosen before drawing.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from pydantic import ValidationError

from sstf.config_loading import Section
from sstf.errors import DamagedDataError

KNOTS = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # rows of a verify pass
RATE = 0.1  # weight of the newest measurement
OUTLIER = 1.5  # a measurement counts as at most this multiple of the estimate, and as at least its inverse
SMALLEST_S = 1e-6  # an estimate below this counts as this much where outliers are cut, so that 0 can be left


class CostModel:
    """Seconds of a step, from measurements.

    Args:
        verify_s: seconds of a verify pass over 1, 2, 4, 8, 16, 24, 32, 48 and 64 rows (`KNOTS`). Where they fall,
            the larger of the two counts: more rows are never cheaper.
        draft_s: seconds of drafting one level.
        host_s: seconds of everything else in a step that speculates.
        plain_host_s: the same in a plain step; by default as much, until a plain step is observed.

    Raises:
        ValueError: another number of knots, or a time that is negative or not finite (or 0, of a verify pass).
    """

    def __init__(
        self, verify_s: Sequence[float], draft_s: float, host_s: float, plain_host_s: float | None = None
    ) -> None:
        if len(verify_s) != len(KNOTS):
            raise ValueError(f"verify_s has {len(verify_s)} times; expected {len(KNOTS)}, for {KNOTS} rows")
        self.verify_s = list(accumulate(verify_s, max))
        self.draft_s, self.host_s = draft_s, host_s
        self.plain_host_s = host_s if plain_host_s is None else plain_host_s
        _check(draft_s, host_s, self.plain_host_s, *verify_s)
        if not min(verify_s) > 0:
            raise ValueError(f"a verify pass takes {min(verify_s)} s; expected a positive time")

    def verify(self, rows: int) -> float:
        """Seconds of a verify pass over `rows` rows: straight between the knots, the last slope beyond them."""
        return sum(weight * self.verify_s[knot] for knot, weight in _weights(rows).items())

    def step(self, depth: int, nodes: int) -> float:
        """Seconds of a step that drafts `depth` levels and verifies `nodes` nodes and the root."""
        return depth * self.draft_s + self.verify(nodes + 1) + self.host_s

    def plain_step(self) -> float:
        """Seconds of plain decoding's step, with its own host work: that is what a user would have without a head."""
        return self.verify(1) + self.plain_host_s

    def speedup(self, accepted_length: float, depth: int, nodes: int) -> float:
        """Tokens a second in relation to plain decoding, which emits one token a step.

        Args:
            accepted_length: tokens emitted a step, the bonus token included.
            depth: levels drafted.
            nodes: nodes verified, the root excluded.
        """
        return accepted_length * self.plain_step() / self.step(depth, nodes)

    def observe(self, depth: int, nodes: int, draft_s: float, verify_s: float, host_s: float) -> None:
        """Learn from one measured step: an exponential average that a stalled machine hardly moves.

        A measurement counts as at most `OUTLIER` times the present estimate and at least its inverse, so one step moves
        it by a twentieth at most, while a lasting change of any size is reached exponentially fast (a tenfold one in
        50 to 70 steps). A verify time moves the two knots beside its number of rows, in proportion to their
        part in the estimate; a knot that would then contradict the order of the knots follows, since the newest
        measurement is the better known.

        Args:
            depth: levels drafted; 0 is a plain step, whose host work is averaged apart.
            nodes: nodes verified, the root excluded.
            draft_s: seconds of all levels together.
            verify_s: seconds of the verify pass.
            host_s: seconds of everything else.

        Raises:
            ValueError: a time that is negative or not finite.
        """
        _check(draft_s, verify_s, host_s)
        self._observe_verify(nodes + 1, verify_s)
        if depth == 0:
            self.plain_host_s = _average(self.plain_host_s, host_s)
            return
        self.draft_s = _average(self.draft_s, draft_s / depth)
        self.host_s = _average(self.host_s, host_s)

    def best_size(self, gains: Sequence[float], depth: int) -> int:
        """The number n of nodes, 0 included, with the most tokens a second: (1 + sum gains[:n]) / step(depth, n).

        Args:
            gains: chance that a candidate and all its ancestors are accepted, of every candidate, falling.
            depth: levels already drafted, whose cost is spent whatever n is.
        """
        return max(range(len(gains) + 1), key=self._rates(gains, depth).__getitem__)  # the smallest of equals

    def worth_another_level(
        self, gains: Sequence[float], frontier: Sequence[float], depth: int, keep: float = 1.0
    ) -> bool:
        """Whether one more level is expected to raise the tokens a second.

        A node's children are accepted with a chance of 1 together at most, so a level cannot add more tokens than the
        sum of the chances of the nodes that it expands. The estimate gives every expanded node a single child with
        `keep` times its own chance: with `keep` = 1 that is the bound, reached with the fewest rows, and the answer
        "no" is certain. Both sides are compared at their best sizes.

        Args:
            gains: as in `best_size`.
            frontier: chances of the nodes that the level would expand.
            depth: levels drafted so far.
            keep: the chance that the best child of an accepted node is accepted, in (0, 1].
        """
        more = sorted([*gains, *(keep * chance for chance in frontier)], reverse=True)
        return max(self._rates(more, depth + 1)) > max(self._rates(gains, depth))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return _Saved(
            verify_s=self.verify_s, draft_s=self.draft_s, host_s=self.host_s, plain_host_s=self.plain_host_s
        ).model_dump()

    @staticmethod
    def from_json(fields: object) -> CostModel:
        """Inverse of `to_json`.

        Raises:
            DamagedDataError: it is something else.
        """
        try:
            saved = _Saved.model_validate(fields)
            return CostModel(saved.verify_s, saved.draft_s, saved.host_s, saved.plain_host_s)
        except (ValidationError, ValueError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise DamagedDataError(
                f"the measured costs are damaged or of another version ({reason}); delete them, and they are "
                "measured anew"
            ) from None

    def _rates(self, gains: Sequence[float], depth: int) -> list[float]:
        """Tokens a second with the first 0, 1, ... of `gains`."""
        tokens = accumulate(gains, initial=1.0)
        return [expected / self.step(depth, nodes) for nodes, expected in enumerate(tokens)]

    def _observe_verify(self, rows: int, seconds: float) -> None:
        estimate = self.verify(rows)
        change = _average(estimate, seconds) / estimate - 1
        weights = _weights(rows)
        if rows > KNOTS[-1]:  # extrapolated: both knots move alike, which moves the estimate by just that
            shares = dict.fromkeys(weights, 1.0)
        else:  # in proportion to its weight, and scaled so that the estimate moves by `change`
            scale = estimate / sum(weight**2 * self.verify_s[knot] for knot, weight in weights.items())
            shares = {knot: scale * weight for knot, weight in weights.items()}
        for knot, share in shares.items():
            self.verify_s[knot] *= 1 + share * change
        nearest = max(weights, key=weights.__getitem__)
        below = list(accumulate(self.verify_s[nearest::-1], min))[:0:-1]
        self.verify_s = below + list(accumulate(self.verify_s[nearest:], max))


class _Saved(Section):
    verify_s: list[float]
    draft_s: float
    host_s: float
    plain_host_s: float


def _weights(rows: int) -> dict[int, float]:
    """The knots (their indices) that a number of rows lies between, with their weights in the estimate."""
    if rows < 1:
        raise ValueError(f"a verify pass over {rows} rows; expected at least 1")
    lower = min(bisect_right(KNOTS, rows) - 1, len(KNOTS) - 2)
    part = (rows - KNOTS[lower]) / (KNOTS[lower + 1] - KNOTS[lower])
    return {knot: weight for knot, weight in ((lower, 1 - part), (lower + 1, part)) if weight != 0}


def _average(estimate: float, measured: float) -> float:
    reference = max(estimate, SMALLEST_S)
    return estimate + RATE * (min(max(measured, estimate / OUTLIER), reference * OUTLIER) - estimate)


def _check(*seconds: float) -> None:
    bad = [value for value in seconds if not 0 <= value < math.inf]
    if bad:
        raise ValueError(f"a time of {bad[0]} s; expected a finite one of at least 0")
