"""Which way of drafting pays at present: a bandit over named arms (tree shapes, and no speculation at all).

The reward is measured tokens a second. That of an arm is the sum of its tokens over the sum of its seconds, NOT the
mean of each pass's ratio: a pass that emits much in little time weighs no more than the seconds it saves.

Lossless: the arm is chosen before a pass drafts anything, from past passes alone, so whether a token is verified never
depends on its own sampled value, and every arm emits the target's distribution.

Sources: Thompson sampling (Thompson 1933; Russo et al., arXiv 1707.02038); discounted UCB (Garivier & Moulines,
arXiv 0805.3415). What decoding adds to them: a switch costs something, so arms are played in blocks and a challenger
has to look better by a margin; trying a loser costs the user's time, so the wait between its trials doubles up to a
bound; and machines stall, so one pass cannot condemn an arm.

It leaves to others what an arm means and how its time is measured.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from sstf.config_loading import Section
from sstf.errors import DamagedDataError

PLAIN = "plain"  # the arm without speculation

STALL = 3.0  # a pass counts as at most this multiple of its arm's mean seconds
LONGEST_WAIT = 8.0  # between two trials of a losing arm, in half-lives
PRIOR_PASSES = 4.0  # weight of the prior variance
PRIOR_VARIANCE = 0.25  # of a pass's tokens over its expected tokens: a standard deviation of half of them


class BanditConfig(Section):
    """How the choice between ways of drafting adapts.

    Attributes:
        algorithm: how the unknown is weighed: sampled from what is believed, or taken at its optimistic bound.
        half_life: passes, of whatever arm, after which an observation weighs half.
        dwell: passes on an arm between two decisions.
        margin: share by which a challenger must look better.
        seed: of Thompson sampling.
    """

    algorithm: Literal["thompson", "ucb"] = "thompson"
    half_life: float = Field(default=200.0, gt=0)
    dwell: int = Field(default=8, ge=2)
    margin: float = Field(default=0.05, ge=0)
    seed: int = 0


@dataclass
class _Arm:
    """What is known of an arm: discounted sums over its passes, and when it may be tried again."""

    weight: float = 0.0  # passes
    tokens: float = 0.0
    seconds: float = 0.0
    tokens_squared: float = 0.0
    tokens_seconds: float = 0.0
    seconds_squared: float = 0.0
    passes: float = 0.0  # never discounted
    usual: float = 0.0  # mean seconds of a pass, as last known; those of the first pass after that
    wait: float = 0.0  # passes until its next trial, when it was last left or kept
    barred_until: float = 0.0  # in passes of the bandit

    @property
    def rate(self) -> float:
        """Tokens a second; 0 without a counted pass."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def fade(self, share: float) -> None:
        self.weight *= share
        self.tokens *= share
        self.seconds *= share
        self.tokens_squared *= share
        self.tokens_seconds *= share
        self.seconds_squared *= share

    def add(self, tokens: int, seconds: float) -> None:
        self.passes += 1
        if self.usual == 0:  # the first pass: it also warms up caches and kernels, so it only tells the scale
            self.usual = seconds
            return
        seconds = min(seconds, STALL * self.usual)
        self.weight += 1
        self.tokens += tokens
        self.seconds += seconds
        self.tokens_squared += tokens**2
        self.tokens_seconds += tokens * seconds
        self.seconds_squared += seconds**2
        self.usual = self.seconds / self.weight

    def belief(self, prior_rate: float) -> _Belief:
        """What the history says of the rate, beside one pseudo-pass at `prior_rate`.

        The variance is that of a ratio of sums (delta method), so it covers the tokens and the seconds.
        """
        mean = (self.tokens + prior_rate * self.usual) / (self.seconds + self.usual)
        rate = self.rate
        residual = self.tokens_squared - 2 * rate * self.tokens_seconds + rate**2 * self.seconds_squared
        relative = max(residual, 0.0) * (self.weight / self.tokens) ** 2 if self.tokens else 0.0
        variance = (PRIOR_PASSES * PRIOR_VARIANCE + relative) / (PRIOR_PASSES + self.weight)
        return _Belief(mean, mean * math.sqrt(variance / (1 + self.weight)))


@dataclass(frozen=True)
class _Belief:
    """Of an arm's tokens a second."""

    mean: float
    deviation: float


