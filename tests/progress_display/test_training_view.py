"""What is written on the screen, derived by hand, at several widths; and that no terminal can end a training."""

from __future__ import annotations

import math
from io import StringIO

import pytest
from rich.console import Console

from sstf.progress_display import BarProgress, LogProgress, display
from sstf.progress_display.live import screen
from sstf.progress_display.training import (
    CURVE_POINTS,
    SIMULATED,
    Curve,
    TrainingState,
    duration,
    split_name,
)

TRAIN = {
    "lr": 9.3e-5,
    "grad_norm": 0.4321,
    "train/loss/0": 3.0,
    "train/loss/1": 3.5,
    "train/accuracy/0": 0.41,
    "train/accuracy/1": 0.22,
    "tokens_per_second": 812.4,
    "waiting_share": 0.0123,
    "memory_gib": 1.314,
    "memory_peak_gib": 1.441,
    "eta_seconds": 99.0,
}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def watched(positions: int = 2) -> TrainingState:
    """20 of 100 steps in 40 seconds; the second of two validations is the worse one."""
    clock = Clock()
    state = TrainingState(100, clock=clock)
    state.add(10, {"train/loss/0": 4.0, SIMULATED: 1.5})
    clock.now += 40
    state.step(20)
    more = {f"train/loss/{i}": 3.0 + i / 2 for i in range(positions)}
    state.add(20, TRAIN | more | {SIMULATED: 1.25, "val/tau_real": 1.4, "val/loss/0": 3.25})
    return state


# ---- state -----------------------------------------------------------------------------------------------------------


def test_a_curve_goes_from_its_lowest_value_to_its_highest() -> None:
    curve = Curve()
    for value in (4.0, math.nan, 3.0, 2.0, math.inf, 1.0):
        curve.add(value)
    # Of 8 blocks: 1, 2/3 and 1/3 of 7, and 0. At half the width the means are 3.5 and 1.5.
    assert curve.draw(10) == curve.draw(4) == "█▆▃▁" and curve.draw(2) == "█▁" and curve.draw(0) == ""


def test_a_curve_without_a_slope_is_drawn() -> None:
    curve = Curve()
    assert curve.draw(5) == ""
    for _ in range(3):
        curve.add(2.0)
    assert curve.draw(5) == "▁▁▁"


def test_a_long_curve_keeps_its_course_in_little_memory() -> None:
    curve = Curve()
    for i in range(4096):
        curve.add(float(i))
    # Merged when 512 points were there: 256 of 2, then of 4, 8 and 16 values each.
    assert len(curve.points) == CURVE_POINTS // 2 and curve.points[:2] == [7.5, 23.5] and curve.points[-1] == 4087.5


def test_time_left_is_at_the_pace_of_this_start() -> None:
    clock = Clock()
    state = TrainingState(100, done=60, clock=clock)
    assert state.left is None
    clock.now += 20
    state.step(70)
    clock.now += 1000  # a long validation is not yet known to be part of the pace
    assert state.left == 20 / 10 * 30 and state.elapsed == 1020


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (75, "1:15"), (4000, "1:06:40"), (200_000, "2 d 7:33:20"), (None, "?"), (math.inf, "?")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("train/loss/2", ("loss", 2)),
        ("val/loss/0", ("val loss", 0)),
        ("train/chain/hits/10", ("chain hits", 10)),
        ("train/3", ("train", 3)),
        ("val/tau_real", None),
        ("lr", None),
        ("7", None),
    ],
)
def test_names_by_position(name: str, row: tuple[str, int] | None) -> None:
    assert split_name(name) == row


# ---- the screen ------------------------------------------------------------------------------------------------------


def test_the_whole_screen() -> None:
    expected = """\
training 20/100 ━━━━━━━──────────────────────────── 20% 0:40, 2:40 left
812 tokens/s   waiting for data 1.2%   memory 1.31 GiB   peak 1.44 GiB
learning rate 9.30e-05   gradient norm 0.432
simulated accepted length 1.250 (step 20)   best 1.500 (step 10)
real accepted length 1.400 (step 20)   best 1.400 (step 20)

TTT step      0      1
loss      3.000  3.500
accuracy  0.410  0.220
val loss  3.250

loss             █▁
accepted length  █▁
"""
    assert "\n".join(screen(watched(), 71, ascii_only=False)) + "\n" == expected


@pytest.mark.parametrize("width", [100, 59, 39, 20])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = screen(watched(positions=7), width, ascii_only=True)
    assert max(map(len, lines)) <= width and "".join(lines).isascii()


