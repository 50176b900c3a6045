from __future__ import annotations

import json
import math
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from synthetic_arms import Arm, best, chains, play, regrets

from sstf.decode.bandit import PLAIN, Bandit, BanditConfig
from sstf.errors import DamagedDataError

ALGORITHMS = ("thompson", "ucb")
SEEDS = range(5)
SETTLED = 1500  # passes after which the early trials are over

# A head that is never right: the longer its draft, the more it costs.
LOSING = chains(0.0)


def bandit_of(arms: dict[str, Arm], algorithm: str, seed: int = 0) -> Bandit:
    return Bandit(list(arms), BanditConfig(algorithm=algorithm, seed=seed))  # type: ignore[arg-type]


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_the_synthetic_process_by_hand() -> None:
    arm = Arm(depth=2, alpha=0.5)
    assert arm.tokens == 1.75  # 1 + 1/2 + 1/4
    assert arm.rate == pytest.approx(1.75 / 0.014)
    arms = {"a": arm, PLAIN: Arm(0, 0.0)}
    assert best(arms) == "a"
    assert regrets(arms, ["a", PLAIN]) == pytest.approx([0, 1.75 / 0.014 * 0.010 - 1])


def test_the_reward_is_a_ratio_of_sums() -> None:
    bandit = Bandit(["a"], BanditConfig(half_life=1e12))
    bandit.observe("a", 1, 1.0)  # the first pass only warms up
    assert bandit.rates == {"a": 0.0, PLAIN: 0.0}
    bandit.observe("a", 4, 1.0)
    bandit.observe("a", 1, 2.0)
    # Not (4/1 + 1/2) / 2 = 2.25.
    assert bandit.rates["a"] == pytest.approx(5 / 3)
    assert bandit.passes == {"a": 3, PLAIN: 0}


def test_older_passes_weigh_less() -> None:
    bandit = Bandit(["a"], BanditConfig(half_life=1))
    for tokens in (9, 4, 1):
        bandit.observe("a", tokens, 1.0)
    assert bandit.rates["a"] == pytest.approx((4 / 2 + 1) / (1 / 2 + 1))
    bandit.observe(PLAIN, 1, 1.0)  # an arm that is not played keeps its rate, with half the weight
    bandit.observe("a", 3, 1.0)
    assert bandit.rates["a"] == pytest.approx((4 / 8 + 1 / 4 + 3) / (1 / 8 + 1 / 4 + 1))


def test_a_stall_counts_as_three_passes() -> None:
    bandit = Bandit(["a"], BanditConfig(half_life=1e12))
    for seconds in (1.0, 1.0, 1.0, 50.0):
        bandit.observe("a", 2, seconds)
    assert bandit.rates["a"] == pytest.approx(6 / (1 + 1 + 3))


