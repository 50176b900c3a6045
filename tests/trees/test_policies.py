from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from sstf.decode.cost import KNOTS, CostModel
from sstf.trees import AnyTree, Chain, CostAwareTree, DraftContext, Drawing, DynamicTree, StaticTree, TreePolicy, grow
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

    def grow(
        self,
        policy: AnyTree,
        context: DraftContext = DraftContext(64),  # noqa: B008
        threshold: float = 0.0,
    ) -> DraftTree:
        (tree,) = grow(policy, context, self.log_probs(())[None], self.expand, self.draft_tokens, threshold)
        return tree

    def best(self, path: Path) -> float:
        return float(self.log_probs(path).max().exp())

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


def eagle2(draft: Draft, depth: int, top_k: int, total_tokens: int, threshold: float = 0.0) -> set[Path]:
    """EAGLE-2 by enumeration: expand the best `top_k` of each level, keep the best `total_tokens` of all seen."""
    seen: dict[Path, float] = {}
    beam: list[Path] = [()]
    for _ in range(depth):
        candidates: dict[Path, float] = {}
        for path in beam:
            if draft.best(path) < threshold:
                continue
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


# ---- static trees ----------------------------------------------------------------------------------------------------


@st.composite
def rank_paths(draw: st.DrawFn) -> tuple[Path, ...]:
    """Any valid set of paths, in any order."""
    ends = draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4))
    found: set[Path] = set()
    for end in ends:
        for i in range(1, len(end) + 1):
            found |= {(*end[: i - 1], rank) for rank in range(end[i - 1] + 1)}
    return tuple(draw(st.permutations(sorted(found))))


def by_ranks(draft: Draft, ranks: Path) -> Path | None:
    """The tokens with those ranks; None where the draft vocabulary has fewer tokens."""
    path: Path = ()
    for rank in ranks:
        values = draft.log_probs(path).tolist()
        if rank >= len(values):
            return None
        path = (*path, sorted(range(draft.vocab), key=lambda token: -values[token])[rank])
    return path


@given(seed=st.integers(0, 1000), vocab=st.integers(1, 7), ranks=rank_paths(), room=st.integers(1, 5))
@settings(deadline=None, max_examples=80)
def test_static_tree_has_the_tokens_with_those_ranks(seed: int, vocab: int, ranks: tuple[Path, ...], room: int) -> None:
    draft = Draft(seed, vocab)
    tree = draft.grow(StaticTree(paths=ranks), DraftContext(room))
    wanted = [by_ranks(draft, path) for path in sorted(ranks, key=lambda path: (len(path), path)) if len(path) <= room]
    assert paths(tree) == [path for path in wanted if path is not None]
    assert tree.confidence is not None
    expected = [float(draft.log_probs(path[:-1])[path[-1]].exp()) for path in paths(tree)]
    assert tree.confidence.tolist() == pytest.approx(expected, rel=1e-5)


@given(seed=st.integers(0, 1000), depth=st.integers(1, 6))
@settings(deadline=None, max_examples=20)
def test_chain_is_a_static_tree(seed: int, depth: int) -> None:
    chain, static = Chain(depth=depth), StaticTree(paths=tuple((0,) * i for i in range(1, depth + 1)))
    one, other = Draft(seed, 5).grow(chain), Draft(seed, 5).grow(static)
    assert one.tokens.tolist() == other.tokens.tolist() and one.parents.tolist() == other.parents.tolist()
    assert (chain.total_tokens, chain.depth) == (static.total_tokens, static.depth) == (depth, depth)


