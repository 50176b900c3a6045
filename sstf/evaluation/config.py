"""Configuration of the evaluation stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from sstf.config_loading import Section
from sstf.decode import DecodePolicy
from sstf.trees import Chain, DynamicTree

PLAIN, NGRAM = "plain", "ngram"  # the free baselines, measured beside every head


class EvalConfig(Section):
    """`suite` is `builtin` or a JSONL file; `prompts` takes its first ones, which are spread over the categories.

    Every prompt is decoded by every arm in turn (A B A B), `repeats` times.
    """

    suite: str = "builtin"
    prompts: int | None = Field(default=None, ge=1)
    max_new_tokens: int = Field(default=128, ge=2)
    temperatures: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (0.0,)
    top_p: float = Field(default=1.0, gt=0, le=1)
    repeats: int = Field(default=3, ge=1)
    policies: dict[str, DecodePolicy] = {
        "chain": Chain(depth=3),
        "tree": DynamicTree(depth=4, top_k=4, total_tokens=12),
    }
    ngram_depth: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _usable(self) -> EvalConfig:
        if not self.policies:
            raise ValueError("policies is empty; name at least one tree policy, such as chain: {kind: chain, depth: 3}")
        taken = {PLAIN, NGRAM} & set(self.policies)
        if taken:
            raise ValueError(f"policies may not be named {sorted(taken)}: those rows are the baselines")
        if self.suite != "builtin" and not Path(self.suite).is_file():
            raise ValueError(f"suite is {self.suite!r}, expected builtin or an existing JSONL file")
        return self
