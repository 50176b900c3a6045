"""Drafters with known draft distributions, for any number of slots and every tree policy; prompts and their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sstf.features import FeatureSpec
from sstf.methods.base import DraftLimits, News, ShallowPasses
from sstf.methods.checkpoint import DraftHead
from sstf.targets import Target, TargetSpec
from sstf.trees import AnyTree, DraftContext, grow
from sstf.types import DraftTree

Text = tuple[int, ...]
NextLogits = Callable[[Text], Tensor]  # the text but for its first token -> draft logits [vocab], in target ids


@dataclass
class Distribution:
    """A method that drafts from `next_logits` by the project's own `grow`; it is its own drafter.

    Draft ids are target ids backwards, so that mixing them up cannot go unnoticed. Everything that it is handed is
    recorded: `heard` has one list of news for every sequence that a slot held.
    """

    next_logits: NextLogits
    vocab: int
    layers: tuple[int, ...] = ()
    levels: int = 0
    shared_layers: int = 0
    heard: list[list[News]] = field(default_factory=list)
    trees: list[DraftTree] = field(default_factory=list)
    rooms: list[int] = field(default_factory=list)  # `context.depth` of every call
    limits: DraftLimits = field(default_factory=DraftLimits)
    _now: dict[int, list[News]] = field(default_factory=dict)
    _texts: dict[int, Text] = field(default_factory=dict)

    def feature_spec(self, target: TargetSpec) -> FeatureSpec:
        return FeatureSpec(self.layers)

    def drafter(self, head: nn.Module | None, device: torch.device) -> Distribution:
        return self

    def start(self, slots: int, capacity: int, passes: ShallowPasses | None = None) -> None:
        self._now, self._texts = {}, {}

    def restart(self, slot: int) -> None:
        self._now[slot] = []
        self._texts[slot] = ()
        self.heard.append(self._now[slot])

    def propose(self, news: Sequence[News], policy: AnyTree, context: DraftContext) -> list[DraftTree]:
        assert len({one.slot for one in news}) == len(news)
        self.rooms.append(context.depth)
        for one in news:
            assert len(one.tokens) == len(one.features) > 0
            self._now[one.slot].append(one)
            self._texts[one.slot] += tuple(one.tokens)
        draft_tokens = torch.arange(self.vocab).flip(0)
        nodes = [[self._texts[one.slot]] for one in news]
        self.levels = 1

        def logits() -> Tensor:
            return torch.stack([torch.stack([self.next_logits(text) for text in row]) for row in nodes]).flip(-1)

        def expand(parents: Tensor, tokens: Tensor) -> Tensor:
            nonlocal nodes
            self.levels += 1
            ids = draft_tokens[tokens].tolist()
            nodes = [
                [(*row[parent], token) for parent, token in zip(above, own, strict=True)]
                for row, above, own in zip(nodes, parents.tolist(), ids, strict=True)
            ]
            return logits()

        trees = grow(policy, context, logits()[:, 0], expand, draft_tokens)
        self.trees += trees
        return trees


def distribution(next_logits: NextLogits, vocab: int, layers: tuple[int, ...] = ()) -> DraftHead:
    """As a head; its method is a `Distribution`."""
    return DraftHead("scripted", Distribution(next_logits, vocab, layers))


def mostly_right(pairs: Sequence[tuple[list[int], list[int]]], vocab: int) -> NextLogits:
    """Draft logits that know the answers: of five tokens, three stand first, one second and one third, behind wrong
    ones; every eleventh is not offered. Off the right path they are noise that depends on the text."""
    following: dict[Text, int] = {}
    for prompt, answer in pairs:
        whole = (*prompt[1:], *answer)
        for end in range(len(prompt) - 1, len(whole)):
            following.setdefault(whole[:end], whole[end])
    noise = torch.randn(61, vocab, generator=torch.Generator().manual_seed(5))

    def next_logits(text: Text) -> Tensor:
        row = noise[(7 * len(text) + text[-1]) % 61].clone()
        right = following.get(text)
        if right is None or len(text) % 11 == 0:
            return row
        place = max(0, (len(text) + text[-1]) % 5 - 2)
        for rank in range(place):
            row[(right + 1 + rank) % vocab] = 8.0 - rank
        row[right] = 8.0 - place
        return row

    return next_logits


def prompts_of_equal_lengths(lengths: Sequence[int], each: int, seed: int = 11) -> list[list[int]]:
    """`each` random prompts of every length; every second repeats itself, so that lookup has something to find."""
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for length in lengths:
        for i in range(each):
            ids = torch.randint(3, 300, (length,), generator=generator).tolist()
            prompts.append((ids[:9] * length)[:length] if i % 2 else ids)
    return prompts


def transformers_answers(target: Target, prompts: Sequence[list[int]], new: int) -> list[list[int]]:
    """transformers' own greedy continuations, end tokens included; prompts of equal length together, so that nothing
    is padded."""
    answers: dict[int, list[int]] = {}
    for length in sorted({len(prompt) for prompt in prompts}):
        members = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[i] for i in members])
        out = target.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
        )
        for i, tokens in zip(members, out[:, length:].tolist(), strict=True):
            ends = [place + 1 for place, token in enumerate(tokens) if token in target.end_tokens]
            answers[i] = tokens[: ends[0]] if ends else tokens
    return [answers[i] for i in range(len(prompts))]
