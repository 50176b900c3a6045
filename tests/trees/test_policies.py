from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from sstf.trees import AnyTree, Chain, DraftContext, DynamicTree, TreePolicy, grow
from sstf.types import DraftTree

Path = tuple[int, ...]  # draft ids from the first drafted token on


class Draft:
    """A draft distribution that depends on the whole path, so that a wrong `parents` cannot go unnoticed."""

    def __init__(self, seed: int, vocab: int, spread: float = 2.0) -> None:
        self.seed, self.vocab, self.spread = seed, vocab, spread
        self.draft_tokens = torch.arange(vocab) * 3 + 5  # target ids
        self.level: list[Path] = [()]  # nodes of the previous call
        self.widths: list[int] = []

    def log_probs(self, path: Path) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, path)) % (1 << 60))
        return torch.log_softmax(torch.randn(self.vocab, generator=generator) * self.spread, -1)

    def expand(self, parents: Tensor, tokens: Tensor) -> Tensor:
        assert parents.dtype == tokens.dtype == torch.int64
        assert parents.shape == tokens.shape and len(parents) == 1
        self.widths.append(tokens.shape[1])
        pairs = zip(parents[0].tolist(), tokens[0].tolist(), strict=True)
        self.level = [(*self.level[parent], token) for parent, token in pairs]
        return torch.stack([self.log_probs(path) for path in self.level])[None]

    def grow(self, policy: AnyTree, context: DraftContext = DraftContext(64)) -> DraftTree:  # noqa: B008
        (tree,) = grow(policy, context, self.log_probs(())[None], self.expand, self.draft_tokens)
        return tree

    def score(self, path: Path) -> float:
        return sum(float(self.log_probs(path[:i])[token]) for i, token in enumerate(path))


def paths(tree: DraftTree) -> list[Path]:
    """Draft ids from the root to each node."""
    found: list[Path] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        assert -1 <= parent < len(found)  # parents precede their children
        assert (token - 5) % 3 == 0
        found.append((*(found[parent] if parent >= 0 else ()), (token - 5) // 3))
    return found


def eagle2(draft: Draft, depth: int, top_k: int, total_tokens: int) -> set[Path]:
    """EAGLE-2 by enumeration: expand the best `top_k` of each level, keep the best `total_tokens` of all seen."""
    seen: dict[Path, float] = {}
    beam: list[Path] = [()]
    for _ in range(depth):
        candidates: dict[Path, float] = {}
        for path in beam:
            values = draft.log_probs(path).tolist()
            best = sorted(range(draft.vocab), key=lambda token: -values[token])[:top_k]
            candidates |= {(*path, token): draft.score((*path, token)) for token in best}
        seen |= candidates
        beam = sorted(candidates, key=lambda path: -candidates[path])[:top_k]
    return set(sorted(seen, key=lambda path: -seen[path])[:total_tokens])


@given(
    seed=st.integers(0, 1000),
    vocab=st.integers(1, 7),
    depth=st.integers(1, 4),
    top_k=st.integers(1, 9),
    total_tokens=st.integers(1, 60),
)
@settings(deadline=None, max_examples=80)
def test_dynamic_tree_is_eagle2s(seed: int, vocab: int, depth: int, top_k: int, total_tokens: int) -> None:
    draft = Draft(seed, vocab)
    tree = draft.grow(DynamicTree(depth=depth, top_k=top_k, total_tokens=total_tokens))
    found = paths(tree)
    expected = eagle2(draft, depth, top_k, total_tokens)
    assert len(found) == len(set(found)) <= total_tokens
    assert set(found) == expected
    widths = [min(top_k, vocab)]
    while len(widths) < depth:
        widths.append(min(top_k, widths[-1] * min(top_k, vocab)))
    assert draft.widths == widths[:-1]
    # Siblings: the better first.
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            if one[:-1] == other[:-1]:
                assert draft.score(one) > draft.score(other)


@given(seed=st.integers(0, 1000), depth=st.integers(1, 6))
@settings(deadline=None, max_examples=30)
def test_chain_is_the_argmax_path(seed: int, depth: int) -> None:
    draft = Draft(seed, 6)
    tree = draft.grow(Chain(depth=depth))
    path: Path = ()
    for _ in range(depth):
        path = (*path, int(draft.log_probs(path).argmax()))
    assert tree.parents.tolist() == list(range(-1, depth - 1))
    assert paths(tree)[-1] == path


def test_dynamic_tree_by_hand() -> None:
    """Tokens 0 and 1 with 0.6 and 0.4, whatever stands before: the five best of 14 paths of up to three tokens.

    0.6 (0); 0.4 (1); 0.36 (0,0); 0.24 (0,1) and (1,0); 0.216 (0,0,0), which is the sixth.
    """
    log_probs = torch.tensor([0.6, 0.4]).log()

    def expand(parents: Tensor, tokens: Tensor) -> Tensor:
        return log_probs.expand(*tokens.shape, 2)

    policy = DynamicTree(depth=3, top_k=2, total_tokens=5)
    (tree,) = grow(policy, DraftContext(9), log_probs[None], expand, torch.tensor([10, 20]))
    assert tree.tokens.tolist() == [10, 20, 10, 20, 10]
    assert tree.parents.tolist() == [-1, -1, 0, 0, 1]


def test_certain_drafts_keep_parents_before_children() -> None:
    """Probability 1 leaves parent and child with equal scores; a child without its parent would hang in the air."""
    certain = torch.tensor([0.0, -math.inf, -math.inf])

    def expand(parents: Tensor, tokens: Tensor) -> Tensor:
        return certain.expand(*tokens.shape, 3)

    for total in range(1, 5):
        policy = DynamicTree(depth=4, top_k=2, total_tokens=total)
        (tree,) = grow(policy, DraftContext(9), certain[None], expand, torch.arange(3))
        assert tree.tokens.tolist() == [0] * total
        assert tree.parents.tolist() == list(range(-1, total - 1))


def test_fewer_candidates_than_asked_for() -> None:
    draft = Draft(0, 3)
    tree = draft.grow(DynamicTree(depth=2, top_k=50, total_tokens=1000))
    assert set(paths(tree)) == {(a,) for a in range(3)} | {(a, b) for a in range(3) for b in range(3)}


def test_policies_from_a_config() -> None:
    adapter: TypeAdapter[Chain | DynamicTree] = TypeAdapter(TreePolicy)
    assert adapter.validate_python({"kind": "chain", "depth": 3}) == Chain(depth=3)
    assert Chain(depth=3).total_tokens == 3
    for wrong in ({"kind": "chain", "depth": 0}, {"kind": "dynamic", "top_k": 0}, {"kind": "dynamic", "width": 3}):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


def test_empty_tree() -> None:
    tree = DraftTree.empty(torch.device("cpu"))
    assert len(tree) == 0 and tree.tokens.dtype == tree.parents.dtype == torch.int64
