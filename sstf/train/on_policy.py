"""On-policy distillation (Draft-OPD, arXiv 2605.29343): the trained head drafts, the target verifies, and the head is
trained further on what came of it, most of all where its drafts were rejected.

A round lets the present head decode, with the decoder that is published, from the prompts of the conversations that it
was trained on. What is emitted is the target's own text (greedy, or drawn at `temperature`); where drafts were rejected
is kept beside it. Training then replays these texts: the method's own loss on the answer, and besides it

    weight * decay^(i - r) * KL(draft || target)    at draft positions i >= r of a pass whose draft r was rejected

(`features/replay.py` has the alignment, `losses/objectives.py` the arithmetic). A pair (position, row) is taught where
the method can teach it at all: within the text, with a teacher whose best token the draft vocabulary holds. Methods
that train on some rows only take those with a rejected draft first.

Rollouts are one process's work. A round writes them once, whole, so that a training that goes on reads the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from sstf.config_loading import Section
from sstf.data.progress import Progress as Bars
from sstf.data.tokens import TokenStore
from sstf.decode import SpeculativeDecoder, Step
from sstf.errors import DamagedDataError, DataError
from sstf.features import Anchor, FeatureSource, prompt_of
from sstf.features.sealed import read_sealed, write_sealed
from sstf.methods.checkpoint import DraftHead
from sstf.targets import Target
from sstf.train.config import TrainConfig
from sstf.trees import Chain
from sstf.types import SamplingParams, TokenSample

ANCHORS = "anchors.json"


class OnPolicyConfig(Section):
    """`rounds` of rollouts, each from the prompts of so many `conversations` (or of all, where there are fewer), and of
    `steps` optimiser steps on them.

    Rollouts: up to `max_new_tokens` at `temperature` (0 is greedy), drafted for by chains of `depth` tokens; None takes
    as many as the method is taught. `slots` are decoded at once. Loss: `weight` is that of the reverse KL at the first
    rejected draft, falling by `decay` with each draft behind it. The optimiser is that of `train`, with
    `learning_rate_factor` times its learning rate.
    """

    rounds: int = Field(default=1, ge=1)
    conversations: int = Field(default=256, ge=1)
    max_new_tokens: int = Field(default=256, ge=2)
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    depth: int | None = Field(default=None, ge=1)
    slots: int = Field(default=8, ge=1)
    decay: float = Field(default=0.8, gt=0, le=1)
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    steps: int = Field(default=200, ge=1)
    learning_rate_factor: float = Field(default=0.3, gt=0, le=10)

    def training(self, before: TrainConfig, head: Path) -> TrainConfig:
        """How a round trains: as `before`, from `head` on."""
        rate = before.optimizer.learning_rate * self.learning_rate_factor
        changes = {
            "epochs": None,
            "steps": self.steps,
            "warm_start": head,
            "resume_from": None,
            "optimizer": before.optimizer.model_copy(update={"learning_rate": rate}),
        }
        return before.model_copy(update=changes)


@dataclass(frozen=True)
class Rollout:
    """A prompt with the text that the target wrote behind it, and the passes that wrote it, in order."""

    sample: TokenSample
    anchors: tuple[Anchor, ...]


def anchors_of(prompt: int, steps: Sequence[Step]) -> tuple[Anchor, ...]:
    """Where each pass stood, and what it rejected; the first of `steps` is the prefill, which drafts nothing.

    A pass that emitted no more than it accepted was cut, by an end token or by the limit, before its bonus token: it
    did not get to reject anything.

    Args:
        prompt: tokens of it.
        steps: of one sequence, from its first emitted token on.

    >>> anchors_of(4, [Step([4], 0, 0), Step([5, 6], 1, 3), Step([7, 8, 9, 10], 3, 3), Step([11], 0, 3)])
    (Anchor(row=3, rejected=1), Anchor(row=5, rejected=None), Anchor(row=9, rejected=0))
    """
    found = []
    row = prompt - 2 + len(steps[0].tokens)
    for step in steps[1:]:
        refused = step.accepted < min(step.drafted, len(step.tokens))
        found.append(Anchor(row, step.accepted if refused else None))
        row += len(step.tokens)
    return tuple(found)


def choose_prompts(
    source: FeatureSource, training: Sequence[int], config: OnPolicyConfig, number: int, seed: int, room: int
) -> list[TokenSample]:
    """Prompts of round `number` (from 1): what stands before the first trained token of a conversation.

    Rounds go through one order of the conversations, so that the next begins where the last one ended.

    Args:
        source: of the conversations.
        training: those to take.
        config: how many.
        number: of the round.
        seed: of the order.
        room: tokens that the target takes; a prompt without room for an answer behind it is left out.

    Raises:
        DataError: no conversation has a prompt.
    """
    prompts = []
    for index in training:
        ids = prompt_of(source, index)
        if 0 < len(ids) <= room - config.max_new_tokens:
            prompts.append(TokenSample(source.ids[index], ids, [False] * len(ids)))
    if not prompts:
        raise DataError(
            f"none of {len(training)} training conversations has a prompt with room for "
            f"on_policy.max_new_tokens={config.max_new_tokens} behind it, of {room} that the target takes; lower it, "
            "or use conversations whose first token is not trained"
        )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(config.conversations, len(prompts))
    return [prompts[order[i % len(order)]] for i in range((number - 1) * count, number * count)]


def roll_out(
    target: Target,
    head: DraftHead,
    prompts: Sequence[TokenSample],
    depth: int,
    config: OnPolicyConfig,
    seed: int,
    bars: Bars,
) -> list[Rollout]:
    """Decode from each prompt; texts that ended with their first token are left out.

    Args:
        target: verifies.
        head: drafts.
        prompts: of the texts.
        depth: of the chains that are drafted.
        config: length, temperature and slots.
        seed: of what is drawn.
        bars: for progress.

    Raises:
        DataError: all texts ended with their first token.
    """
    decoder = SpeculativeDecoder(target, head, Chain(depth=depth))
    params = [
        SamplingParams(config.temperature, max_new_tokens=config.max_new_tokens, seed=(seed * 1_000_003 + i) % 2**63)
        for i in range(len(prompts))
    ]
    steps: list[list[Step]] = [[] for _ in prompts]
    with bars.start("rollouts", len(prompts), "texts") as bar:

        def note(index: int, step: Step) -> None:
            if not steps[index]:
                bar.advance(1)
            steps[index].append(step)

        decoder.generate_batch([prompt.input_ids for prompt in prompts], params, config.slots, note)
    found = []
    for prompt, passes in zip(prompts, steps, strict=True):
        new = [token for step in passes for token in step.tokens]
        if len(passes) > 1:
            mask = [*prompt.loss_mask, *[True] * len(new)]
            sample = TokenSample(prompt.id, [*prompt.input_ids, *new], mask)
            found.append(Rollout(sample, anchors_of(len(prompt.input_ids), passes)))
    if not found:
        raise DataError(
            f"all {len(prompts)} rollouts ended with their first token: there is nothing to replay; use other prompts, "
            "or a higher on_policy.temperature"
        )
    return found


def accepted_length(rollouts: Sequence[Rollout]) -> float:
    """Mean tokens per pass, the bonus token included."""
    new = sum(sum(rollout.sample.loss_mask) for rollout in rollouts)
    return (new - len(rollouts)) / sum(len(rollout.anchors) for rollout in rollouts)


def write_rollouts(folder: Path, rollouts: Sequence[Rollout]) -> None:
    """Into a token store, whose manifest comes last: what can be read is complete."""
    passes = [[[anchor.row, anchor.rejected] for anchor in rollout.anchors] for rollout in rollouts]
    folder.mkdir(parents=True, exist_ok=True)
    write_sealed(folder / ANCHORS, {"anchors": passes})
    TokenStore(folder).write([rollout.sample for rollout in rollouts], ["rollouts"] * len(rollouts))


def read_rollouts(folder: Path) -> list[Rollout] | None:
    """Inverse of `write_rollouts`; None where they are not complete.

    Raises:
        DamagedDataError: they were altered or cut off.
    """
    store = TokenStore(folder)
    if not store.exists():
        return None
    samples = store.read()
    try:
        passes: list[list[Any]] = read_sealed(folder / ANCHORS)["anchors"]
    except (OSError, ValueError):
        passes = []
    if len(passes) != len(samples):
        raise DamagedDataError(f"{folder / ANCHORS}: not what was written; delete {folder} and run the same again")
    return [
        Rollout(sample, tuple(Anchor(row, rejected) for row, rejected in anchors))
        for sample, anchors in zip(samples, passes, strict=True)
    ]
