"""The seam: what a drafting method must offer. Everything else in the project sees methods only through this.

A method without parameters implements `DraftMethod`; one that is trained implements `TrainableMethod`. To add one:
a file here, a line in `METHODS`, a test, a config, a paragraph of docs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sstf.features.spec import FeatureSpec
from sstf.targets import FrozenHead, TargetSpec
from sstf.trees import AnyTree, DraftContext
from sstf.types import DraftTree, FeatureBatch, StepOutput

WHOLE_VOCABULARY = 1 << 30  # more than any target has


@dataclass(frozen=True)
class News:
    """What one sequence emitted since its last draft.

    On the first call after `restart`, `tokens` are the prompt from its second token on, and the first emitted token.
    """

    slot: int
    tokens: list[int]
    # [seq, taps]: row j is of the position that predicted tokens[j]; taps is 0 for a method that reads none
    features: Float[Tensor, "seq taps"]


@dataclass(frozen=True)
class DraftLimits:
    """What a method can draft at all."""

    depth: int | None = None  # of the deepest node; None: no limit
    trees: bool = True  # several children of one node; else chains alone


@dataclass(frozen=True)
class ShallowRows:
    """What the target's first layers computed of some drafted tokens, and where these stand.

    Keys of a sequence lie behind those of its past: the root's at once, then the nodes' in the order in which they were
    run. A drafter that keeps its own keys at the same `places` can use the same `mask`.
    """

    states: Float[Tensor, "batch width hidden"]
    positions: Int[Tensor, "batch width"]  # in the text
    places: Int[Tensor, "batch width"]  # in the cache
    mask: Bool[Tensor, "batch width visible"]  # the past, the node's ancestors and itself


class ShallowPasses(Protocol):
    """Runs the target's first layers on drafted tokens, for methods that draft with them (`DraftMethod.shared_layers`).

    What it computes is kept: verification begins where it ended. `root`, then `descend` as often as need be, once a
    step, for sequences whose trees come from what was run.
    """

    def root(self, slots: Sequence[int], past: Sequence[int], tokens: Sequence[int]) -> ShallowRows:
        """Run the last emitted tokens.

        Args:
            slots: of the sequences.
            past: tokens of each that the target's cache holds.
            tokens: the last emitted ones, which are not among them.
        """

    def descend(self, parents: Int[Tensor, "batch width"], tokens: Int[Tensor, "batch width"]) -> ShallowRows:
        """Run children of the nodes of the previous call: `parents` are places among these, as `grow` has them."""


class Drafter(Protocol):
    """Drafts for the sequences in a fixed number of slots; holds their state (caches, histories)."""

    @property
    def levels(self) -> int:
        """Draft passes of the last `propose`."""

    def start(self, slots: int, capacity: int, passes: ShallowPasses | None = None) -> None:
        """Forget everything; make room for `slots` sequences of at most `capacity` tokens, drafted ones included.

        `passes` are there for a method that has `shared_layers`."""

    def restart(self, slot: int) -> None:
        """Forget the sequence in a slot: another takes its place."""

    def propose(self, news: Sequence[News], policy: AnyTree, context: DraftContext) -> list[DraftTree]:
        """Take in what was emitted and draft what may follow each sequence's last token.

        Args:
            news: of the sequences to draft for, each in another slot.
            policy: how much to draft.
            context: limits and experience; `context.drawing` has one generator for each of `news`.
        """


@runtime_checkable
class DraftMethod(Protocol):
    """A way to propose continuations."""

    @property
    def limits(self) -> DraftLimits:
        """What it can draft; a policy beyond it is refused before work."""

    @property
    def shared_layers(self) -> int:
        """How many of the target's first layers drafting runs, in verification's stead; 0 for a body of its own."""

    def feature_spec(self, target: TargetSpec) -> FeatureSpec:
        """Which target layers it reads. Raises ConfigError when the target lacks them."""

    def drafter(self, head: nn.Module | None, device: torch.device) -> Drafter:
        """A drafter without slots yet."""


@runtime_checkable
class TrainableMethod(DraftMethod, Protocol):
    """A method with a head to train.

    `loss_rows` is how many rows of draft logits the loss may hold at once, of all steps together; the trainer lowers it
    where memory is short.
    """

    loss_rows: int

    @property
    def draft_vocab_size(self) -> int:
        """Tokens that the head can propose; `WHOLE_VOCABULARY` for all that the target has."""

    @property
    def positions(self) -> int:
        """Draft positions that the loss teaches and reports, see `StepOutput`."""

    @property
    def unrolls(self) -> int:
        """Forward passes of the head that one loss keeps for its backward pass; memory is planned by it."""

    def build_head(self, target: TargetSpec, frozen: FrozenHead, draft_tokens: Int[Tensor, "draft_vocab"]) -> nn.Module:
        """A new head, initialised under torch's current seed."""

    def loss(self, head: nn.Module, batch: FeatureBatch, frozen: FrozenHead) -> StepOutput:
        """Summed loss and counts of one batch. Pairs that `batch.rejected` weighs are among those it learns from, and
        add a reverse KL to the loss."""
