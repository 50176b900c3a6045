"""Configuration of the evaluation stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from sstf.config_loading import Section
from sstf.decode import DecodePolicy, refuse_beyond, within
from sstf.evaluation.suites import NAMED
from sstf.methods.base import DraftLimits
from sstf.trees import Chain, DynamicTree

PLAIN, NGRAM = "plain", "ngram"  # the free baselines, measured beside every head


class EvalConfig(Section):
    """`suite` is a name of `suites.NAMED` or a JSONL file; `prompts` takes its first ones, spread over the categories,
    or over those that `categories` names. Answers have `max_new_tokens` tokens at most. `temperatures`
    are measured one after the other. `policies` are the ways to draft that are compared, by name.

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
        if self.suite not in NAMED and not _is_file(self.suite):
            raise ValueError(f"suite is {self.suite!r}, expected {', '.join(NAMED)} or an existing JSONL file")
        return self

    def fitted(self, limits: DraftLimits, drafter: str) -> EvalConfig:
        """With policies that a method can draft: the default ones are cut, and trees left out where it drafts chains.

        Raises:
            ConfigError: a policy that was set asks for more, see `refuse_beyond`.
        """
        if "policies" in self.model_fields_set:
            for name, policy in self.policies.items():
                refuse_beyond(limits, policy, drafter, f"eval.policies.{name}")
            return self
        kept: dict[str, DecodePolicy] = {}
        for name, policy in self.policies.items():
            if type(cut := within(limits, policy)) is type(policy):
                kept[name] = cut
        return self if kept == self.policies else self.model_copy(update={"policies": kept})


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # longer than names may be
        return False
