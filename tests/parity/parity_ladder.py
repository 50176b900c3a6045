"""The ladder as the tests of this folder climb it: short, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sstf.data.progress import NoProgress
from sstf.parity.ladder import ParitySettings, climb
from sstf.parity.report import Parity
from sstf.targets import Target

PROMPTS, NEW = 4, 24


def climbed(head: Path, target: Target, **settings: Any) -> Parity:
    given = ParitySettings(prompts=PROMPTS, max_new_tokens=NEW, **settings)
    return climb(head, target, given, "fp32", NoProgress())
