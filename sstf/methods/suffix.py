"""Suffix lookup (SuffixDecoding, arXiv 2411.04975): what followed the text's latest tokens before, by frequency.

Needs no training. It counts the continuations of every suffix of a sequence, prompt and answer, and of the answers that
the same process gave earlier. Where the longest suffixes are found again, as much is drafted as `factor` times the
length of the match, the most frequent continuation first. So it is the free baseline for text that repeats itself or
others: code, agents, retrieval.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from sstf.config_loading import Section
from sstf.features.spec import FeatureSpec
from sstf.methods.base import DraftLimits, News, ShallowPasses
from sstf.targets import TargetSpec
from sstf.trees import AnyTree, Chain, DraftContext, StaticTree
from sstf.types import DraftTree

DEEPEST = 64  # of any policy


class SuffixConfig(Section):
    """A match of n tokens, `max_match` at most, gives `factor` * n drafted ones (the paper's alpha). What is reached
    with less than `min_chance`, by the shares of the counts, is not drafted.

    `remember` is how many tokens of earlier answers are kept, of all sequences together; the oldest go first.
    """

    kind: Literal["suffix"] = "suffix"
    reads: ClassVar[tuple[str, ...]] = ()
    max_match: int = Field(default=32, ge=1, le=256)
    factor: float = Field(default=2.0, gt=0)
    min_chance: float = Field(default=0.1, ge=0, le=1)
    remember: int = Field(default=65536, ge=0)


class SuffixMethod:
    """A `DraftMethod` without parameters."""

    def __init__(self, config: SuffixConfig) -> None:
        self.config = config

    @property
    def limits(self) -> DraftLimits:
        """None: a text may have gone on in several ways, for any length."""
        return DraftLimits()

    @property
    def shared_layers(self) -> int:
        """None: it reads tokens alone."""
        return 0

    def feature_spec(self, target: TargetSpec) -> FeatureSpec:
        """No layers: it reads tokens alone."""
        return FeatureSpec()

    def drafter(self, head: nn.Module | None, device: torch.device) -> SuffixDrafter:
        """A drafter that remembers nothing yet."""
        return SuffixDrafter(self.config, device)


# ---- counting --------------------------------------------------------------------------------------------------------


class SuffixCounts:
    """How often each string occurs in some texts: a suffix automaton (Blumer et al., 1985), grown token by token.

    A state stands for strings that end at the same places, of which one is the longest; so a text of n tokens has less
    than 2 n states, and the count and the latest end of a state are those of all its strings. Strings of more than
    `longest` tokens are found, but not counted: what a token costs does not grow with the text.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.size = 0  # tokens
        self.next: list[dict[int, int]] = [{}]  # state 0 is the empty string
        self.count = [0]
        self.latest = [0]
        self._link = [-1]  # the longest suffix that ends at other places too
        self._length = [0]  # of the longest string
        self.begin()

    def begin(self) -> None:
        """What comes now follows nothing: another text."""
        self._whole = 0  # state of the text so far
        self._counted, self._tokens = 0, 0  # state of its suffix that is counted, and that suffix's length

    def append(self, token: int) -> None:
        """The text goes on."""
        before = self._whole
        known = self.next[before].get(token)
        if known is None:
            self._whole = self._add(before, token)
        else:
            self._whole = known if self._length[known] == self._length[before] + 1 else self._split(before, token)
        self.size += 1
        state = self.next[self._holding(self._counted, self._tokens)][token]
        self._tokens = min(self._tokens + 1, self.longest)
        self._counted = state = self._holding(state, self._tokens)
        while state > 0:
            self.count[state] += 1
            self.latest[state] = self.size
            state = self._link[state]

    def matches(self, tail: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Suffixes of `tail` that were continued: lengths and states, the longest first, one for each set of places."""
        state = length = 0
        for token in tail:
            while state and token not in self.next[state]:
                state = self._link[state]
                length = self._length[state]
            if token in self.next[state]:
                state, length = self.next[state][token], length + 1
        while state:
            if self.next[state]:
                yield length, state
            state = self._link[state]
            length = self._length[state]

    def continuations(self, state: int, limit: int) -> list[tuple[float, int, int]]:
        """The `limit` most frequent tokens behind a state's strings, of equals the latest first: share of the counts,
        token, and state behind it."""
        behind = self.next[state]
        total = sum(self.count[other] for other in behind.values())
        order = heapq.nlargest(limit, behind.items(), key=lambda item: (self.count[item[1]], self.latest[item[1]]))
        return [(self.count[other] / total, token, other) for token, other in order]

    def _holding(self, state: int, length: int) -> int:
        """The state of the suffix of `length` tokens of a state's strings: not the state itself after a split."""
        while state and self._length[self._link[state]] >= length:
            state = self._link[state]
        return state

    def _new(self, length: int, link: int, next_: dict[int, int], count: int, latest: int) -> int:
        self._length.append(length)
        self._link.append(link)
        self.next.append(next_)
        self.count.append(count)
        self.latest.append(latest)
        return len(self.next) - 1

    def _add(self, before: int, token: int) -> int:
        """A state for the text of `before` and a token that never followed it."""
        made = self._new(self._length[before] + 1, 0, {}, 0, 0)
        state = before
        while state >= 0 and token not in self.next[state]:
            self.next[state][token] = made
            state = self._link[state]
        if state >= 0:
            known = self.next[state][token]
            whole = self._length[known] == self._length[state] + 1
            self._link[made] = known if whole else self._split(state, token)
        return made

    def _split(self, state: int, token: int) -> int:
        """Give the strings of `state` and the token a state of their own: they are about to end where longer ones of
        the state that they share do not."""
        known = self.next[state][token]
        made = self._new(
            self._length[state] + 1, self._link[known], dict(self.next[known]), self.count[known], self.latest[known]
        )
        self._link[known] = made
        while state >= 0 and self.next[state].get(token) == known:
            self.next[state][token] = made
            state = self._link[state]
        return made


class Memory:
    """Counts of earlier answers, in two generations: when the younger is full, the older is forgotten."""

    def __init__(self, tokens: int, longest: int) -> None:
        self.half, self.longest = tokens // 2, longest
        self.young, self.old = SuffixCounts(longest), SuffixCounts(longest)

    def add(self, text: Sequence[int]) -> None:
        """An answer; of one that is too long its end."""
        text = text[len(text) - min(len(text), self.half) :]
        if self.young.size + len(text) > self.half:
            self.young, self.old = SuffixCounts(self.longest), self.young
        self.young.begin()
        for token in text:
            self.young.append(token)


# ---- drafting --------------------------------------------------------------------------------------------------------


@dataclass
class Candidate:
    """A tree of continuations. `score` is the expected number of accepted tokens, if shares were chances."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    score: float = 0.0


def widths(policy: AnyTree) -> Callable[[tuple[int, ...]], int]:
    """How many children a policy gives the node that a path of ranks names."""
    if isinstance(policy, Chain):
        return lambda path: 1
    if isinstance(policy, StaticTree):
        each: dict[tuple[int, ...], int] = {}
        for path in policy.paths:
            each[path[:-1]] = max(each.get(path[:-1], 0), path[-1] + 1)
        return lambda path: each.get(path, 0)
    return lambda path: policy.top_k


def grown(
    counts: SuffixCounts, state: int, size: int, depth: int, width: Callable[[tuple[int, ...]], int], least: float
) -> Candidate:
    """The `size` most probable nodes below a state, by the product of the shares along the path.

    Args:
        counts: of the texts.
        state: what matched.
        size: nodes at most.
        depth: of the deepest node.
        width: children of a node by its path of ranks.
        least: product of a node at least.
    """
    found = Candidate()
    # Minus the product, a number that keeps equals in order, then: share, token, state, parent, path.
    waiting: list[tuple[float, int, float, int, int, int, tuple[int, ...]]] = []
    pushed = 0

    def push(chance: float, below: int, parent: int, path: tuple[int, ...]) -> None:
        nonlocal pushed
        limit = width(path) if len(path) < depth else 0
        for rank, (share, token, other) in enumerate(counts.continuations(below, limit) if limit else ()):
            if chance * share >= least:
                heapq.heappush(waiting, (-chance * share, pushed, share, token, other, parent, (*path, rank)))
                pushed += 1

    push(1.0, state, -1, ())
    while waiting and len(found.tokens) < size:
        chance, _, share, token, other, parent, path = heapq.heappop(waiting)
        found.tokens.append(token)
        found.parents.append(parent)
        found.shares.append(share)
        found.score -= chance
        push(-chance, other, len(found.tokens) - 1, path)
    return found


class SuffixDrafter:
    """Of the text itself and of earlier answers, drafts what promises most tokens."""

    levels = 0  # no draft passes

    def __init__(self, config: SuffixConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.longest = config.max_match + DEEPEST
        self.memory = Memory(config.remember, self.longest)
        self.texts: list[_Text] = []

    def start(self, slots: int, capacity: int, passes: ShallowPasses | None = None) -> None:
        """See `Drafter.start`. Answers that were there are remembered."""
        for text in self.texts:
            self.memory.add(text.answer)
        self.texts = [_Text(self.config.max_match, self.longest) for _ in range(slots)]

    def restart(self, slot: int) -> None:
        """See `Drafter.restart`. The answer that was there is remembered."""
        self.memory.add(self.texts[slot].answer)
        self.texts[slot] = _Text(self.config.max_match, self.longest)

    def propose(self, news: Sequence[News], policy: AnyTree, context: DraftContext) -> list[DraftTree]:
        """See `Drafter.propose`."""
        trees = []
        for one in news:
            text = self.texts[one.slot]
            text.extend(one.tokens)
            best = self._best(text, policy, context)
            trees.append(
                DraftTree(
                    torch.tensor(best.tokens, dtype=torch.int64, device=self.device),
                    torch.tensor(best.parents, dtype=torch.int64, device=self.device),
                    torch.tensor(best.shares, device=self.device),
                )
            )
        return trees

    def _best(self, text: _Text, policy: AnyTree, context: DraftContext) -> Candidate:
        best, width = Candidate(), widths(policy)
        depth = min(policy.depth, context.depth)
        for counts in (text.counts, self.memory.young, self.memory.old):
            for length, state in counts.matches(text.tail):
                size = min(int(self.config.factor * length), policy.total_tokens)
                if size <= best.score:  # no node is expected more than once, and shorter matches have fewer
                    break
                found = grown(counts, state, size, depth, width, self.config.min_chance)
                if found.score > best.score:
                    best = found
        return best


class _Text:
    """One sequence: its counts, its end, and what of it is the answer."""

    def __init__(self, max_match: int, longest: int) -> None:
        self.counts = SuffixCounts(longest)
        self.tail: deque[int] = deque(maxlen=max_match)
        self.answer: list[int] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """What is new; at first the prompt and the answer's first token."""
        self.answer += tokens if self.counts.size else tokens[-1:]
        for token in tokens:
            self.counts.append(token)
        self.tail.extend(tokens)
