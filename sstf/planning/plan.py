"""A plan as data: what is printed, and what the advice is made from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sstf.planning.calibrate import Calibration
from sstf.planning.interval import Interval
from sstf.planning.known_runs import Expectation, Shape
from sstf.planning.sizes import Form, StageMemory
from sstf.planning.volume import Volume


@dataclass(frozen=True)
class Advice:
    """`error`: the run will fail, or most likely so. `warning`: it will not give what it could."""

    level: Literal["error", "warning"]
    text: str


@dataclass(frozen=True)
class DiskPart:
    """Something that the run will write. `bytes` None: unknown, as the amount of data is."""

    name: str
    bytes: Interval | None


@dataclass(frozen=True)
class StageTime:
    """A stage's work and hours. `hours` None: not measured, see `how`."""

    stage: str
    work: str
    how: str
    hours: Interval | None


@dataclass(frozen=True)
class Expected:
    """A policy of the evaluation and the accepted length to expect from it; None without a comparable run."""

    policy: str
    shape: Shape
    runs: Expectation | None


@dataclass(frozen=True)
class Plan:
    """Everything that `sstf plan` prints."""

    name: str
    target: str
    parameters: int
    method: str
    device: str
    data: Volume | None  # None for a method that is not trained
    spread: bool  # over several devices, so that none holds a stage alone
    forms: list[Form]
    form: tuple[str, str, str]  # codec, teacher, compression chosen
    usual_bytes: int  # a token: three taps and the last state in bfloat16
    online: bool
    disk: list[DiskPart]
    folder: str
    disk_free: int
    memory: list[StageMemory]
    memory_available: int
    slots_that_fit: int | None  # of regeneration in this process
    times: list[StageTime]
    expected: list[Expected]
    calibration: Calibration | None
    advice: tuple[Advice, ...] = ()

    @property
    def disk_needed(self) -> Interval | None:
        """Of all parts; None if one is unknown."""
        total = Interval.exact(0.0)
        for part in self.disk:
            if part.bytes is None:
                return None
            total = total + part.bytes
        return total

    def to_json(self) -> dict[str, Any]:
        """The same facts for machines: bytes, tokens, seconds and hours, without the texts of the calibration."""
        fields = asdict(self)
        writing = fields["calibration"] and fields["calibration"]["writing"]
        if writing:
            del writing["samples"]
        if self.data is not None:
            for name, total in (("tokens", self.data.tokens), ("trained", self.data.trained)):
                fields["data"][name] = total and asdict(total)
        fields["disk_needed"] = self.disk_needed and asdict(self.disk_needed)
        for stage, own in zip(self.memory, fields["memory"], strict=True):
            own["bytes"] = stage.bytes
        result: dict[str, Any] = json.loads(json.dumps(fields))
        return result
