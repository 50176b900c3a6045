"""Re-weighting of candidate paths from acceptance history: what a head's confidence has been worth lately.

EAGLE-2 (arXiv 2406.16858) scores a node by the product of draft probabilities along its path, because a head's
confidence is close to its acceptance rate. How close differs by depth, by rank among siblings, by head and by text.
`PathCalibration` keeps, for every depth, rank and range of confidence, how often the head was right there, and turns
a confidence into the chance that it stands for. Older history is forgotten, so that a change of text is followed.

It leaves to others what to do with the chance (growth of the tree, its size) and which nodes were reached.
Torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sstf.errors import DamagedDataError

DEPTHS = 8  # 1, 2, ..., and 8 or deeper
LAST_RANKS = (0, 1, 2, 4, 8)  # ranks 0, 1, 2, 3-4, 5-8, and 9 or worse
# Bounds of the confidence bins, closest near 1, where most accepted nodes lie. Every one is exact in float16 and
# bfloat16, so that no dtype and no device puts a confidence into another bin.
BOUNDS = (1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 15 / 16, 31 / 32)
RANKS, BINS = len(LAST_RANKS) + 1, len(BOUNDS) + 1
CELLS = DEPTHS * RANKS * BINS
UNSEEN = 64  # a cell without news forgets this many times more slowly, counted in observations of all cells

_MIDDLES = [(low + high) / 2 for low, high in zip((0.0, *BOUNDS), (*BOUNDS, 1.0), strict=True)]


@dataclass(frozen=True)
class CalibrationError:
    """How far predictions were from what happened, each made before its outcome was known; all 0 without history.

    `brier` is the mean of (probability - accepted)². `error` is the expected calibration error: over the confidence
    bins, the mean of |mean probability - mean accepted|, weighted by their share of the observations.
    """

    raw_brier: float
    calibrated_brier: float
    raw_error: float
    calibrated_error: float
    weight: float  # observations, the forgotten part left out


class PathCalibration:
    """Chance of acceptance from the head's confidence, learnt from what was accepted.

    Every cell (depth bucket, rank bucket, confidence bin) keeps three sums over its history: observations, their
    confidences and their acceptances. To them come `prior` pseudo-observations at the bin's middle m whose mean
    acceptance is m too: they say "the confidence is right", and outweigh the first few outcomes. With
    accepted + prior·m = A, confidences + prior·m = C and observations + prior = N, a confidence c means

        c · A / C                        where the head was overconfident (A <= C),
        1 - (1 - c) · (N - A) / (N - C)  where it was too modest.

    Why this form: without history it is c itself. In a cell whose confidences lie at m it is the mean A / N of a Beta
    posterior. It is a straight line in c that rises, so it keeps the order of a head's candidates within a cell,
    where a table of rates would make them all alike; and it stays within 0 and 1, where the ratio alone would cut
    many modest candidates to one and the same value. A correction of the log-odds would also do that, but
    could not correct a head that says 1.

    Forgetting: an observation makes the older weight of its cell decay. Cells without news decay too, `UNSEEN` times
    more slowly: a candidate whose chance is low is no longer verified, so only time can give it another trial.

    Args:
        half_life: observations of a cell after which an older one weighs half.
        prior: pseudo-observations a cell.

    Raises:
        ValueError: either is not a positive number.
    """

    def __init__(self, half_life: float = 256.0, prior: float = 8.0) -> None:
        if not (0 < half_life < math.inf and 0 < prior < math.inf):
            raise ValueError(f"half_life is {half_life} and prior is {prior}; expected positive numbers")
        self.half_life, self.prior = half_life, prior
        self._history = torch.zeros(3, CELLS, dtype=torch.float64)  # weight, confidences, acceptances
        # [raw or calibrated; weight, probabilities, acceptances; bin], and the two sums of squared errors
        self._bins = torch.zeros(2, 3, BINS, dtype=torch.float64)
        self._squares = torch.zeros(2, dtype=torch.float64)
        self._tables: dict[torch.device, _Table] = {}
        self._fresh: Tensor | None = None  # `_lines` of the present history, once asked for

    def probabilities(self, confidence: Float[Tensor, "width each"], depth: int) -> Float[Tensor, "width each"]:
        """The chance that a child is accepted given that its parent was, in (0, 1].

        Five small kernels and no host synchronisation, so that it can be called at every level of a draft.

        Args:
            confidence: draft probability of every child; column r holds the children of rank r among their siblings.
            depth: of the children; 1 is a child of the root.
        """
        table = self._table(confidence.device)
        if table.lines is None:
            # Not waited for: pageable memory is read before the call returns.
            table.lines = self._lines().to(confidence.device, non_blocking=True)
        return table.look_up(table.lines, confidence, depth)

    def observe(
        self, depths: Sequence[int], ranks: Sequence[int], confidences: Sequence[float], accepted: Sequence[float]
    ) -> None:
        """Learn from one verify pass, all of whose nodes count as simultaneous.

        Only children of nodes that were reached: of the others nobody knows whether they would have been accepted.

        Args:
            depths: of the children; 1 is a child of the root.
            ranks: among their siblings; 0 is the best.
            confidences: draft probabilities, as `probabilities` got them.
            accepted: 1 or 0 in greedy decoding; the target's probability of the token when sampling.

        Raises:
            ValueError: the lengths differ, or a value is out of range.
        """
        if not len(depths) == len(ranks) == len(confidences) == len(accepted):
            raise ValueError(
                f"{len(depths)} depths, {len(ranks)} ranks, {len(confidences)} confidences and {len(accepted)} "
                "outcomes; expected one of each for every node"
            )
        if not depths:
            return
        chances = torch.tensor([confidences, accepted], dtype=torch.float64)
        if min(depths) < 1 or min(ranks) < 0 or not bool(((chances >= 0) & (chances <= 1)).all()):
            raise ValueError(
                "a depth below 1, a rank below 0, or a confidence or outcome outside 0..1; expected depths from 1, "
                "ranks from 0 and values from 0 to 1"
            )
        raw, outcome = chances
        bins = _bin(raw)
        cells = (torch.tensor(depths).clamp(max=DEPTHS) - 1) * RANKS + _rank_bucket(torch.tensor(ranks))
        cells = cells * BINS + bins
        slope, offset = self._lines().view(CELLS, 2)[cells].double().unbind(-1)
        self._score(raw, (offset + slope * raw).clamp(0, 1), outcome)

        counts = torch.bincount(cells, minlength=CELLS).double()
        older = 0.5 ** (counts.clamp(min=len(depths) / UNSEEN) / self.half_life)
        self._history = self._history * older + _sums(cells, raw, outcome, CELLS)
        self._fresh = None
        for table in self._tables.values():
            table.lines = None

    def error(self) -> CalibrationError:
        """How good the confidences and the calibrated chances were, over a memory `UNSEEN` times a cell's."""
        weight = float(self._bins[0, 0].sum())
        if weight == 0:
            return CalibrationError(0.0, 0.0, 0.0, 0.0, 0.0)
        raw_brier, calibrated_brier = (self._squares / weight).tolist()
        raw_error, calibrated_error = ((self._bins[:, 1] - self._bins[:, 2]).abs().sum(-1) / weight).tolist()
        return CalibrationError(raw_brier, calibrated_brier, raw_error, calibrated_error, weight)

    def to_json(self) -> dict[str, Any]:
        """Plain values; cells without history are left out."""
        used = self._history[0].nonzero()[:, 0]
        return {
            "half_life": self.half_life,
            "prior": self.prior,
            "bounds": list(BOUNDS),
            "cells": used.tolist(),
            "history": self._history[:, used].tolist(),
            "bins": self._bins.tolist(),
            "squares": self._squares.tolist(),
        }

    @staticmethod
    def from_json(fields: object) -> PathCalibration:
        """Inverse of `to_json`.

        Raises:
            DamagedDataError: it is something else, or was written for other confidence bins.
        """
        try:
            return _restore(fields)
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, OverflowError) as error:
            raise DamagedDataError(
                f"the acceptance history is damaged or of another version ({error}); delete it, and it is learnt anew"
            ) from None

    def _table(self, device: torch.device) -> _Table:
        if device not in self._tables:
            self._tables[device] = _Table(device)
        return self._tables[device]

    def _score(self, raw: Tensor, calibrated: Tensor, outcome: Tensor) -> None:
        """Keep the figures of `error`, from predictions made before `outcome` was known."""
        older = 0.5 ** (len(raw) / (self.half_life * UNSEEN))
        new = [_sums(_bin(chance), chance, outcome, BINS) for chance in (raw, calibrated)]
        self._bins = self._bins * older + torch.stack(new)
        squares = [(chance - outcome).square().sum() for chance in (raw, calibrated)]
        self._squares = self._squares * older + torch.stack(squares)

    def _lines(self) -> Tensor:
        """[depth, rank, bin, 2] float32: slope and offset of every cell's straight line."""
        if self._fresh is None:
            prior = self.prior * torch.tensor(_MIDDLES, dtype=torch.float64).repeat(CELLS // BINS)
            weight, confidences, acceptances = self._history
            total, expected, actual = weight + self.prior, confidences + prior, acceptances + prior
            shrink, lift = actual / expected, (total - actual) / (total - expected)
            over = actual <= expected
            lines = torch.stack([torch.where(over, shrink, lift), torch.where(over, 0.0, 1 - lift)], -1)
            self._fresh = lines.float().view(DEPTHS, RANKS, BINS, 2)
        return self._fresh


class _Table:
    """What looking up needs, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.lines: Tensor | None = None  # [depth, rank, bin, 2] of the present history, once asked for
        self.bounds = torch.tensor(BOUNDS, device=device)
        self.ranks = torch.empty(0, dtype=torch.int64)  # bucket of every column, for the widest call so far

    def look_up(self, lines: Tensor, confidence: Tensor, depth: int) -> Tensor:
        each = confidence.shape[-1]
        if len(self.ranks) < each:
            self.ranks = _rank_bucket(torch.arange(each)).to(confidence.device)
        exact = confidence.float().contiguous()
        bins = torch.bucketize(exact, self.bounds, right=True)  # [width, each]
        slope, offset = lines[min(depth, DEPTHS) - 1][self.ranks[:each], bins].unbind(-1)  # [width, each]
        chance = torch.addcmul(offset, slope, exact).to(confidence.dtype)
        return chance.clamp(torch.finfo(chance.dtype).tiny, 1)


def _bin(chance: Tensor) -> Tensor:
    return torch.bucketize(chance, torch.tensor(BOUNDS, dtype=chance.dtype), right=True)


def _rank_bucket(ranks: Tensor) -> Tensor:
    return torch.bucketize(ranks, torch.tensor(LAST_RANKS))


def _sums(groups: Tensor, chance: Tensor, outcome: Tensor, count: int) -> Tensor:
    """[3, count]: members of every group, the sum of their chances and of their outcomes."""
    columns = (torch.ones_like(chance), chance, outcome)
    return torch.stack([torch.bincount(groups, column, minlength=count) for column in columns])


def _restore(fields: Any) -> PathCalibration:
    """Raises whatever nonsense leads to."""
    if fields["bounds"] != list(BOUNDS):
        raise ValueError("its confidence bins are not this version's")
    restored = PathCalibration(fields["half_life"], fields["prior"])
    cells = torch.tensor(fields["cells"], dtype=torch.int64)
    history = torch.tensor(fields["history"], dtype=torch.float64).view(3, len(cells))
    bins = torch.tensor(fields["bins"], dtype=torch.float64)
    squares = torch.tensor(fields["squares"], dtype=torch.float64)
    if len(cells) and (int(cells.min()) < 0 or int(cells.max()) >= CELLS):
        raise ValueError("it names cells that do not exist")
    if bins.shape != restored._bins.shape or squares.shape != restored._squares.shape:
        raise ValueError("its error figures have another shape")
    for values in (history, bins, squares):
        if not bool(((values >= 0) & values.isfinite()).all()):
            raise ValueError("it holds negative or infinite sums")
    rounding = 1 + 1e-9
    if not bool((history[1:] <= history[0] * rounding).all()):
        raise ValueError("a cell has more acceptances or confidence than observations")
    restored._history[:, cells] = history
    restored._bins, restored._squares = bins, squares
    return restored
