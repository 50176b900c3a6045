"""The live view of a training: redrawn four times a second by a thread, from figures that training leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.text import Text

from sstf.data.progress import TrainingView
from sstf.progress_display.training import ASCII_BLOCKS, BLOCKS, SIMULATED, TrainingState, duration, pieces, table

CURVES = {"loss": "train/loss/0", "overlap": "train/overlap/0", "accepted length": SIMULATED}
GAP = "   "


class LiveTraining:
    """See `data.progress.TrainingView`. `below` gives what else is to be drawn, such as bars that run meanwhile.

    Whatever goes wrong with the terminal is not training's business, so errors end here.
    """

    def __init__(
        self,
        console: Console,
        state: TrainingState,
        below: Callable[[], RenderableType | None],
        ended: Callable[[], None],
    ) -> None:
        self._state, self._below, self._ended = state, below, ended
        self._live = Live(self, console=console, refresh_per_second=4)

    def __enter__(self) -> TrainingView:
        with suppress(Exception, SystemExit):  # rich leaves the program when a pipe is closed
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(Exception, SystemExit):
            self._live.stop()
        self._ended()

    def step(self, done: int) -> None:
        """See `data.progress.TrainingView`."""
        self._state.step(done)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """See `data.progress.TrainingView`."""
        self._state.add(step, figures)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # The terminal's last column stays empty: some break the line there.
        for line in screen(self._state, max(options.max_width - 1, 20), options.ascii_only):
            yield Text(line, no_wrap=True, overflow="crop")
        below = self._below()
        if below is not None:
            yield below


def screen(state: TrainingState, width: int, ascii_only: bool) -> list[str]:
    """The view's lines, none longer than `width`."""
    latest = dict(state.latest)  # training may add to it meanwhile
    sections = [
        [_bar(state, width, ascii_only), *_flow(pieces(state, latest), width)],
        _rows(latest, width),
        _curves(state, width, ascii_only),
    ]
    lines: list[str] = []
    for section in sections:
        if section:
            lines += ([""] if lines else []) + section
    return lines


def _bar(state: TrainingState, width: int, ascii_only: bool) -> str:
    share = state.done / state.total if state.total else 1.0
    before = f"training {state.done}/{state.total} "
    after = f" {share:.0%} {duration(state.elapsed)}, {duration(state.left)} left"
    room = max(width - len(before) - len(after), 0)
    full, empty = "#-" if ascii_only else "━─"
    filled = round(room * share)
    return (before + full * filled + empty * (room - filled) + after)[:width]


def _flow(texts: list[str], width: int) -> list[str]:
    """As many texts a line as fit."""
    lines: list[str] = []
    for text in texts:
        if lines and len(lines[-1]) + len(GAP) + len(text) <= width:
            lines[-1] += GAP + text
        else:
            lines.append(text[:width])
    return lines


def _rows(latest: Mapping[str, float], width: int) -> list[str]:
    """Figures by test-time-training step, with fewer decimals or fewer columns where it is narrow."""
    for decimals in (3, 2):
        rows = table(latest, decimals)
        if not rows:
            return []
        label = max(len("TTT step"), *(len(row) for row, _ in rows))
        column = 2 + max(len(text) for _, texts in rows for text in texts)
        columns = max(len(texts) for _, texts in rows)
        if label + column * columns <= width:
            break
    shown = min(columns, max(1, (width - label) // column))
    head = [str(i) for i in range(shown)]
    if shown < columns:
        head[-1] += "+"  # more follow that do not fit
    return [
        (name.ljust(label) + "".join(text.rjust(column) for text in texts[:shown]))[:width]
        for name, texts in [("TTT step", head), *rows]
    ]


def _curves(state: TrainingState, width: int, ascii_only: bool) -> list[str]:
    curves = {label: state.curves.get(name) for label, name in CURVES.items()}
    drawn = {label: curve for label, curve in curves.items() if curve and len(curve.points) > 1}
    label_width = max((len(label) for label in drawn), default=0)
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    return [
        f"{label.ljust(label_width)}  {curve.draw(width - label_width - 2, blocks)}"[:width]
        for label, curve in drawn.items()
    ]