def test_fewer_decimals_where_it_is_narrow() -> None:
    state = TrainingState(100, clock=Clock())
    state.add(1, {f"train/loss/{i}": 3.0 + i / 2 for i in range(7)})
    # Eight characters of label, "TTT step", and seven columns of 2 + 5, or 2 + 4 characters.
    assert screen(state, 57, False)[-1] == "loss      3.000  3.500  4.000  4.500  5.000  5.500  6.000"
    assert screen(state, 56, False)[-1] == "loss      3.00  3.50  4.00  4.50  5.00  5.50  6.00"


def test_positions_that_do_not_fit_are_told() -> None:
    lines = screen(watched(positions=7), 30, ascii_only=False)
    assert "TTT step     0     1    2+" in lines and "loss      3.00  3.50  4.00" in lines


def test_before_the_first_figures_and_without_a_step() -> None:
    assert screen(TrainingState(5, clock=Clock()), 50, True) == ["training 0/5 --------------------- 0% 0:00, ? left"]
    assert "100%" in screen(TrainingState(0, clock=Clock()), 50, True)[0]


def test_figures_that_are_no_numbers() -> None:
    state = TrainingState(5)
    state.add(1, {"train/loss/0": math.nan, "train/loss/1": math.inf, "lr": math.nan, SIMULATED: math.nan, "new": 12.5})
    text = "\n".join(screen(state, 79, False))
    assert "nan" in text and "inf" in text and "new 12.5" in text


def test_the_best_of_earlier_starts_counts() -> None:
    state = TrainingState(100, done=50, best=1.6, best_step=30)
    state.add(60, {SIMULATED: 1.5})
    assert "best 1.600 (step 30)" in "\n".join(screen(state, 80, False))


# ---- terminals -------------------------------------------------------------------------------------------------------


def feed(progress: BarProgress | LogProgress) -> None:
    with progress.training(2) as view:
        view.step(1)
        view.figures(1, TRAIN)
        with progress.start("validation", 3, "batches") as bar:
            bar.advance(2)
            progress.note("a note [with brackets]")
        view.step(2)
        view.figures(2, {"val/loss/0": 3.25, SIMULATED: 1.25})


def terminal(file: StringIO, term: str = "xterm", width: int = 60) -> Console:
    return Console(file=file, force_terminal=True, width=width, height=40, _environ={"TERM": term})


def test_on_a_terminal_the_view_is_redrawn_and_stays_at_the_end() -> None:
    out = StringIO()
    progress = display(terminal(out))
    assert isinstance(progress, BarProgress)
    feed(progress)
    feed(progress)  # a display can show one training after another
    text = out.getvalue()
    assert "a note [with brackets]" in text and text.rstrip().endswith("\x1b[?25h")
    last = text.split("\x1b[2K")[-1]
    assert "training 2/2" in last and "simulated accepted length 1.250 (step 2)" in last and "validation" not in last


def test_bars_are_drawn_below_a_training() -> None:
    out = StringIO()
    progress = BarProgress(terminal(out, width=140))
    with progress.training(2) as view, progress.start("validation", 3, "batches"):
        view.step(1)
        progress.note("draws the screen anew")
    text = out.getvalue()
    assert "validation" in text and "0/3" in text and "training 1/2" in text


@pytest.mark.parametrize("term", [None, "dumb", "unknown"])
def test_lines_where_nothing_can_be_redrawn(term: str | None) -> None:
    out = StringIO()
    progress = display(terminal(out, term, 200) if term else Console(file=out, width=60))
    assert isinstance(progress, LogProgress)
    feed(progress)
    assert out.getvalue() == (
        "step 1/2: loss 3.000 3.500, accuracy 0.410 0.220, 812 tokens/s, waiting for data 1.2%, memory 1.31 GiB, "
        "peak 1.44 GiB, learning rate 9.30e-05, gradient norm 0.432, 0:00 left\n"
        "a note [with brackets]\n"
        "validation: 2/3 batches 0 s done\n"
        "step 2/2: val loss 3.250, simulated accepted length 1.250 (step 2), best 1.250 (step 2), 0:00 left\n"
        "training done at step 2 after 0:00\n"
    )


def test_a_training_that_stops_says_so() -> None:
    out = StringIO()
    with pytest.raises(ValueError), display(Console(file=out)).training(9, done=4) as view:
        view.step(5)
        raise ValueError
    assert out.getvalue() == "training stopped at step 5 after 0:00\n"


class Gone(StringIO):
    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_that_goes_away_does_not_end_the_training(is_terminal: bool) -> None:
    console = terminal(Gone()) if is_terminal else Console(file=Gone())
    with display(console).training(3) as view:
        for step in (1, 2, 3):
            view.step(step)
            view.figures(step, TRAIN)
