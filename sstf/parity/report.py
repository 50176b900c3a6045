"""What a climb found: one row a rung, as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sstf.errors import ParityError


@dataclass(frozen=True)
class Rung:
    """One form of the head. Differences, errors and agreement are from the rung that `against` names.

    `accepted_length` is micro averaged, the bonus token included. The trainer's is replayed from its drafts along the
    target's greedy answers; the others decode for themselves, greedily, the same prompts, chains of the same depth.
    """

    name: str
    against: str
    faults: tuple[str, ...] = ()  # why it fails, in sentences
    accepted_length: float | None = None
    interval: tuple[float, float] | None = None  # 95 %, over prompts
    first_difference: str | None = None  # the first tensor that is not that of the rung before
    maximum_difference: float | None = None  # of that tensor
    logits_max: float | None = None
    logits_mean: float | None = None
    agreement: float | None = None  # share of drafted tokens that are the same
    same_text: float | None = None  # share of answers that are the plain target's; near ties may differ

    @property
    def verdict(self) -> Literal["pass", "fail"]:
        """Whether the rung holds."""
        return "fail" if self.faults else "pass"


@dataclass(frozen=True)
class Parity:
    """The whole ladder."""

    depth: int
    prompts: int
    max_new_tokens: int
    rungs: tuple[Rung, ...]

    @property
    def passed(self) -> bool:
        """Whether every rung holds."""
        return all(rung.verdict == "pass" for rung in self.rungs)

    @property
    def faults(self) -> list[str]:
        """Every reason to fail, with the name of its rung, from the lowest rung up."""
        return [f"{rung.name}: {fault}" for rung in self.rungs for fault in rung.faults]

    @property
    def sentence(self) -> str:
        """The verdict and the accepted lengths in one line."""
        lengths = ", ".join(
            f"{rung.name} {rung.accepted_length:.2f}" for rung in self.rungs if rung.accepted_length is not None
        )
        return f"parity: {'passed' if self.passed else 'FAILED'}; accepted length {lengths}"

    def require(self) -> None:
        """Raises ParityError if a rung does not hold."""
        if not self.passed:
            raise ParityError(
                f"the head does not behave as it was trained to: {self.faults[0]}; `sstf parity` shows every rung"
            )

    def to_json(self) -> dict[str, Any]:
        """For files and scripts."""
        rungs = [{"name": rung.name, "verdict": rung.verdict} | asdict(rung) for rung in self.rungs]
        return asdict(self) | {"verdict": "pass" if self.passed else "fail", "rungs": rungs}

    def print(self, out: Console) -> None:
        """The table, and what is wrong below it."""
        table = Table(
            title=f"{self.prompts} prompts, greedy, chains of {self.depth}, {self.max_new_tokens} tokens at most",
            title_justify="left",
        )
        for heading in ("rung", "verdict", "accepted", "95 %", "logits off", "max", "drafts", "texts"):
            table.add_column(heading, justify="left" if heading in ("rung", "verdict") else "right")
        for rung in self.rungs:
            low_high = "" if rung.interval is None else f"{rung.interval[0]:.2f}-{rung.interval[1]:.2f}"
            table.add_row(
                rung.name,
                Text(rung.verdict, style="green" if rung.verdict == "pass" else "bold red"),
                "" if rung.accepted_length is None else f"{rung.accepted_length:.3f}",
                low_high,
                "" if rung.logits_mean is None else f"{rung.logits_mean:.2g}",
                "" if rung.logits_max is None else f"{rung.logits_max:.2g}",
                "" if rung.agreement is None else f"{rung.agreement:.1%}",
                "" if rung.same_text is None else f"{rung.same_text:.0%}",
            )
        out.print(table)
        for fault in self.faults:
            out.print(Text(fault), soft_wrap=True)
