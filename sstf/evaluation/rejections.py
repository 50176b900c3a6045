"""Why drafted tokens were rejected: every pass of greedy decoding that a draft ended early, with what was likely the
reason.

While decoding, only references to the drafted trees are kept. Afterwards one plain pass of the target over each text
gives its distributions where the drafts failed. Of the causes that hold for a rejection the first in `CAUSES` counts.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sstf.data.preview import special_ids, token_texts
from sstf.decode import Step
from sstf.methods import Drafter
from sstf.methods.base import News, ShallowPasses
from sstf.targets import Target
from sstf.trees import AnyTree, DraftContext, children
from sstf.types import DraftTree

NEAR_TIE = 0.8  # the drafted token is at least so likely, in relation to the emitted one
UNCERTAIN = 2.0  # nats: the target hesitates between more than seven tokens
DEEP = 3  # draft position from which the head reads mostly its own states
CAUSES = {
    "outside the draft vocabulary": "the head cannot propose the emitted token: a larger draft vocabulary",
    "special token": "a token of the template, or an end: more, and whole, conversations in training",
    "near tie": f"the target gives the drafted token at least {NEAR_TIE:.0%} of the emitted one's probability",
    "target uncertain": f"the target's own distribution has an entropy of {UNCERTAIN:g} nats or more",
    "script": "the emitted token is not in Latin letters: more training data in that language",
    "deep position": f"draft position {DEEP} or later, where the head reads its own states: more TTT steps",
    "other": "none of these: the head is wrong where the target is sure",
}
KEPT = 2000  # rejections shown one by one; all are counted
BEFORE, AFTER = 40, 12  # tokens of text around
ROWS = 128  # distributions held at once


class WatchedDrafter:
    """A drafter that leaves its last tree where `taken` finds it."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.tree: DraftTree | None = None

    @property
    def levels(self) -> int:
        """See `Drafter.levels`."""
        return self.drafter.levels

    def start(self, slots: int, capacity: int, passes: ShallowPasses | None = None) -> None:
        """See `Drafter.start`."""
        self.drafter.start(slots, capacity, passes)

    def restart(self, slot: int) -> None:
        """See `Drafter.restart`."""
        self.drafter.restart(slot)

    def propose(self, news: Sequence[News], policy: AnyTree, context: DraftContext) -> list[DraftTree]:
        """See `Drafter.propose`."""
        trees = self.drafter.propose(news, policy, context)
        self.tree = trees[0]
        return trees

    def taken(self) -> DraftTree | None:
        """The tree drafted since the last call, if any."""
        tree, self.tree = self.tree, None
        return tree


@dataclass(frozen=True)
class Pass:
    """One pass of an arm: its tree (None: nothing was drafted) and what was emitted."""

    tree: DraftTree | None
    tokens: list[int]


def watch(drafter: WatchedDrafter, passes: list[Pass], step: Step) -> None:
    """Note a step of decoding; the prefill is the first."""
    passes.append(Pass(drafter.taken(), step.tokens))


@dataclass(frozen=True)
class Rejected:
    """Where a draft failed: `row` counts the new tokens, `position` the drafted ones from 1."""

    row: int
    position: int
    emitted: int
    drafted: int  # the best (or first drawn) of the candidates there


def rejected(passes: Sequence[Pass]) -> Iterator[Rejected]:
    """The passes in which there was a candidate for the last emitted token and none was right."""
    row = 0
    for one in passes:
        if one.tree is not None and len(one.tree):
            tokens, below = one.tree.tokens.tolist(), children(one.tree.parents.tolist())
            node = -1
            for place, emitted in enumerate(one.tokens):
                candidates = below.get(node, [])
                right = next((child for child in candidates if tokens[child] == emitted), None)
                if right is None:
                    if candidates:
                        yield Rejected(row + place, place + 1, emitted, tokens[candidates[0]])
                    break
                node = right
        row += len(one.tokens)


@dataclass(frozen=True)
class Rejection:
    """A rejected draft, explained. Probabilities and entropy (nats) are the target's, at temperature 1."""

    arm: str
    prompt: str
    category: str
    position: int
    causes: tuple[str, ...]  # the first one counts
    emitted: str
    drafted: str
    emitted_prob: float
    drafted_prob: float
    entropy: float
    before: str
    after: str


