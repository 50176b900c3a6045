"""How a decoder decides what to draft, from what it has seen so far.

| policy | decides |
|---|---|
| a tree policy | nothing: fixed |
| `calibrated: true`, `cost_aware` | which nodes, by their observed acceptance and the measured cost of a pass |
| `BanditPolicy` | which of several tree policies, or plain decoding, by measured tokens per second |

Every decision is taken before drafting and from past passes alone, so the text stays the target's own: whether a token
is verified never depends on that token's drawn value.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from sstf.data.atomic import write_json_atomic
from sstf.decode.bandit import PLAIN, Bandit, BanditConfig
from sstf.decode.cost import CostModel
from sstf.errors import DamagedDataError
from sstf.trees import AnyTree, Chain, CostAwareTree, DynamicTree, StaticTree, TreePolicy
from sstf.trees.calibration import PathCalibration

FORMAT = 1


class BanditPolicy(BanditConfig):
    """Several tree policies; the one that gives most tokens per second is used most. Plain decoding is always among
    them, so it is what remains where speculation does not pay."""

    kind: Literal["bandit"] = "bandit"
    arms: dict[str, TreePolicy] = Field(min_length=1)

    @field_validator("arms")
    @classmethod
    def _plain_is_taken(cls, arms: dict[str, TreePolicy]) -> dict[str, TreePolicy]:
        if PLAIN in arms:
            raise ValueError(f"an arm is named {PLAIN}, which stands for decoding without speculation; rename it")
        return arms

    @property
    def depth(self) -> int:
        """Of the deepest arm."""
        return max(arm.depth for arm in self.arms.values())


DecodePolicy = Annotated[Chain | StaticTree | DynamicTree | CostAwareTree | BanditPolicy, Field(discriminator="kind")]
AnyPolicy = Chain | StaticTree | DynamicTree | CostAwareTree | BanditPolicy


def tree_policies(policy: AnyPolicy) -> list[AnyTree]:
    """The tree policies that may be used."""
    return list(policy.arms.values()) if isinstance(policy, BanditPolicy) else [policy]


class Experience:
    """What decoding has taught so far. Costs and rates belong to a machine and to a number of sequences at once."""

    def __init__(self) -> None:
        self.calibration = PathCalibration()
        self.costs: dict[int, CostModel] = {}  # by batch size
        self._bandits: dict[int, Bandit] = {}
        self._saved_bandits: dict[int, Any] = {}

    def bandit(self, policy: BanditPolicy, batch: int) -> Bandit:
        """The bandit over the policy's arms at a batch size, continued where it was saved."""
        found = self._bandits.get(batch)
        if found is None or found.config != policy:
            saved = found.to_json() if found else self._saved_bandits.pop(batch, None)
            arms = list(policy.arms)
            found = Bandit.from_json(saved, arms, policy) if saved is not None else Bandit(arms, policy)
            self._bandits[batch] = found
        return found

    def save(self, path: str | Path) -> None:
        """Write as JSON, all or nothing."""
        bandits = self._saved_bandits | {batch: bandit.to_json() for batch, bandit in self._bandits.items()}
        write_json_atomic(
            Path(path),
            {
                "format": FORMAT,
                "calibration": self.calibration.to_json(),
                "costs": {str(batch): cost.to_json() for batch, cost in self.costs.items()},
                "bandits": {str(batch): fields for batch, fields in bandits.items()},
            },
        )

    @staticmethod
    def load(path: str | Path) -> Experience:
        """Inverse of `save`.

        Raises:
            DamagedDataError: the file cannot be read, or holds something else.
        """
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            if fields["format"] != FORMAT:
                raise ValueError(f"format {fields['format']}, this version reads {FORMAT}")
            loaded = Experience()
            loaded.calibration = PathCalibration.from_json(fields["calibration"])
            loaded.costs = {int(batch): CostModel.from_json(cost) for batch, cost in fields["costs"].items()}
            loaded._saved_bandits = {int(batch): bandit for batch, bandit in fields["bandits"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, DamagedDataError) as error:
            raise DamagedDataError(f"{path}: what decoding learned cannot be read ({error}); delete it") from None
        return loaded
