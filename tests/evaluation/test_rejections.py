"""Where drafts fail, and why: by hand, and against the target's own distributions."""

from __future__ import annotations

import math

import pytest
import torch

from sstf.decode import SpeculativeDecoder
from sstf.evaluation.rejections import (
    CAUSES,
    KEPT,
    Explainer,
    Pass,
    Rejected,
    distributions,
    rejected,
    script,
)
from sstf.targets import Target
from sstf.types import DraftTree


def tree(tokens: list[int], parents: list[int]) -> DraftTree:
    return DraftTree(torch.tensor(tokens), torch.tensor(parents))


def test_rejections_by_hand() -> None:
    #        root -> 5 -> 7
    #             -> 6
    two = tree([5, 6, 7], [-1, -1, 0])
    passes = [
        Pass(None, [4]),  # the prefill
        Pass(two, [5, 8]),  # 5 accepted, 7 rejected for 8: row 2, position 2
        Pass(two, [9]),  # nothing accepted: row 3, position 1, of 5 and 6 the better
        Pass(two, [6, 3]),  # a leaf: nothing was offered behind it
        Pass(two, [5, 7, 1]),  # all accepted
        Pass(two, [5]),  # the text was cut off here: nothing failed
        Pass(DraftTree.empty(torch.device("cpu")), [2]),
    ]
    assert list(rejected(passes)) == [Rejected(2, 2, 8, 7), Rejected(3, 1, 9, 5)]


def test_every_cause(tiny_target: Target) -> None:
    """300 tokens; ids 3 to 258 are bytes. Each pass offers token 40 for an emitted one."""
    vocabulary = torch.ones(300, dtype=torch.bool)
    vocabulary[41] = False
    cyrillic = tiny_target.tokenizer("ж", add_special_tokens=False)["input_ids"]  # two bytes
    other = tiny_target.tokenizer("a", add_special_tokens=False)["input_ids"][0]
    emitted = [41, 2, 50, 51, *cyrillic, other]
    flat, sure = torch.zeros(300), torch.full((300,), -20.0)

    def peak(token: int, **more: float) -> torch.Tensor:
        row = sure.clone()
        row[token] = 5.0
        for name, value in more.items():
            row[int(name[1:])] = value
        return row

    flat[51] = 1.0
    rows = torch.stack([peak(41), peak(2), peak(50, t40=4.9), flat, peak(cyrillic[0]), peak(cyrillic[1]), peak(other)])
    explainer = Explainer(tiny_target, vocabulary)
    passes = [Pass(tree([40], [-1]), [token]) for token in emitted]
    explainer.add("chain", "x", "a", [10, 11], passes, range(len(rows)), rows)
    found = explainer.rejections()
    assert [one.causes[0] for one in found.kept] == [
        "outside the draft vocabulary", "special token", "near tie", "target uncertain", "other", "script", "other",
    ]  # fmt: skip
    assert found.counts == {"chain": dict(zip(CAUSES, [1, 1, 1, 1, 1, 0, 2], strict=True))}
    tie = found.kept[2]
    assert tie.drafted_prob / tie.emitted_prob == pytest.approx(math.exp(-0.1), rel=1e-4)
    assert found.kept[3].entropy == pytest.approx(-(flat.softmax(0) * flat.log_softmax(0)).sum().item(), rel=1e-5)
    assert found.kept[5].position == 1


def test_deep_positions_and_several_causes(tiny_target: Target) -> None:
    chain = tree([60, 61, 62], [-1, 0, 1])
    row = torch.full((300,), -20.0)
    row[2], row[62] = 5.0, 5.0
    explainer = Explainer(tiny_target, None)
    explainer.add("chain", "x", "a", [10], [Pass(chain, [60, 61, 2])], [2], row[None])
    [one] = explainer.rejections().kept
    assert (one.position, one.causes) == (3, ("special token", "near tie", "deep position"))


def test_the_rejections_shown_are_spread_over_all(tiny_target: Target) -> None:
    explainer = Explainer(tiny_target, None)
    passes = [Pass(tree([40], [-1]), [45])] * (KEPT + 1)
    explainer.add("chain", "x", "a", [10], passes, range(len(passes)), torch.zeros(len(passes), 300))
    found = explainer.rejections()
    assert sum(found.counts["chain"].values()) == KEPT + 1
    assert len(found.kept) == KEPT // 2 + 1


def test_distributions_are_those_that_decoding_used(tiny_target: Target) -> None:
    prompt = [5, 9, 14, 30, 7]
    made = SpeculativeDecoder(tiny_target).generate(prompt, 150)
    best = []
    with torch.inference_mode():
        for rows, logits in distributions(tiny_target, prompt, made.token_ids, range(150)):
            assert rows == list(range(len(best), len(best) + len(logits)))
            best += logits.argmax(-1).tolist()
        [(_, some)] = distributions(tiny_target, prompt, made.token_ids, [3, 70])
    assert best == made.token_ids
    assert some.argmax(-1).tolist() == [made.token_ids[3], made.token_ids[70]]
    assert list(distributions(tiny_target, prompt, made.token_ids, [])) == []


def test_scripts() -> None:
    assert [script(text) for text in ("好的", " the", "42", "жук", "ﬁ", "")] == [
        "CJK", "LATIN", "", "CYRILLIC", "LATIN", "",
    ]  # fmt: skip