def test_a_first_pass_that_stalls_is_forgotten_at_once() -> None:
    bandit = Bandit(["a"], BanditConfig(half_life=1e12))
    for seconds in (50.0, 1.0, 1.0):
        bandit.observe("a", 2, seconds)
    assert bandit.rates["a"] == pytest.approx(2.0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_arm_is_measured_first_for_one_dwell(algorithm: str) -> None:
    bandit = Bandit(["a", "b"], BanditConfig(algorithm=algorithm, dwell=3))  # type: ignore[arg-type]
    played = []
    for _ in range(9):
        assert bandit.choose() == bandit.choose()  # asking decides nothing
        played.append(bandit.choose())
        bandit.observe(played[-1], 1, 1.0)
    assert played == ["a"] * 3 + ["b"] * 3 + [PLAIN] * 3
    assert bandit.switches == 2


def test_the_optimistic_score_by_hand() -> None:
    """Two arms of 8 passes (7 counted), hardly any forgetting, no noise: 2 tokens a second and 1."""
    bandit = Bandit(["a"], BanditConfig(algorithm="ucb", half_life=1e12, dwell=8))
    for arm, tokens in (("a", 2), (PLAIN, 1)):
        for _ in range(8):
            assert bandit.choose() == arm
            bandit.observe(arm, tokens, 1.0)
    incumbent = bandit._arms[PLAIN].belief(1.0)
    challenger = bandit._arms["a"].belief(1.0)
    # Variance: 4 pseudo-passes of 0.25 among 4 + 7, then 1 + 7 passes to average over.
    share = math.sqrt(4 * 0.25 / 11 / 8)
    assert (incumbent.mean, incumbent.deviation) == pytest.approx((1.0, share))
    assert (challenger.mean, challenger.deviation) == pytest.approx((15 / 8, 15 / 8 * share))
    assert bandit._score(incumbent) == pytest.approx(1 + share * math.sqrt(math.log(14) / 2))
    assert bandit.choose() == "a"


def test_the_variance_is_that_of_the_ratio() -> None:
    """Tokens that grow with the seconds are no noise; tokens that do not, are."""
    steady, noisy = Bandit(["a"], BanditConfig(half_life=1e12)), Bandit(["a"], BanditConfig(half_life=1e12))
    for bandit, fast, slow in ((steady, (2, 1.0), (4, 2.0)), (noisy, (2, 2.0), (4, 1.0))):
        for tokens, seconds in ((3, 1.5), fast, slow):
            bandit.observe("a", tokens, seconds)
    # Residuals of 2 tokens a second over 2 passes: (2 - 4)² + (4 - 2)² = 8 for the noisy one, in units of 3² tokens.
    assert steady._arms["a"].belief(2.0).deviation == pytest.approx(2 * math.sqrt(1 / 6 / 3))
    assert noisy._arms["a"].belief(2.0).deviation == pytest.approx(2 * math.sqrt((1 + 8 / 9) / 6 / 3))


# ---- the synthetic process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("alpha", (0.0, 0.3, 0.5, 0.7, 0.9))
def test_regret_falls(algorithm: str, alpha: float) -> None:
    """Plain decoding is best for 0.0; chains of 1, 1 or 2 (alike), 2 or 4 (alike) and 8 are for the others."""
    arms = chains(alpha)
    uniform = mean(regrets(arms, list(arms)))
    early, late, lost = [], [], []
    for seed in SEEDS:
        found = regrets(arms, play(bandit_of(arms, algorithm, seed), arms, 4500, seed))
        early.append(mean(found[:50]))
        late.append(mean(found[3000:]))
        lost.append(mean(found[3000:]) / arms[best(arms)].tokens)
    assert mean(late) < 0.25 * uniform
    assert mean(late) < 0.3 * mean(early)
    assert max(lost) < 0.06
    # Better than any fixed arm that is not within the margin of the best one.
    rates = {name: arm.rate / arms[best(arms)].rate for name, arm in arms.items()}
    for name in (name for name, rate in rates.items() if rate < 0.9):
        assert mean(late) < 0.5 * regrets(arms, [name])[0]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("seed", SEEDS)
def test_falls_back_to_plain_and_returns(algorithm: str, seed: int) -> None:
    bandit = bandit_of(LOSING, algorithm, seed)
    settled = play(bandit, LOSING, SETTLED + 2000, seed)[SETTLED:]
    assert settled.count(PLAIN) > 0.9 * len(settled)

    winning = chains(0.8)
    after = play(bandit, winning, 3000, seed + 100)
    assert after[2000:].count(PLAIN) < 0.05 * 1000
    assert mean(regrets(winning, after[2000:])) < 0.1 * winning[best(winning)].tokens


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("before, after", ((0.9, 0.0), (0.9, 0.4), (0.1, 0.9)))
def test_drift_is_followed(algorithm: str, before: float, after: float) -> None:
    """Within 1000 passes (5 half-lives) on average it loses less than a tenth against the new best arm."""
    old, new = chains(before), chains(after)
    assert best(old) != best(new)
    passes = []
    for seed in SEEDS:
        bandit = bandit_of(old, algorithm, seed)
        play(bandit, old, 2000, seed)
        lost = regrets(new, play(bandit, new, 3000, seed + 100))
        starts = range(0, 2800, 8)
        passes.append(next(i for i in starts if mean(lost[i : i + 200]) < 0.1 * new[best(new)].tokens))
    assert mean(passes) < 1000 and max(passes) < 2000


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_does_not_thrash(algorithm: str) -> None:
    """Arms that are all the same: nothing is to be gained, and hardly a decision in five changes the arm."""
    arms = {name: Arm(2, 0.6) for name in ("a", "b", "c")} | {PLAIN: Arm(2, 0.6)}
    for seed in SEEDS:
        bandit = bandit_of(arms, algorithm, seed)
        play(bandit, arms, 4000, seed)
        assert 3 <= bandit.switches <= 4000 / 8 / 5


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_trials_of_clear_losers_are_rare_and_never_cease(algorithm: str) -> None:
    """Within the bound that the class states: a dwell of 8 in every 8 half-lives for each of 4 losers, about 2 %."""
    for seed in SEEDS:
        bandit = bandit_of(LOSING, algorithm, seed)
        played = play(bandit, LOSING, 10000, seed)[5000:]
        for name in LOSING:
            assert played.count(name) >= 8
        assert len(played) - played.count(PLAIN) < 0.05 * len(played)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_stall_does_not_flip_it(algorithm: str, seed: int) -> None:
    """One pass of 50 times its seconds, in the middle of an arm's reign, on two arms that differ by 28 %."""
    arms = {"chain": Arm(4, 0.6), PLAIN: Arm(0, 0.0)}
    assert arms["chain"].rate / arms[PLAIN].rate == pytest.approx(1.28, abs=0.01)
    calm, stalled = (bandit_of(arms, algorithm, seed) for _ in range(2))
    without = play(calm, arms, 700, seed)
    played = play(stalled, arms, 700, seed, stall=lambda index: 50.0 if index == 500 else 1.0)
    assert played[:501] == without[:501]
    assert played[500:].count("chain") >= without[500:].count("chain") - 16  # two dwells
    assert played[500:].count("chain") > 0.85 * 200


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_stalls_all_the_time_leave_the_best_arm(algorithm: str) -> None:
    arms = chains(0.8)
    late = []
    for seed in SEEDS:
        played = play(bandit_of(arms, algorithm, seed), arms, 4000, seed, stall=lambda i: 50.0 if i % 97 == 0 else 1.0)
        late.append(mean(regrets(arms, played[2500:])))
    assert mean(late) < 0.05 * arms[best(arms)].tokens


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("factor", (5.0, 0.2))
def test_a_machine_that_changes_speed_for_good(algorithm: str, factor: float) -> None:
    arms = chains(0.8)
    late = []
    for seed in SEEDS:
        stall = lambda i: factor if i >= 1500 else 1.0  # noqa: E731
        played = play(bandit_of(arms, algorithm, seed), arms, 4000, seed, stall)
        late.append(mean(regrets(arms, played[3000:])))
    assert mean(late) < 0.1 * arms[best(arms)].tokens


# ---- invariants ------------------------------------------------------------------------------------------------------

passes = st.lists(st.tuples(st.integers(0, 9), st.floats(1e-6, 1e3)), max_size=120)


@settings(max_examples=60, deadline=None)
@given(
    passes=passes,
    algorithm=st.sampled_from(ALGORITHMS),
    dwell=st.integers(2, 9),
    half_life=st.floats(0.5, 1e6),
    margin=st.floats(0, 3),
)
def test_holds_for_any_history(
    passes: list[tuple[int, float]], algorithm: str, dwell: int, half_life: float, margin: float
) -> None:
    config = BanditConfig(algorithm=algorithm, dwell=dwell, half_life=half_life, margin=margin)  # type: ignore[arg-type]
    bandit, twin = Bandit(["a", "b"], config), Bandit(["a", "b"], config)
    played = []
    for tokens, seconds in passes:
        played.append(bandit.choose())
        assert played[-1] == twin.choose()  # deterministic
        bandit.observe(played[-1], tokens, seconds)
        twin.observe(played[-1], tokens, seconds)
    changes = [i for i in range(1, len(played)) if played[i] != played[i - 1]]
    assert len(changes) == bandit.switches
    assert all(later - earlier >= dwell for earlier, later in zip([0, *changes], changes, strict=False))
    assert sum(bandit.passes.values()) == len(passes)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_another_arm_than_the_chosen_one_may_be_observed(algorithm: str) -> None:
    """The last token of a generation leaves no room for a draft, whatever was chosen."""
    bandit = Bandit(["a"], BanditConfig(algorithm=algorithm, dwell=2))  # type: ignore[arg-type]
    for _ in range(5):
        assert bandit.choose() == "a"
        bandit.observe(PLAIN, 1, 1.0)
    assert bandit.passes == {"a": 0, PLAIN: 5}


# ---- saving ----------------------------------------------------------------------------------------------------------


def through_json(bandit: Bandit) -> object:
    return json.loads(json.dumps(bandit.to_json()))


def test_a_round_trip_continues_the_choice() -> None:
    arms = chains(0.8)
    bandit = bandit_of(arms, "ucb")
    play(bandit, arms, 803, seed=1)
    again = Bandit.from_json(through_json(bandit), list(arms), bandit.config)
    assert again.to_json() == bandit.to_json()
    assert play(again, arms, 500, seed=2) == play(bandit, arms, 500, seed=2)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_round_trip_keeps_what_thompson_knows(seed: int) -> None:
    bandit = bandit_of(LOSING, "thompson", seed)
    play(bandit, LOSING, SETTLED, seed)
    again = Bandit.from_json(through_json(bandit), list(LOSING), bandit.config)
    assert again.choose() == bandit.choose()
    assert again.rates == bandit.rates
    assert play(again, LOSING, 400, seed).count(PLAIN) > 0.8 * 400


def test_arms_come_and_go() -> None:
    arms = chains(0.8)
    bandit = bandit_of(arms, "ucb")
    play(bandit, arms, 400, seed=1)
    kept = [name for name in arms if name != bandit.current]
    again = Bandit.from_json(through_json(bandit), [*kept, "new"], bandit.config)
    assert set(again.rates) == {*kept, "new"}
    assert again.current == max(kept, key=bandit.rates.__getitem__)
    assert again.rates["new"] == 0
    with_new = arms | {"new": Arm(8, 0.99)}
    with_new.pop(bandit.current)
    assert "new" in play(again, with_new, 24, seed=2)


GOOD = Bandit(["a"], BanditConfig()).to_json()


@pytest.mark.parametrize(
    "nonsense",
    [
        None,
        [],
        "plain",
        {},
        GOOD | {"extra": 1},
        GOOD | {"passes": -1},
        GOOD | {"current": 3},
        GOOD | {"arms": []},
        GOOD | {"arms": {"a": {"colour": 1.0}}},
        GOOD | {"arms": {"a": {"tokens": -1.0}}},
        GOOD | {"arms": {"a": {"tokens": math.nan}}},
        GOOD | {"arms": {"a": {"tokens": "many"}}},
        GOOD | {"arms": {"a": {"weight": 1.0}}},
    ],
)
def test_nonsense_is_refused(nonsense: object) -> None:
    with pytest.raises(DamagedDataError, match=r"the state of the choice between arms is damaged .*; delete it"):
        Bandit.from_json(nonsense, ["a"], BanditConfig())


def test_bad_use_is_refused() -> None:
    with pytest.raises(ValueError, match="appears twice"):
        Bandit(["a", "a"], BanditConfig())
    bandit = Bandit([PLAIN, "a"], BanditConfig())
    assert list(bandit.rates) == [PLAIN, "a"]
    for arm, tokens, seconds in (("b", 1, 1.0), ("a", -1, 1.0), ("a", 1, 0.0), ("a", 1, math.nan), ("a", 1, math.inf)):
        with pytest.raises(ValueError, match="expected"):
            bandit.observe(arm, tokens, seconds)
    for changes in ({"dwell": 1}, {"half_life": 0.0}, {"margin": -0.1}, {"algorithm": "greedy"}):
        with pytest.raises(ValidationError):
            BanditConfig(**changes)  # type: ignore[arg-type]