@dataclass(frozen=True)
class Rejections:
    """`counts[arm][cause]` of all rejections, and `kept` of them one by one, spread over prompts."""

    counts: dict[str, dict[str, int]]
    kept: list[Rejection]


def distributions(
    target: Target, prompt: Sequence[int], new: Sequence[int], rows: Sequence[int]
) -> Iterator[tuple[list[int], Tensor]]:
    """The target's logits for the tokens `rows` (ascending) of `new`, from one pass over the text up to the last of
    them: some of the rows, and [rows, vocab] float32."""
    if not rows:
        return
    ids = torch.tensor([[*prompt, *new[: rows[-1]]]], device=target.device)
    hidden = target.decoder(ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 :]
    for first in range(0, len(rows), ROWS):
        some = list(rows[first : first + ROWS])
        yield some, target.frozen_head.native_logits(hidden[some]).float()


class Explainer:
    """Explains rejections of a head with the draft vocabulary `drafts` ([vocab] bool; None: all of it)."""

    def __init__(self, target: Target, drafts: Tensor | None) -> None:
        self.target = target
        self.drafts = None if drafts is None else drafts.tolist()
        self.special = special_ids(target.tokenizer) | target.end_tokens
        self.counts: dict[str, Counter[str]] = {}
        self.found: list[Rejection] = []

    def add(
        self,
        arm: str,
        name: str,
        category: str,
        prompt: Sequence[int],
        passes: Sequence[Pass],
        rows: Sequence[int],
        logits: Tensor,
    ) -> None:
        """Explain those rejections of one text that stand at `rows`, where the target's logits are `logits`."""
        place = {row: i for i, row in enumerate(rows)}
        here = [r for r in rejected(passes) if r.row in place]
        counts = self.counts.setdefault(arm, Counter())
        if not here:
            return
        logs = logits[[place[r.row] for r in here]].log_softmax(-1)
        places = torch.arange(len(here), device=logs.device)
        emitted = logs[places, torch.tensor([r.emitted for r in here], device=logs.device)].exp().tolist()
        drafted = logs[places, torch.tensor([r.drafted for r in here], device=logs.device)].exp().tolist()
        entropy = -(logs.exp() * logs).nan_to_num(0.0).sum(-1)
        new = [token for one in passes for token in one.tokens]
        tail = list(prompt[-BEFORE:])
        texts = [text or "" for text in token_texts(self.target.tokenizer, [*tail, *new])]
        for r, p, q, h in zip(here, emitted, drafted, entropy.tolist(), strict=True):
            at = len(tail) + r.row
            causes = self._causes(r, texts[at], p, q, h)
            counts[causes[0]] += 1
            self.found.append(
                Rejection(
                    arm,
                    name,
                    category,
                    r.position,
                    causes,
                    self._text(r.emitted),
                    self._text(r.drafted),
                    p,
                    q,
                    h,
                    "".join(texts[max(0, at - BEFORE) : at]),
                    "".join(texts[at + 1 : at + 1 + AFTER]),
                )
            )

    def rejections(self) -> Rejections:
        """All that was added."""
        stride = max(1, math.ceil(len(self.found) / KEPT))
        counts = {arm: {cause: found[cause] for cause in CAUSES} for arm, found in self.counts.items()}
        return Rejections(counts, self.found[::stride])

    def _causes(self, one: Rejected, text: str, emitted: float, drafted: float, entropy: float) -> tuple[str, ...]:
        holds: dict[str, Any] = {
            "outside the draft vocabulary": self.drafts is not None and not self.drafts[one.emitted],
            "special token": one.emitted in self.special,
            "near tie": drafted >= NEAR_TIE * emitted,
            "target uncertain": entropy >= UNCERTAIN,
            "script": script(text) not in ("", "LATIN"),
            "deep position": one.position >= DEEP,
        }
        return tuple(cause for cause in CAUSES if holds.get(cause)) or ("other",)

    def _text(self, token: int) -> str:
        return str(self.target.tokenizer.decode([token]))


def script(text: str) -> str:
    """Of the first letter, as Unicode names it (LATIN, CJK, CYRILLIC); empty where there is no letter.

    >>> script("好的"), script(" the"), script("42")
    ('CJK', 'LATIN', '')
    """
    letter = next((c for c in text if c.isalpha()), None)
    return unicodedata.name(letter, "").split(" ")[0].split("-")[0] if letter else ""
