"""What decoding learns while it decodes: calibration, lengths of lookups, arms; and that it survives a file."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from drafts import Distribution, Text, distribution
from pydantic import ValidationError
from test_engine import make_prompts
from torch import Tensor

from sstf.decode import BanditPolicy, Experience, SpeculativeDecoder, engine
from sstf.decode.cost import KNOTS, CostModel
from sstf.decode.hybrid import LONGEST, HybridDrafter
from sstf.errors import DamagedDataError
from sstf.methods import NgramConfig
from sstf.methods.base import News, ShallowPasses
from sstf.targets import Target
from sstf.trees import AnyTree, Chain, CostAwareTree, DraftContext, DynamicTree
from sstf.types import DraftTree, SamplingParams

NEW = 100


@pytest.fixture(scope="module")
def plain_texts(tiny_target: Target) -> list[tuple[list[int], list[int]]]:
    """Prompts of several lengths with plain answers of `NEW` tokens, end tokens or not."""
    prompts = make_prompts(16)[1:15]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Target, "end_tokens", frozenset())
        answers = SpeculativeDecoder(tiny_target).generate_batch(prompts, SamplingParams(max_new_tokens=NEW), 14)
    return [(prompt, answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]


@pytest.fixture
def texts(
    plain_texts: list[tuple[list[int], list[int]]], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[list[int], list[int]]]:
    """`plain_texts`, for decoding that does not end earlier either."""
    monkeypatch.setattr(Target, "end_tokens", frozenset())
    return plain_texts


# ---- a file ----------------------------------------------------------------------------------------------------------


def bandit(**changes: Any) -> BanditPolicy:
    fields = {"arms": {"short": {"kind": "chain", "depth": 2}, "wide": {"kind": "dynamic", "calibrated": True}}}
    return BanditPolicy.model_validate(fields | {"algorithm": "ucb", "half_life": 30, "dwell": 2} | changes)


def play(experience: Experience, passes: range) -> list[str]:
    """Passes with known rates: `short` gets better, `wide` worse."""
    chooser = experience.bandit(bandit(), 4)
    chosen = []
    for number in passes:
        arm = chooser.choose()
        chosen.append(arm)
        tokens = {"short": 1 + number // 60, "wide": 3 - number // 60, "plain": 1}[arm]
        chooser.observe(arm, tokens, 0.002 if arm != "plain" else 0.001)
        experience.calibration.observe([1, 2], [0, 1], [0.7, 0.2], [1.0, float(number % 3 == 0)])
        experience.costs[4].observe(2, 6, 0.002, 0.011, 0.001)
    return chosen


def test_a_file_goes_on_identically(tmp_path: Path) -> None:
    experience = Experience()
    experience.costs[4] = CostModel([0.01] * len(KNOTS), 0.001, 0.0)
    play(experience, range(70))
    experience.save(tmp_path / "learned.json")
    loaded = Experience.load(tmp_path / "learned.json")
    loaded.save(tmp_path / "unused.json")  # a bandit that nobody asked for is not lost
    assert (tmp_path / "unused.json").read_text() == (tmp_path / "learned.json").read_text()
    loaded = Experience.load(tmp_path / "unused.json")
    went_on, again = play(experience, range(70, 250)), play(loaded, range(70, 250))
    assert went_on == again
    assert len(set(again)) == 3 and again[-20:].count("short") > again[:20].count("short")  # it did learn
    confidence = torch.tensor([[0.7, 0.2]])
    for depth in (1, 2):
        assert torch.equal(
            experience.calibration.probabilities(confidence, depth), loaded.calibration.probabilities(confidence, depth)
        )
    assert experience.costs[4].to_json() == loaded.costs[4].to_json()
    assert not torch.equal(loaded.calibration.probabilities(confidence, 2)[0, 1], confidence[0, 1])


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"format": 2}', '{"format": 1, "calibration": {}, "costs": {}, "bandits": {}}'],
)
def test_damaged_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "learned.json"
    path.write_text(text)
    with pytest.raises(
        DamagedDataError, match=r"learned\.json: what decoding learned cannot be read \(.*\); delete it"
    ):
        Experience.load(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("costs", {"x": {}}), ("costs", {"1": {}}), ("costs", []), ("bandits", []), ("calibration", None), ("format", 0)],
)
def test_damaged_parts(key: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "learned.json"
    Experience().save(path)
    Experience.load(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(DamagedDataError, match="cannot be read"):
        Experience.load(path)
    with pytest.raises(DamagedDataError, match="cannot be read"):
        Experience.load(tmp_path / "missing.json")


def test_a_damaged_bandit_is_found_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "learned.json"
    Experience().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bandits": {"1": {"current": 3}}}))
    with pytest.raises(DamagedDataError, match="delete it, and it is learnt anew"):
        Experience.load(path).bandit(bandit(), 1)


def test_an_arm_named_plain() -> None:
    with pytest.raises(ValidationError, match="an arm is named plain, which stands for decoding without speculation"):
        BanditPolicy.model_validate({"arms": {"plain": {"kind": "chain"}}})


# ---- calibration -----------------------------------------------------------------------------------------------------


def right_by_rank(texts: Sequence[tuple[list[int], list[int]]]) -> tuple[Any, dict[int, float]]:
    """A head that says 0.45 and 0.3 for its two best, where the better is right 2 times in 10 and the other 7 times in
    10; and those shares as they come out in the texts."""
    following: dict[Text, int] = {}
    for prompt, answer in texts:
        whole = (*prompt[1:], *answer)
        for end in range(len(prompt), len(whole)):
            following[whole[:end]] = whole[end]

    def rank_of_right(text: Text) -> int:
        lot = (len(text) * 7 + text[-1] * 3) % 10
        return 0 if lot < 2 else 1 if lot < 9 else 9

    def next_logits(text: Text) -> Tensor:
        row = torch.full((300,), 0.25 / 298).log()
        right = following.get(text, 17)
        best = [(right + 50) % 300, (right + 90) % 300]
        if rank_of_right(text) < 2:
            best[rank_of_right(text)] = right
        row[best[0]], row[best[1]] = torch.tensor([0.45, 0.3]).log()
        return row

    ranks = [rank_of_right(text) for text in following]
    return next_logits, {rank: ranks.count(rank) / len(ranks) for rank in (0, 1)}


@pytest.mark.parametrize(("slots", "lookup"), [(1, False), (4, False), (4, True)])
def test_calibration_learns_each_ranks_share(
    slots: int, lookup: bool, tiny_target: Target, texts: list[tuple[list[int], list[int]]]
) -> None:
    if slots == 1:
        texts = texts[: len(texts) // 2]
    next_logits, shares = right_by_rank(texts)
    assert shares == pytest.approx({0: 0.2, 1: 0.7}, abs=0.05)
    experience = Experience()
    policy = DynamicTree(depth=1, top_k=2, total_tokens=2, calibrated=True, lookup=lookup)
    prompts, params = [prompt for prompt, _ in texts], SamplingParams(max_new_tokens=NEW)

    def decode(policy: AnyTree) -> float:
        decoder = SpeculativeDecoder(tiny_target, distribution(next_logits, 300), policy, experience=experience)
        found = decoder.generate_batch(prompts, params, slots)
        assert [one.token_ids for one in found] == [answer for _, answer in texts]
        lengths = [length for one in found for length in one.accepted_lengths]
        return sum(lengths) / len(lengths)

    def learned() -> list[float]:
        chances: list[float] = experience.calibration.probabilities(torch.tensor([[0.45, 0.3]]), 1)[0].tolist()
        return chances

    assert learned() == pytest.approx([0.45, 0.3], abs=1e-6)
    decode(policy)
    # About 700 passes, or 350, in a cell that remembers some 370: three standard errors.
    assert learned() == pytest.approx([shares[0], shares[1]], abs=0.08)
    # Room for one node: the second best, since it is right more often. It keeps its own rank in what is learned.
    if not lookup:
        assert decode(policy.model_copy(update={"total_tokens": 1})) > 1 + shares[1] - 0.05
        assert learned() == pytest.approx([shares[0], shares[1]], abs=0.12)


# ---- lookup ----------------------------------------------------------------------------------------------------------


class Silent:
    """Drafts nothing."""

    levels = 0

    def start(self, slots: int, capacity: int, passes: ShallowPasses | None = None) -> None: ...

    def restart(self, slot: int) -> None: ...

    def propose(self, news: Sequence[News], policy: AnyTree, context: DraftContext) -> list[DraftTree]:
        return [DraftTree.empty(torch.device("cpu")) for _ in news]


def offered(drafter: HybridDrafter, tokens: list[int], room: int = 64) -> list[int]:
    news = [News(0, tokens, torch.empty(len(tokens), 0))]
    (tree,) = drafter.propose(news, Chain(depth=1, lookup=True), DraftContext(room))
    assert tree.parents.tolist() == list(range(-1, len(tree) - 1))
    return tree.tokens.tolist()


def test_lookups_grow_while_they_come_true_and_shrink_when_not() -> None:
    drafter = HybridDrafter(Silent(), torch.device("cpu"), NgramConfig(min_n=1, max_n=1))
    drafter.start(1, 10_000)
    drafter.restart(0)
    cycle = list(range(251))
    place, lengths = 0, []
    new = [*cycle, *cycle[:1]]
    for _ in range(60):
        place = (place + len(new)) % 251 if lengths else 1
        offer = offered(drafter, new)
        lengths.append(len(offer))
        new = [cycle[(place + i) % 251] for i in range(len(offer) + 1)]  # all of it, and the bonus token
        assert offer == new[:-1]
    assert lengths[0] == 5  # the prior says 3 in 4: 0.75^5 > 0.2 > 0.75^6
    assert lengths == sorted(lengths) and lengths[-1] == LONGEST
    # From now on each token is one that nothing predicted.
    lengths, number = [], place
    for _ in range(120):  # less than a lap, after which these steps would be known as well
        number = (number + 31) % 251
        offer = offered(drafter, [cycle[number]])
        lengths.append(drafter.records[1].length)
        assert 1 <= len(offer) <= lengths[-1]
    assert lengths[-1] == 1 and lengths == sorted(lengths, reverse=True)
    # It never stops trying, so it recovers: what stands in the text now, comes again.
    lengths = []
    for _ in range(400):
        number = (number + 31) % 251
        lengths.append(len(offered(drafter, [cycle[number]])))
    assert lengths[-1] > 3


def test_lookups_stay_within_the_room() -> None:
    drafter = HybridDrafter(Silent(), torch.device("cpu"), NgramConfig(min_n=1, max_n=1))
    drafter.start(1, 100)
    drafter.restart(0)
    assert offered(drafter, [1, 2, 3, 4, 5, 1], room=2) == [2, 3]
    assert offered(drafter, [2], room=1) == [3]
    drafter.restart(0)
    assert offered(drafter, [1]) == []  # another text


def test_whats_looked_up_stays_out_of_calibration_but_a_shared_node_does_not() -> None:
    tree = DraftTree(torch.tensor([5, 6]), torch.tensor([-1, -1]), torch.tensor([0.5, -1.0]))
    experience = Experience()
    engine._observe(experience, tree, engine.Verified([], [], 9))
    assert experience.calibration.error().weight == 1


# ---- arms ------------------------------------------------------------------------------------------------------------


class Slow(Distribution):
    """Sleeps, and is wrong."""

    def propose(self, news: Sequence[News], policy: AnyTree, context: DraftContext) -> list[DraftTree]:
        time.sleep(0.02)
        return super().propose(news, policy, context)


@pytest.mark.parametrize("slots", [1, 3])
def test_a_slow_useless_drafter_is_left_and_hears_everything_when_it_is_tried_again(
    slots: int, tiny_target: Target, texts: list[tuple[list[int], list[int]]]
) -> None:
    layers = (1, 6)

    def never(text: Text) -> Tensor:
        row = torch.zeros(300)
        row[unused[len(text) % 2]] = 5.0
        return row

    unused = sorted({*range(300)} - {token for _, answer in texts for token in answer})
    method = Slow(never, 300, layers)
    policy = BanditPolicy(arms={"slow": Chain(depth=2)}, dwell=2, half_life=6.0)
    decoder = SpeculativeDecoder(tiny_target, engine.DraftHead("slow", method), policy)
    some = texts[:6]
    found = decoder.generate_batch([prompt for prompt, _ in some], SamplingParams(max_new_tokens=NEW), slots)
    assert [one.token_ids for one in found] == [answer for _, answer in some]
    passes = decoder.experience.bandit(policy, slots).passes
    assert passes["plain"] > 3 * passes["slow"] >= 3 * 4
    resumed = 0
    assert len(method.heard) == 6
    for news in method.heard:
        tokens = [token for one in news for token in one.tokens]
        matching = [(p, a) for p, a in some if [*p[1:], *a][: len(tokens)] == tokens and len(tokens) >= len(p)]
        if not tokens:  # a text that was decoded plainly from its beginning to its end
            continue
        ((prompt, answer),) = matching
        ids = torch.tensor([[*prompt, *answer]])
        with torch.inference_mode():
            states = tiny_target.model(ids, output_hidden_states=True, use_cache=False).hidden_states
        rows = torch.cat([states[layer + 1][0] for layer in layers], -1)[: len(tokens)]
        torch.testing.assert_close(torch.cat([one.features for one in news]), rows, atol=1e-4, rtol=1e-4)
        resumed += sum(len(one.tokens) > 1 for one in news[1:])  # nothing is ever accepted: plain passes in between
    assert resumed >= 2


def test_a_pass_without_room_to_draft_counts_as_plain(tiny_target: Target) -> None:
    """Two new tokens: the first is the prefill's, behind the second nothing fits."""
    policy = BanditPolicy(arms={"short": Chain(depth=2)})
    head = distribution(lambda text: torch.zeros(300), 300)
    decoder = SpeculativeDecoder(tiny_target, head, policy)
    decoder.generate([5, 6, 7], 2)
    assert decoder.experience.bandit(policy, 1).passes == {"short": 0, "plain": 1}


def test_costs_are_measured_once_and_the_drafter_starts_after_it(tiny_target: Target) -> None:
    class Watched(Distribution):
        starts: list[tuple[int, int]]

        def start(self, slots: int, capacity: int, passes: ShallowPasses | None = None) -> None:
            self.starts = [*getattr(self, "starts", []), (slots, capacity)]
            super().start(slots, capacity)

        def restart(self, slot: int) -> None:
            super().restart(slot)

        def propose(self, news: Sequence[News], policy: AnyTree, context: DraftContext) -> list[DraftTree]:
            for one in news:
                if one.slot not in self._now:  # measuring does not restart
                    self.restart(one.slot)
            return super().propose(news, policy, context)

    method = Watched(lambda text: torch.zeros(300), 300)
    decoder = SpeculativeDecoder(tiny_target, engine.DraftHead("watched", method), CostAwareTree(depth=2, top_k=2))
    decoder.generate([5] * 190, 40)
    assert decoder.experience.costs.keys() == {1}
    assert method.starts[-1] == (1, 190 + 40 + 2 * 2 + 1)
    measured = len(method.starts)
    decoder.generate([5] * 190, 40)
    assert len(method.starts) == measured + 1
