"""Rollouts of real heads: the target's text, and where each pass stood and what it rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sstf.data.progress import NoProgress
from sstf.decode import SpeculativeDecoder, Step
from sstf.errors import DamagedDataError, DataError
from sstf.features import Anchor, ExtractConfig, OnlineFeatures, Replay, rejected_map
from sstf.methods import METHODS, TrainableMethod, build_method
from sstf.methods.base import News
from sstf.methods.checkpoint import DraftHead
from sstf.targets import Target
from sstf.train.on_policy import (
    ANCHORS,
    OnPolicyConfig,
    Rollout,
    accepted_length,
    anchors_of,
    choose_prompts,
    read_rollouts,
    roll_out,
    write_rollouts,
)
from sstf.trees import Chain, DraftContext
from sstf.types import TokenSample

CONFIG = OnPolicyConfig(max_new_tokens=20, slots=3, conversations=5)
# Settings under which each method drafts three tokens for the tiny target.
SETTINGS: dict[str, dict[str, Any]] = {
    "dflash": {"block_size": 4, "num_layers": 1},
    "domino": {"block_size": 4, "num_layers": 1, "gru_size": 8, "rank": 4},
    "dspark": {"block_size": 3, "num_layers": 1, "rank": 4, "verify_above": 0.0},
    "eagle": {"ttt_steps": 3},
    "eagle3": {"ttt_steps": 3, "draft_vocab_size": 300},
    "early_exit": {"depth": 3, "exit_layer": 6, "threshold": 0.0},
    "medusa": {"heads": 3},
    "p_eagle": {"depth": 3},
}


def prompts(count: int = 5) -> list[TokenSample]:
    generator = torch.Generator().manual_seed(2)
    lengths = [1 + 3 * i % 8 for i in range(count)]
    return [
        TokenSample(f"p{i}", torch.randint(3, 290, (size,), generator=generator).tolist(), [False] * size)
        for i, size in enumerate(lengths)
    ]


def head_of(kind: str, target: Target) -> DraftHead:
    """Untrained, as its method begins: one that copies the target here and there."""
    method: Any = build_method(METHODS[kind][0].model_validate({"kind": kind} | SETTINGS[kind]))
    torch.manual_seed(0)
    module = method.build_head(target.spec, target.frozen_head, torch.arange(target.spec.vocab_size))
    return DraftHead(kind, method, module.to(target.device).eval())


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_the_table_of_the_docstring() -> None:
    steps = [Step([104], 0, 0), Step([105, 106], 1, 3), Step([107, 108, 109, 110], 3, 3), Step([111], 0, 3)]
    anchors = anchors_of(4, steps)
    assert anchors == (Anchor(3, 1), Anchor(5, None), Anchor(9, 0))
    table = rejected_map(anchors, 3, 10, 0.5)  # the last of ten rows teaches x_11, the last token
    assert table[:, 3].tolist() == [0.0, 1.0, 0.5]
    assert table[:, 9].tolist() == [1.0, 0.0, 0.0]
    assert float(table.sum()) == 2.5


def test_a_pass_that_was_cut_rejected_nothing() -> None:
    """An end token among the accepted drafts; the limit before the bonus token; fewer drafted than could be."""
    ended, limited = Step([7, 2], 2, 3), Step([8], 1, 3)
    assert anchors_of(5, [Step([6], 0, 0), ended]) == (Anchor(4, None),)
    assert anchors_of(5, [Step([6], 0, 0), limited]) == (Anchor(4, None),)
    assert anchors_of(5, [Step([6], 0, 0), Step([9], 0, 0)]) == (Anchor(4, None),)


@given(
    passes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8),
    prompt=st.integers(1, 6),
    positions=st.integers(1, 5),
    decay=st.floats(0.1, 1),
)
def test_weights_fall_from_the_first_rejected_draft_on(
    passes: list[tuple[int, int]], prompt: int, positions: int, decay: float
) -> None:
    steps = [Step([0], 0, 0)] + [Step([0] * (min(a, d) + 1), min(a, d), d) for a, d in passes]
    tokens = prompt + sum(len(step.tokens) for step in steps)
    anchors = anchors_of(prompt, steps)
    table = rejected_map(anchors, positions, tokens - 2, decay)
    for anchor, step in zip(anchors, steps[1:], strict=True):
        for i in range(positions):
            behind = i - step.accepted
            there = anchor.row + i < tokens - 2
            weight = decay**behind if step.accepted < step.drafted and behind >= 0 and there else 0.0
            assert float(table[i, anchor.row]) == pytest.approx(weight)
    assert int((table.sum(0) > 0).sum()) <= len(anchors)


# ---- real rollouts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(SETTINGS))
def test_text_is_the_targets_and_drafts_were_rejected_where_it_says(kind: str, tiny_target: Target) -> None:
    head = head_of(kind, tiny_target)
    rollouts = roll_out(tiny_target, head, prompts(), 3, CONFIG, 0, NoProgress())
    plain = SpeculativeDecoder(tiny_target)
    assert len(rollouts) >= 4
    refused = 0
    for rollout in rollouts:
        ids, mask = rollout.sample.input_ids, rollout.sample.loss_mask
        first = mask.index(True)
        assert all(mask[first:])
        assert ids[first:] == plain.generate(ids[:first], CONFIG.max_new_tokens).token_ids
        rows = [anchor.row for anchor in rollout.anchors]
        assert rows[0] == first - 1 and rows == sorted(set(rows)) and rows[-1] <= len(ids) - 3
        refused += sum(anchor.rejected is not None for anchor in rollout.anchors)
    assert refused > 5
    assert accepted_length(rollouts) >= 1


def redrafted(head: DraftHead, target: Target, text: list[int]) -> list[int]:
    """What the head drafts after a whole text, with the features of one plain pass over it."""
    spec = head.method.feature_spec(target.spec)
    with torch.inference_mode(), target.tap(spec.layers) as taps:
        target.model(torch.tensor([text]), use_cache=False)
        features = taps.features()[0, :-1].clone()
    drafter = head.method.drafter(head.module, target.device)
    drafter.start(1, len(text) + 8)
    drafter.restart(0)
    (tree,) = drafter.propose([News(0, text[1:], features)], Chain(depth=3), DraftContext(3, None))
    return tree.tokens.tolist()


@pytest.mark.parametrize("kind", sorted(set(SETTINGS) - {"early_exit"}))  # which drafts with the target's own passes
def test_anchors_are_those_of_drafting_again(kind: str, tiny_target: Target) -> None:
    head = head_of(kind, tiny_target)
    rollouts = roll_out(tiny_target, head, prompts(3), 3, CONFIG, 0, NoProgress())
    checked = 0
    for rollout in rollouts:
        ids = rollout.sample.input_ids
        for anchor in rollout.anchors:
            follows = ids[anchor.row + 2 :]
            if len(follows) < 4:
                continue  # near the limit fewer are drafted
            drafts = redrafted(head, tiny_target, ids[: anchor.row + 2])
            wrong = [i for i, (draft, token) in enumerate(zip(drafts, follows, strict=False)) if draft != token]
            assert anchor.rejected == (wrong[0] if wrong else None)
            checked += 1
    assert checked > 8


def test_drawn_texts_are_those_of_their_seed(tiny_target: Target) -> None:
    config = CONFIG.model_copy(update={"temperature": 1.0})
    head = head_of("eagle3", tiny_target)
    one, same, other = (roll_out(tiny_target, head, prompts(), 3, config, seed, NoProgress()) for seed in (1, 1, 2))
    assert one == same and one != other


# ---- prompts and files -----------------------------------------------------------------------------------------------


def source_of(target: Target, samples: list[TokenSample]) -> OnlineFeatures:
    method = build_method(METHODS["eagle3"][0]())
    return OnlineFeatures(target, samples, method.feature_spec(target.spec), ExtractConfig())


def conversations(count: int) -> list[TokenSample]:
    return [TokenSample(f"c{i}", [5 + i, 6, 7, 8, 9], [False, False, True, False, True]) for i in range(count)]


def test_rounds_go_through_the_conversations(tiny_target: Target) -> None:
    source = source_of(tiny_target, conversations(7))
    config = OnPolicyConfig(conversations=3, max_new_tokens=4)
    rounds = [choose_prompts(source, range(1, 7), config, number, 0, 256) for number in (1, 2, 3)]
    names = [[prompt.id for prompt in prompts] for prompts in rounds]
    assert sorted(names[0] + names[1]) == [f"c{i}" for i in range(1, 7)] and names[2] == names[0]
    assert {len(prompt.input_ids) for prompts in rounds for prompt in prompts} == {2}
    everything = choose_prompts(source, range(7), OnPolicyConfig(max_new_tokens=4), 1, 0, 256)
    assert len(everything) == 7
    with pytest.raises(DataError, match="none of 7 training conversations has a prompt with room for"):
        choose_prompts(source, range(7), OnPolicyConfig(max_new_tokens=255), 1, 0, 256)


def test_rollouts_are_read_back_whole_or_not_at_all(tmp_path: Path) -> None:
    sample = TokenSample("a", [1, 2, 3, 4], [False, False, True, True])
    rollouts = [Rollout(sample, (Anchor(1, 0),)), Rollout(sample, (Anchor(1, None), Anchor(2, 1)))]
    assert read_rollouts(tmp_path) is None
    write_rollouts(tmp_path, rollouts)
    assert read_rollouts(tmp_path) == rollouts
    text = (tmp_path / ANCHORS).read_bytes()
    (tmp_path / ANCHORS).write_bytes(text.replace(b"null", b"1"))
    with pytest.raises(DamagedDataError, match=r"anchors.json: not what was written; delete"):
        read_rollouts(tmp_path)


# ---- replay ----------------------------------------------------------------------------------------------------------


def test_a_replay_carries_the_maps_of_its_rollouts_and_the_held_out_texts(tiny_target: Target) -> None:
    sample = TokenSample("a", [4, 5, 6, 7, 8, 9], [False, False, True, True, True, True])
    other = TokenSample("b", [4, 5, 6, 7, 8], [False, True, True, True, True])
    played = source_of(tiny_target, [sample, other])
    ordinary = source_of(tiny_target, conversations(4))
    anchors = [(Anchor(1, 1), Anchor(3, None)), (Anchor(0, 0),)]
    replay = Replay(played, anchors, ordinary, [3, 1], positions=3, decay=0.5, weight=2.0)
    assert (replay.ids, replay.held_out) == (["a", "b", "c3", "c1"], [2, 3])
    batch = replay.batch([1, 0])
    assert batch.lengths == (3, 4) and batch.rejected is not None
    expected = [[2, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 2, 0, 0], [0.5, 0, 0, 0, 1, 0, 0]]
    assert batch.rejected.tolist() == expected
    assert replay.batch([2, 3]).rejected is None
    assert replay.tokens_of(2)[0].tolist() == [8, 6, 7, 8, 9]
    with pytest.raises(ValueError, match="ask for them apart"):
        replay.batch([0, 2])
    made = replay.made_from()
    assert made["data"] == played.made_from()["data"] and made["prompts_from"] == ordinary.made_from()["data"]
    assert made["replayed"] != Replay(played, anchors, ordinary, [3], 3, 0.6, 2.0).made_from()["replayed"]


def test_every_trained_method_is_rolled_out() -> None:
    trained = [kind for kind, (config, _) in METHODS.items() if isinstance(build_method(config()), TrainableMethod)]
    assert sorted(SETTINGS) == sorted(trained)
