"""Decoding as a random process whose best arm is known.

An arm drafts a chain of `depth` tokens, each accepted with chance `alpha` if the one before it was, and pays for it:
a pass emits 1 + (accepted tokens) and takes `PASS_S + depth * LEVEL_S` seconds, with some jitter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sstf.decode.bandit import PLAIN, Bandit

PASS_S, LEVEL_S = 0.010, 0.002
JITTER = 0.05  # standard deviation of a pass's seconds, relative


@dataclass(frozen=True)
class Arm:
    depth: int
    alpha: float

    @property
    def tokens(self) -> float:
        """Expected tokens of a pass."""
        return sum(self.alpha**i for i in range(self.depth + 1))

    @property
    def seconds(self) -> float:
        return PASS_S + self.depth * LEVEL_S

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def play(self, random: random.Random) -> tuple[int, float]:
        tokens = 1
        while tokens <= self.depth and random.random() < self.alpha:
            tokens += 1
        return tokens, self.seconds * max(0.5, random.gauss(1, JITTER))


Arms = Mapping[str, Arm]


def chains(alpha: float) -> dict[str, Arm]:
    return {PLAIN: Arm(0, 0.0), **{f"chain-{depth}": Arm(depth, alpha) for depth in (1, 2, 4, 8)}}


def best(arms: Arms) -> str:
    return max(arms, key=lambda name: arms[name].rate)


def regrets(arms: Arms, played: Sequence[str]) -> list[float]:
    """For every pass the tokens lost against the best arm in the same time, in expectation."""
    rate = max(arm.rate for arm in arms.values())
    return [rate * arms[name].seconds - arms[name].tokens for name in played]


def play(
    bandit: Bandit, arms: Arms, passes: int, seed: int, stall: Callable[[int], float] = lambda index: 1.0
) -> list[str]:
    """The arms played. `stall(index)` multiplies the seconds of a pass."""
    source = random.Random(seed)
    played = []
    for index in range(passes):
        played.append(bandit.choose())
        tokens, seconds = arms[played[-1]].play(source)
        bandit.observe(played[-1], tokens, seconds * stall(index))
    return played