def test_full_tree_by_hand() -> None:
    full = StaticTree.full(2, 1)
    assert full.paths == ((0,), (1,), (0, 0), (1, 0))
    assert (full.depth, full.total_tokens) == (2, 4)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (((0, 0),), r"paths holds \[0, 0\] but not \[0\]; a node needs its parent"),
        (
            ((0,), (2,)),
            r"paths holds \[2\] but not \[1\]; a node needs its parent and the siblings that rank before it",
        ),
        (((0,), (0, 1)), r"paths holds \[0, 1\] but not \[0, 0\]"),
        (((0,), (0,)), "paths names a node twice, or the root"),
        (((), (0,)), "paths names a node twice, or the root"),
        ((), "at least 1 item"),
        (((-1,),), "greater than or equal to 0"),
    ],
)
def test_paths_that_are_no_tree(broken: tuple[Path, ...], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StaticTree(paths=broken)


def test_budgets_below_one() -> None:
    for make, field in [
        (Chain, "depth"), (DynamicTree, "depth"), (DynamicTree, "top_k"), (DynamicTree, "total_tokens"),
        (CostAwareTree, "depth"), (CostAwareTree, "top_k"), (CostAwareTree, "total_tokens"),
    ]:  # fmt: skip
        for value in (0, -3):
            with pytest.raises(ValidationError, match=f"{field}\\n.*greater than or equal to 1"):
                make(**{field: value})
    with pytest.raises(ValidationError, match="lookup needs draw: top, found iid"):
        Chain(lookup=True, draw="iid")


# ---- drawn trees -----------------------------------------------------------------------------------------------------


def drawing(seed: int, draft: Draft, top_k: int = 0) -> DraftContext:
    generators = [torch.Generator().manual_seed(seed)]
    return DraftContext(64, Drawing(0.7, 1.0, top_k, generators, draft.vocab * 3 + 5))


@given(
    seed=st.integers(0, 1000), vocab=st.integers(1, 5), ranks=rank_paths(), iid=st.booleans(), top_k=st.integers(0, 3)
)
@settings(deadline=None, max_examples=60)
def test_drawn_tree_has_the_distributions_its_children_were_drawn_from(
    seed: int, vocab: int, ranks: tuple[Path, ...], iid: bool, top_k: int
) -> None:
    draft = Draft(seed, vocab)
    policy = StaticTree(paths=ranks, draw="iid" if iid else "without_replacement")
    tree = draft.grow(policy, drawing(seed, draft, top_k))
    found = paths(tree)
    assert tree.draft_probs is not None and len(tree.draft_probs) == len(found) + 1
    inner = {-1, *tree.parents.tolist()}
    for node in inner:
        probs = torch.softmax(draft.log_probs(found[node] if node >= 0 else ()) / 0.7, -1)
        if top_k:
            probs = torch.where(probs >= probs.topk(min(top_k, vocab)).values[-1], probs, 0)
        expected = torch.zeros(vocab * 3 + 5).index_copy_(0, draft.draft_tokens, probs / probs.sum())
        torch.testing.assert_close(tree.draft_probs[node + 1], expected, atol=1e-6, rtol=1e-5)
        mine = [i for i, parent in enumerate(tree.parents.tolist()) if parent == node]
        tokens = tree.tokens[mine].tolist()
        assert all(expected[token] > 0 for token in tokens)
        if not iid:
            assert len(set(tokens)) == len(tokens)
    # Only what the vocabulary, or top-k, is too small for is missing.
    possible = min(vocab, top_k) if top_k else vocab
    wide = 1 + max(rank for path in ranks for rank in path)
    if iid or possible >= wide:
        assert len(found) == len(ranks)
    else:
        assert len(found) == sum(all(rank < possible for rank in path) for path in ranks)


# ---- where the draft is in doubt -------------------------------------------------------------------------------------

DOUBTS = st.sampled_from([1e-6, 0.35, 0.5, 0.7, 0.99])


@given(seed=st.integers(0, 1000), depth=st.integers(1, 5), threshold=DOUBTS)
@settings(deadline=None, max_examples=60)
def test_a_chain_ends_where_its_next_token_is_in_doubt(seed: int, depth: int, threshold: float) -> None:
    draft = Draft(seed, 4)
    expected: list[Path] = []
    path: Path = ()
    while len(path) < depth and draft.best(path) >= threshold:
        path = (*path, int(draft.log_probs(path).argmax()))
        expected.append(path)
    assert paths(draft.grow(Chain(depth=depth), threshold=threshold)) == expected
    # Nothing was run for what is not there.
    assert len(draft.widths) == min(depth - 1, len(expected))


@given(seed=st.integers(0, 1000), ranks=rank_paths(), threshold=DOUBTS)
@settings(deadline=None, max_examples=60)
def test_a_static_tree_without_what_hangs_below_a_node_in_doubt(
    seed: int, ranks: tuple[Path, ...], threshold: float
) -> None:
    draft = Draft(seed, 5)
    whole = paths(draft.grow(StaticTree(paths=ranks)))
    kept = [path for path in whole if all(draft.best(path[:i]) >= threshold for i in range(len(path)))]
    assert paths(Draft(seed, 5).grow(StaticTree(paths=ranks), threshold=threshold)) == kept


@given(seed=st.integers(0, 1000), depth=st.integers(1, 4), top_k=st.integers(1, 4), threshold=DOUBTS)
@settings(deadline=None, max_examples=60)
def test_a_dynamic_tree_grows_nothing_below_a_node_in_doubt(
    seed: int, depth: int, top_k: int, threshold: float
) -> None:
    draft = Draft(seed, 5)
    tree = draft.grow(DynamicTree(depth=depth, top_k=top_k, total_tokens=12), threshold=threshold)
    found = paths(tree)
    assert set(found) == eagle2(draft, depth, top_k, 12, threshold) and len(set(found)) == len(found)
    for path, confidence in zip(found, (tree.confidence.tolist() if len(tree) else []), strict=True):  # type: ignore[union-attr]
        assert confidence == pytest.approx(math.exp(float(draft.log_probs(path[:-1])[path[-1]])), rel=1e-5)


@given(seed=st.integers(0, 1000), ranks=rank_paths(), iid=st.booleans(), threshold=DOUBTS)
@settings(deadline=None, max_examples=60)
def test_whether_children_are_drawn_is_decided_before_they_are(
    seed: int, ranks: tuple[Path, ...], iid: bool, threshold: float
) -> None:
    """The same draws, without those below a node in doubt: their own values have no part in it."""
    policy = StaticTree(paths=ranks, draw="iid" if iid else "without_replacement")
    draft = Draft(seed, 5)
    whole = draft.grow(policy, drawing(seed, draft))
    tree = Draft(seed, 5).grow(policy, drawing(seed, draft), threshold)
    drawn = paths(whole)
    kept = [i for i, path in enumerate(drawn) if all(draft.best(path[:j]) >= threshold for j in range(len(path)))]
    assert paths(tree) == [drawn[i] for i in kept]
    if kept:
        assert tree.draft_probs is not None and whole.draft_probs is not None
        rows = torch.tensor([0, *(i + 1 for i in kept)])
        inner = torch.tensor([-1, *range(len(kept))])[:, None].eq(tree.parents).any(1)  # rows that are ever read
        torch.testing.assert_close(tree.draft_probs[inner], whole.draft_probs[rows][inner])


# ---- trees that look at their cost -----------------------------------------------------------------------------------


def rates(gains: list[float], depth: int, cost: CostModel) -> list[float]:
    return [(1 + sum(gains[:n])) / cost.step(depth, n) for n in range(len(gains) + 1)]


@given(
    seed=st.integers(0, 1000),
    row_s=st.sampled_from([0.0, 1e-3, 1e-2, 1e-1, 1.0]),
    draft_s=st.sampled_from([0.0, 1e-2, 0.1, 0.3, 3.0]),
    spread=st.sampled_from([1.0, 4.0]),
    total=st.integers(1, 30),
)
@settings(deadline=None, max_examples=80)
def test_cost_aware_tree_by_brute_force(seed: int, row_s: float, draft_s: float, spread: float, total: int) -> None:
    depth, top_k = 4, 3
    draft = Draft(seed, 5, spread)
    cost = CostModel([1 + row_s * knot for knot in KNOTS], draft_s, 0.05)
    policy = CostAwareTree(depth=depth, top_k=top_k, total_tokens=total, calibrated=False)
    tree = draft.grow(policy, DraftContext(64, cost=cost))
    # Level by level: all candidates, the frontier, and whether one more level may pay.
    seen: dict[Path, float] = {}
    beam: list[Path] = [()]
    levels = 0
    while levels < depth:
        best = {path: draft.log_probs(path).topk(top_k).indices.tolist() for path in beam}
        candidates = {(*path, token): math.exp(draft.score((*path, token))) for path in beam for token in best[path]}
        keep = sum(float(draft.log_probs(path).max().exp()) for path in beam) / len(beam)
        seen |= candidates
        levels += 1
        beam = sorted(candidates, key=lambda path: -candidates[path])[:top_k]
        gains = sorted(seen.values(), reverse=True)[:total]
        more = sorted([*gains, *(keep * candidates[path] for path in beam)], reverse=True)
        if max(rates(more, levels + 1, cost)) <= max(rates(gains, levels, cost)):
            break
    assert len(draft.widths) == levels - 1
    gains = sorted(seen.values(), reverse=True)[:total]
    found = rates(gains, levels, cost)
    assert found[len(tree)] == pytest.approx(max(found), rel=1e-6)
    assert set(paths(tree)) == set(sorted(seen, key=lambda path: -seen[path])[: len(tree)])


def test_cost_aware_tree_at_the_extremes() -> None:
    flat, steep = [1.0] * len(KNOTS), [1.0 * knot for knot in KNOTS]
    for verify_s, draft_s, levels in [(flat, 0.0, 4), (flat, 100.0, 1), (steep, 0.0, None)]:
        draft = Draft(3, 5, 1.0)
        policy = CostAwareTree(depth=4, top_k=3, total_tokens=30, calibrated=False)
        tree = draft.grow(policy, DraftContext(64, cost=CostModel(verify_s, draft_s, 0.0)))
        if levels:
            assert len(draft.widths) == levels - 1
            assert len(tree) == min(30, 3 + 9 * (levels - 1))  # rows cost nothing: all of them
        else:
            assert len(tree) == 0  # twice the time for less than twice the tokens


# ---- several sequences at once ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [Chain(depth=3), StaticTree.full(3, 2, 1), DynamicTree(depth=3, top_k=3, total_tokens=9),
     Chain(depth=3, draw="iid"), StaticTree.full(2, 2, draw="without_replacement")],
    ids=["chain", "static", "dynamic", "chain-iid", "without-replacement"],
)  # fmt: skip
def test_a_batch_grows_what_each_would_grow_alone(policy: AnyTree) -> None:
    drafts = [Draft(seed, 6) for seed in range(3)]

    def context(seeds: list[int]) -> DraftContext:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return DraftContext(64, Drawing(0.9, 0.9, 0, generators, 30))

    def expand(parents: Tensor, tokens: Tensor) -> Tensor:
        return torch.cat([d.expand(parents[i : i + 1], tokens[i : i + 1]) for i, d in enumerate(drafts)])

    roots = torch.stack([draft.log_probs(()) for draft in drafts])
    together = grow(policy, context([0, 1, 2]), roots, expand, drafts[0].draft_tokens)
    for seed, tree in enumerate(together):
        alone = Draft(seed, 6).grow(policy, context([seed]))
        assert tree.tokens.tolist() == alone.tokens.tolist() and tree.parents.tolist() == alone.parents.tolist()
        assert (tree.draft_probs is None) == (alone.draft_probs is None)
        if tree.draft_probs is not None:
            torch.testing.assert_close(tree.draft_probs, alone.draft_probs)
    assert len({tuple(tree.tokens.tolist()) for tree in together}) == 3


@pytest.mark.parametrize(
    "policy", [Chain(depth=4), StaticTree.full(3, 2, 1), DynamicTree(depth=3, top_k=3, total_tokens=9)]
)
def test_each_sequence_of_a_batch_ends_where_it_is_in_doubt(policy: AnyTree) -> None:
    drafts = [Draft(seed, 6) for seed in range(5)]

    def expand(parents: Tensor, tokens: Tensor) -> Tensor:
        return torch.cat([d.expand(parents[i : i + 1], tokens[i : i + 1]) for i, d in enumerate(drafts)])

    roots = torch.stack([draft.log_probs(()) for draft in drafts])
    together = grow(policy, DraftContext(64), roots, expand, drafts[0].draft_tokens, 0.5)
    for seed, tree in enumerate(together):
        alone = Draft(seed, 6).grow(policy, threshold=0.5)
        assert tree.tokens.tolist() == alone.tokens.tolist() and tree.parents.tolist() == alone.parents.tolist()
    assert min(map(len, together)) == 0 < max(map(len, together))
