"""The learning rate over a run: numbers by hand, and the extremes."""

from __future__ import annotations

import doctest
import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sstf.config_loading import Section, dump, load
from sstf.errors import ConfigError
from sstf.train import schedule
from sstf.train.schedule import ScheduleConfig, factor


class Root(Section):
    schedule: ScheduleConfig


def read(tmp_path: Path, text: str) -> ScheduleConfig:
    path = tmp_path / "run.yaml"
    path.write_text(f"schedule: {text}", encoding="utf-8")
    return load(Root, path).schedule


def curve(steps: int, **settings: object) -> list[float]:
    config = ScheduleConfig.model_validate(settings)
    return [factor(config, step, steps) for step in range(steps)]


def test_examples() -> None:
    result = doctest.testmod(schedule)
    assert result.attempted > 0 and result.failed == 0


def test_cosine_with_warm_up() -> None:
    half = math.sqrt(0.5)  # cos(45 degrees)
    assert curve(8, warmup_steps=4) == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, 1.0, (1 + half) / 2, 0.5, (1 - half) / 2], abs=1e-15
    )


def test_final_share() -> None:
    # 0.2 + 0.8 * cosine, and the cosine's four steps are at 0, 45, 90 and 135 degrees; before them one of warm-up.
    half = math.sqrt(0.5)
    assert curve(5, warmup_share=0, final=0.2) == pytest.approx(
        [1.0, 1.0, 0.2 + 0.4 * (1 + half), 0.6, 0.2 + 0.4 * (1 - half)], abs=1e-15
    )
    assert curve(5, kind="linear", warmup_share=0, final=0.2) == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.4], abs=1e-15)


def test_constant() -> None:
    assert curve(6, kind="constant", warmup_share=0.5) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1], abs=1e-15)


@pytest.mark.parametrize(
    ("decay", "last_four"), [("linear", [1.0, 0.75, 0.5, 0.25]), ("sqrt", [1.0, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5])]
)
def test_warm_up_stable_decay(decay: str, last_four: list[float]) -> None:
    got = curve(10, kind="wsd", warmup_steps=2, decay_share=0.4, decay=decay)
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1, *last_four], abs=1e-15)


def test_the_default_is_what_the_trainer_always_did() -> None:
    """Linear over max(1, round(steps * share)) steps, then a cosine to 0."""

    def before(step: int, steps: int, peak: float, warmup_share: float) -> float:
        warmup = max(1, round(steps * warmup_share))
        if step < warmup:
            return peak * (step + 1) / warmup
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    for steps in (1, 2, 7, 67, 433):
        for share in (0.0, 0.015, 0.25, 1.0):
            config = ScheduleConfig(warmup_share=share)
            for step in range(steps):
                # One rounding apart: (peak * n) / warm-up became peak * (n / warm-up).
                assert 1e-3 * factor(config, step, steps) == pytest.approx(before(step, steps, 1e-3, share), rel=3e-16)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"warmup_share": 1.0}, [0.25, 0.5, 0.75, 1.0]),
        ({"kind": "wsd", "warmup_share": 0.0, "decay_share": 1.0}, [1.0, 1.0, 2 / 3, 1 / 3]),  # warm-up comes first
        ({"kind": "wsd", "warmup_share": 1.0, "decay_share": 1.0}, [0.25, 0.5, 0.75, 1.0]),
        ({"kind": "wsd", "warmup_share": 0.0, "decay_share": 0.01}, [1.0, 1.0, 1.0, 1.0]),  # rounds to no step
    ],
)
def test_extremes(settings: dict[str, object], expected: list[float]) -> None:
    assert curve(4, **settings) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_a_run_of_one_step_is_at_the_peak(kind: str) -> None:
    assert curve(1, kind=kind) == [1.0]
    assert curve(1, kind=kind, warmup_share=1.0) == [1.0]


@given(
    st.sampled_from(["cosine", "linear", "wsd"]),
    st.integers(1, 300),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0.001, 1),
    st.sampled_from(["linear", "sqrt"]),
)
def test_rises_to_the_peak_then_falls_to_the_final_share(
    kind: str, steps: int, warmup: float, final: float, decay_share: float, decay: str
) -> None:
    wsd = {"decay_share": decay_share, "decay": decay} if kind == "wsd" else {}
    got = curve(steps, kind=kind, warmup_share=warmup, final=final, **wsd)
    top = got.index(1.0)
    assert all(low < high for low, high in pairwise(got[: top + 1]))
    assert all(high >= low for high, low in pairwise(got[top:]))
    assert all(0 < share <= 1 for share in got)
    assert all(share >= final - 1e-12 for share in got[top:])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{kind: cosin}", "schedule.kind: expected 'cosine', 'linear', 'constant' or 'wsd', found \"cosin\""),
        ("{warmup_share: 1.5}", "schedule.warmup_share: expected a number of at most 1"),
        ("{warmup_steps: 0}", "schedule.warmup_steps: expected a number of at least 1"),
        ("{kind: wsd, decay_share: 0}", "schedule.decay_share: expected a number above 0"),
        ("{decay_share: 0.2}", "schedule: decay_share is read by wsd but kind is cosine; remove it"),
        ("{kind: constant, final: 0.1}", "schedule: final is read by cosine, linear, wsd but kind is constant"),
    ],
)
def test_errors(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_warm_up_longer_than_the_run() -> None:
    with pytest.raises(ConfigError, match=r"warmup_steps is 500 but the run has 433 steps; lower it"):
        factor(ScheduleConfig(warmup_steps=500), 0, 433)


def test_reads_back_what_it_writes(tmp_path: Path) -> None:
    for text in ("{}", "{kind: constant, warmup_steps: 5}", "{kind: wsd, decay_share: 0.2, decay: sqrt}"):
        config = read(tmp_path, text)
        assert read(tmp_path, "\n  " + dump(config).replace("\n", "\n  ")) == config
