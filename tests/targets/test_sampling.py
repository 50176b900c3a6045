from __future__ import annotations

import pytest
import torch

from sstf.data.regenerate import Sampler
from sstf.errors import DataError, TargetError
from sstf.targets import Target
from sstf.targets.sampling import BatchSampler
from sstf.types import Sampled, SamplingParams
from sstf.warping import warp


def make_prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, 300, (1 + (i * 5) % 23,), generator=generator).tolist() for i in range(count)]


def greedy(target: Target, prompt: list[int], limit: int) -> Sampled:
    ids = torch.tensor([prompt])
    out = target.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, pad_token_id=0
    )
    answer = out[0, len(prompt) :].tolist()
    return Sampled(answer, answer[-1] == 2)


@pytest.mark.parametrize("slots", [1, 3, 40])
def test_greedy_is_what_transformers_says(slots: int, tiny_target: Target) -> None:
    """Prompts of 1 to 21 tokens, limits of 1 to 12, slots that are refilled while others run."""
    prompts = make_prompts(14)
    limits = [1 + (i * 5) % 12 for i in range(14)]
    params = [SamplingParams(max_new_tokens=limit) for limit in limits]
    written: list[int] = []
    found = BatchSampler(tiny_target).sample(prompts, params, slots, written.append)
    assert found == [greedy(tiny_target, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    assert sum(written) == sum(len(one.token_ids) for one in found)


def test_end_token(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = make_prompts(6)
    params = [SamplingParams(max_new_tokens=10)] * 6
    whole = BatchSampler(tiny_target).sample(prompts, params, 2)
    ends = frozenset({whole[0].token_ids[3], whole[4].token_ids[9]})
    monkeypatch.setattr(Target, "end_tokens", ends)
    for before, after in zip(whole, BatchSampler(tiny_target).sample(prompts, params, 2), strict=True):
        stop = next((i for i, token in enumerate(before.token_ids) if token in ends), None)
        assert after == (before if stop is None else Sampled(before.token_ids[: stop + 1], True))


def test_drawn_tokens_depend_on_the_seed_and_not_on_the_neighbours(tiny_target: Target) -> None:
    prompts = make_prompts(9)
    params = [
        SamplingParams(temperature=0.0 if i == 4 else 0.5 + 0.1 * i, top_p=0.9, top_k=50, max_new_tokens=8, seed=i)
        for i in range(9)
    ]
    sampler = BatchSampler(tiny_target)
    expected = sampler.sample(prompts, params, 9)
    assert sampler.sample(prompts, params, 9) == expected
    for slots in (1, 2, 4):
        assert sampler.sample(prompts, params, slots) == expected
    assert sampler.sample(prompts[3:4], params[3:4], 1) == expected[3:4]
    assert expected[4] == greedy(tiny_target, prompts[4], 8)
    other = sampler.sample(
        [prompts[0]] * 5, [SamplingParams(temperature=1.0, max_new_tokens=8, seed=s) for s in range(5)], 5
    )
    assert len({tuple(one.token_ids) for one in other}) == 5


def test_the_first_token_is_drawn_from_the_warped_distribution(tiny_target: Target) -> None:
    prompt = [5, 6, 7]
    settings = SamplingParams(temperature=0.6, top_p=0.8, top_k=20, max_new_tokens=1)
    draws = 3000
    params = [SamplingParams(0.6, 0.8, 20, 1, seed) for seed in range(draws)]
    found = BatchSampler(tiny_target).sample([prompt] * draws, params, 500)
    counts = torch.bincount(torch.tensor([one.token_ids[0] for one in found]), minlength=300).double()
    with torch.inference_mode():
        logits = tiny_target.model(torch.tensor([prompt])).logits[0, -1]
    probs = warp(logits, settings.temperature, settings.top_p, settings.top_k).double()
    assert not bool((counts[probs == 0] > 0).any())
    expected = probs * draws
    common = expected >= 8
    assert int(common.sum()) > 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    statistic = ((observed - wanted) ** 2 / wanted.clamp_min(1e-9)).sum()
    freedom = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64)
    assert float(torch.special.gammaincc(freedom, statistic / 2)) > 1e-3


def test_limits(tiny_target: Target) -> None:
    sampler: Sampler = BatchSampler(tiny_target)
    assert sampler.sample([], [], 4) == []
    with pytest.raises(DataError, match="prompt 1 has 0 tokens; expected between 1 and 246"):
        sampler.sample([[5], []], [SamplingParams(max_new_tokens=10)] * 2, 4)
    with pytest.raises(
        DataError, match=r"prompt 0 has 247 tokens; expected between 1 and 246 \(the target's context of 256"
    ):
        sampler.sample([[5] * 247], [SamplingParams(max_new_tokens=10)], 4)
    with pytest.raises(DataError, match="prompt 0 has max_new_tokens 0; expected at least 1"):
        sampler.sample([[5]], [SamplingParams(max_new_tokens=0)], 4)
    assert len(sampler.sample([[5] * 246], [SamplingParams(max_new_tokens=10)], 4)[0].token_ids) <= 10


def test_results_do_not_depend_on_what_the_sampler_wrote_before(tiny_target: Target) -> None:
    prompts = make_prompts(5)
    params = [SamplingParams(temperature=0.7 * (i % 2), top_p=0.9, max_new_tokens=6, seed=i) for i in range(5)]
    expected = BatchSampler(tiny_target).sample(prompts, params, 3)
    used = BatchSampler(tiny_target)
    longer = [SamplingParams(max_new_tokens=40)] * 5
    used.sample([prompt * 4 for prompt in prompts], longer, 3)  # leaves a larger cache, full of other texts
    cache = used._cache
    assert used.sample(prompts, params, 3) == expected
    assert used._cache is cache


def test_a_recurrent_target_is_refused(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_target, "layer_kinds", ("attention", "recurrent"))
    with pytest.raises(TargetError, match="let a server do it"):
        BatchSampler(tiny_target)
