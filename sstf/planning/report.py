"""A plan for people: tables that fit a terminal of 80 columns. What is not known says so."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sstf.planning.calibrate import Calibration
from sstf.planning.interval import Interval
from sstf.planning.plan import Plan
from sstf.planning.sizes import Form
from sstf.planning.volume import Volume

UNKNOWN = "unknown"


def print_plan(plan: Plan, out: Console) -> None:
    """Print all parts; warnings last, where they are seen."""
    parameters = f"{plan.parameters / 1e6:,.0f}M parameters"
    out.print(Text(f"{plan.name}: {plan.method} for {plan.target} ({parameters}) on {plan.device}", style="bold"))
    if plan.data is not None:
        out.print(_data(plan.data))
        out.print(_disk(plan))
        if not plan.online:
            out.print(_forms(plan))
    if plan.memory:
        out.print(_memory(plan))
    out.print(_times(plan))
    if plan.calibration is not None:
        out.print(Text(_measured(plan.calibration), style="dim"))
    if plan.expected:
        out.print(_expected(plan))
    for advice in plan.advice:
        style = "bold red" if advice.level == "error" else "yellow"
        out.print(Text.assemble((f"{advice.level}: ", style), advice.text))


def _table(title: str, *headings: str) -> Table:
    """Headings but the first stand over figures; a `<` before one keeps it to the left."""
    table = Table(title=title, title_justify="left", title_style="bold", min_width=60)
    for i, heading in enumerate(headings):
        left = i == 0 or heading.startswith("<")
        table.add_column(heading.removeprefix("<"), justify="left" if left else "right", overflow="fold")
    return table


def _data(data: Volume) -> Table:
    how = f"{data.sampled:,} conversations looked at" if data.request is None else "the target will write the requests"
    how = "done: these are its figures" if data.exact else how
    table = _table(f"Data ({how})", "", "from", "to")

    def row(name: str, figure: Interval | None, digits: int = 0) -> None:
        if figure is None:
            table.add_row(name, UNKNOWN, "")
        else:
            table.add_row(name, f"{figure.low:,.{digits}f}", f"{figure.high:,.{digits}f}")

    row("conversations", None if data.conversations is None else Interval.exact(data.conversations))
    row("tokens a conversation", data.tokens_each)
    row("trained tokens a conversation", data.trained_each)
    if data.request is not None:
        row("tokens a request", data.request)
    if data.answer is not None:
        row("tokens an answer", data.answer)
    row("tokens", data.tokens)
    row("trained tokens", data.trained)
    return table


def _disk(plan: Plan) -> Table:
    needed = plan.disk_needed
    table = _table(f"Disk still needed ({_size(plan.disk_free)} free in {plan.folder})", "", "from", "to")
    for part in plan.disk:
        table.add_row(part.name, *_bounds(part.bytes))
    table.add_section()
    table.add_row("all", *_bounds(needed))
    return table


def _bounds(figure: Interval | None) -> tuple[str, str]:
    return (UNKNOWN, "") if figure is None else (_size(figure.low), _size(figure.high))


def _forms(plan: Plan) -> Table:
    """Bytes a token of every way to store features, the chosen one marked."""
    assert plan.data is not None
    tokens = plan.data.tokens
    table = _table("Features by codec", "", "bytes a token", "of usual", "with zstd", "all, plain")
    usual, mark = plan.usual_bytes, " (chosen)" if plan.form[2] == "none" else " (chosen, zstd)"
    by_kind: dict[tuple[str, str], dict[str, Form]] = {}
    for form in plan.forms:
        by_kind.setdefault((form.codec, form.teacher), {})[form.compression] = form
    for (codec, teacher), pair in by_kind.items():
        plain, packed = pair["none"].bytes_per_token or 0.0, pair["zstd"].bytes_per_token
        chosen = (codec, teacher) == plan.form[:2]
        table.add_row(
            Text(f"{codec}, {teacher}" + (mark if chosen else "")),
            f"{plain:,.0f}",
            f"{plain / usual:.0%}",
            "not measured" if packed is None else f"{packed:,.0f}",
            UNKNOWN if tokens is None else _size(tokens.high * plain),
            style="bold" if chosen else None,
        )
    return table


def _memory(plan: Plan) -> Table:
    where = "in all" if plan.spread else f"each device; {plan.device} has {_size(plan.memory_available)}"
    table = _table(f"Memory ({where})", "", "<of which", "peak")
    for stage in plan.memory:
        largest = sorted(stage.parts, key=lambda part: -part.bytes)[:3]
        too_much = not plan.spread and stage.bytes > plan.memory_available
        table.add_row(
            stage.stage,
            Text("\n".join(f"{part.name} {_size(part.bytes)}" for part in largest)),
            Text(_size(stage.bytes), style="bold red" if too_much else ""),
        )
    return table


def _times(plan: Plan) -> Table:
    table = _table("Time, one process", "", "<work", "<measured", "hours")
    for time in plan.times:
        table.add_row(time.stage, time.work, time.how, UNKNOWN if time.hours is None else _hours(time.hours))
    known = [time.hours for time in plan.times if time.hours is not None]
    if len(known) == len(plan.times) > 1:
        table.add_section()
        table.add_row("all", "", "", _hours(sum(known, start=Interval.exact(0.0))))
    return table


def _measured(found: Calibration) -> str:
    return f"measured in {found.seconds:.0f} s, with whatever else this machine was doing"


def _expected(plan: Plan) -> Table:
    table = _table("Accepted length to expect (without n-gram branches)", "", "about", "spread", "<from")
    for one in plan.expected:
        name, runs = f"{one.policy} ({one.shape})", one.runs
        if runs is None:
            table.add_row(name, "", "", "no comparable run")
            continue
        others = " on other amounts of data" if runs.outside else ""
        source = f"{runs.runs} run{'s' if runs.runs > 1 else ''}{others}: {', '.join(runs.targets)}"
        table.add_row(name, f"{runs.value:.1f}", f"{runs.low:.2f} to {runs.high:.2f}", source)
    return table


def _size(figure: float) -> str:
    """
    >>> _size(3 * 2**29)
    '1.5 GiB'
    """
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if figure >= 2**power:
            return f"{figure / 2**power:,.1f} {unit}"
    return f"{figure:,.0f} B"


def _hours(hours: Interval) -> str:
    """
    >>> _hours(Interval(0.5, 0.5)), _hours(Interval(1.0, 12.0)), _hours(Interval(0.0, 0.01))
    ('0.50', '1.0 to 12', 'up to 0.01')
    """

    def figure(value: float) -> str:
        return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"

    low, high = figure(hours.low), figure(hours.high)
    if hours.low == 0 and hours.high > 0:
        return f"up to {high}"
    return low if low == high else f"{low} to {high}"
