"""Configuration of the evaluation stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from sstf.config_loading import Section
from sstf.decode import DecodePolicy
from sstf.evaluation.suites import NAMED
from sstf.trees import Chain, DynamicTree

PLAIN, NGRAM = "plain", "ngram"  # the free baselines, measured beside every head


class EvalConfig(Section):
    """`suite` is a name of `suites.NAMED` or a JSONL file; `prompts` takes its first ones, spread over the categories,
    or over those that `categories` names.

    Every prompt is decoded by every arm in turn (A B A B), `repeats` times. `batches` are the batch sizes at which the
    cost of passes is measured for the report's figure of speedup against depth.
    """

    suite: str = "builtin"
    prompts: int | None = Field(default=None, ge=1)
    categories: tuple[str, ...] = ()
    max_new_tokens: int = Field(default=128, ge=2)
    temperatures: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (0.0, 1.0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    repeats: int = Field(default=3, ge=1)
    policies: dict[str, DecodePolicy] = {
        "chain": Chain(depth=3),
        "tree": DynamicTree(depth=4, top_k=4, total_tokens=12),
    }
    ngram_depth: int = Field(default=4, ge=1)
    batches: tuple[Annotated[int, Field(ge=1, le=256)], ...] = (1,)

    @model_validator(mode="after")
    def _usable(self) -> EvalConfig:
        if not self.policies:
            raise ValueError("policies is empty; name at least one tree policy, such as chain: {kind: chain, depth: 3}")
        taken = {PLAIN, NGRAM} & set(self.policies)
        if taken:
            raise ValueError(f"policies may not be named {sorted(taken)}: those rows are the baselines")
        if self.suite not in NAMED and not Path(self.suite).is_file():
            raise ValueError(f"suite is {self.suite!r}, expected {', '.join(NAMED)} or an existing JSONL file")
        return self