class Bandit:
    """Chooses an arm for every pass and learns from what the pass took.

    Every `dwell` passes it decides anew. An arm that was never measured is played first. Otherwise every arm gets a
    score, and the best one takes over if its score is above the present arm's by `margin`:

    - thompson: a sample from the normal distribution that describes what is known of the arm's rate;
    - ucb: mean + deviation · sqrt(log(N) / 2), N the discounted number of passes.

    The deviation is the standard error of the arm's ratio. All sums are discounted at every pass, so an arm that is
    not played becomes uncertain again, and its mean returns to the present arm's rate (one pseudo-pass says so): after
    some half-lives any arm looks worth a trial, however badly it did. That is how drift is followed.

    What a trial of a loser costs is bounded: an arm that is left is barred for a while that doubles every time, from
    2 · `dwell` up to `LONGEST_WAIT` half-lives, and shrinks by the passes that it serves. So a clear loser takes at
    most a share of about `dwell` / (`LONGEST_WAIT` · `half_life`) of the passes. The bar is for trials: an
    arm whose mean is above the present one's by `margin` may return at once.

    A stall counts as `STALL` usual passes at most; since the usual time follows, a lasting slowdown is believed.

    Args:
        arms: names; `PLAIN` is added if it is missing. The first is played first.
        config: how to adapt.

    Raises:
        ValueError: a name appears twice.
    """

    def __init__(self, arms: Sequence[str], config: BanditConfig) -> None:
        names = [*arms] if PLAIN in arms else [*arms, PLAIN]
        if len(set(names)) < len(names):
            raise ValueError(f"arms {', '.join(names)}: a name appears twice; expected each once")
        self.config = config
        self.current = names[0]
        self.switches = 0
        self._arms = {name: _Arm() for name in names}
        self._passes = 0  # of all arms
        self._dwelt = 0  # passes of the present arm since the last decision
        self._random = random.Random(config.seed)

    @property
    def rates(self) -> dict[str, float]:
        """Tokens a second of every arm as last known; 0 where nothing is."""
        return {name: arm.rate for name, arm in self._arms.items()}

    @property
    def passes(self) -> dict[str, int]:
        """How often every arm was played, for reports."""
        return {name: int(arm.passes) for name, arm in self._arms.items()}

    def choose(self) -> str:
        """The arm of the next pass. Asking again before the pass was observed gives the same answer."""
        if self._dwelt >= self.config.dwell:
            self._dwelt = 0
            self._decide()
        return self.current

    def observe(self, arm: str, tokens: int, seconds: float) -> None:
        """Learn from a pass, also from one of another arm than was chosen.

        Args:
            arm: that was played.
            tokens: emitted, the bonus token included.
            seconds: of the whole pass: drafting, verification and host work.

        Raises:
            ValueError: an arm that does not exist, or values out of range.
        """
        if arm not in self._arms:
            raise ValueError(f"arm {arm!r} does not exist; expected one of {', '.join(self._arms)}")
        if tokens < 0 or not 0 < seconds < math.inf:
            raise ValueError(f"a pass with {tokens} tokens in {seconds} s; expected at least 0 in a positive time")
        share = 0.5 ** (1 / self.config.half_life)
        for other in self._arms.values():
            other.fade(share)
        self._arms[arm].add(tokens, seconds)
        self._passes += 1
        self._dwelt += arm == self.current

    def to_json(self) -> dict[str, Any]:
        """Plain values. The state of the random generator is not among them."""
        return {
            "current": self.current,
            "switches": self.switches,
            "passes": self._passes,
            "dwelt": self._dwelt,
            "arms": {name: asdict(arm) for name, arm in self._arms.items()},
        }

    @staticmethod
    def from_json(fields: object, arms: Sequence[str], config: BanditConfig) -> Bandit:
        """Continue from a saved state: arms that no longer exist are dropped, new ones start fresh.

        Where the arm in use no longer exists, the one with the best rate takes its place.

        Args:
            fields: what `to_json` returned.
            arms: as for a new bandit.
            config: as for a new bandit.

        Raises:
            DamagedDataError: `fields` is something else.
        """
        bandit = Bandit(arms, config)
        try:
            saved = _Saved.model_validate(fields)
            known = {name: _Arm(**sums) for name, sums in saved.arms.items()}
            if any(arm.weight > 0 and arm.usual == 0 for arm in known.values()):
                raise ValueError("an arm has passes that took no time")
        except (ValueError, TypeError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise DamagedDataError(
                f"the state of the choice between arms is damaged or of another version ({reason}); delete it, and "
                "it is learnt anew"
            ) from None
        bandit._arms.update((name, arm) for name, arm in known.items() if name in bandit._arms)
        bandit.switches, bandit._passes = saved.switches, saved.passes
        if saved.current in bandit._arms:
            bandit.current, bandit._dwelt = saved.current, saved.dwelt
        else:
            bandit.current = max(bandit.rates, key=bandit.rates.__getitem__)
        return bandit

    def _decide(self) -> None:
        incumbent = self._arms[self.current]
        for name, arm in self._arms.items():
            if arm.weight == 0:
                self._switch(name)
                return
        factor = 1 + self.config.margin
        scores = {
            name: self._score(arm.belief(incumbent.rate))
            for name, arm in self._arms.items()
            if arm is incumbent or self._passes >= arm.barred_until or arm.rate > factor * incumbent.rate
        }
        best = max(scores, key=scores.__getitem__)
        if best == self.current or scores[best] <= factor * scores[self.current]:
            incumbent.wait = max(incumbent.wait - self.config.dwell, self.config.dwell)
            return
        longest = max(LONGEST_WAIT * self.config.half_life, self.config.dwell)
        incumbent.wait = min(2 * max(incumbent.wait, self.config.dwell), longest)
        incumbent.barred_until = self._passes + incumbent.wait
        self._switch(best)

    def _score(self, belief: _Belief) -> float:
        if self.config.algorithm == "thompson":
            return self._random.gauss(belief.mean, belief.deviation)
        passes = sum(arm.weight for arm in self._arms.values())
        return belief.mean + belief.deviation * math.sqrt(math.log(max(passes, math.e)) / 2)

    def _switch(self, name: str) -> None:
        self.switches += name != self.current
        self.current = name


class _Saved(Section):
    current: str
    switches: int = Field(ge=0)
    passes: int = Field(ge=0)
    dwelt: int = Field(ge=0)
    arms: dict[str, dict[str, Annotated[float, Field(ge=0)]]]
