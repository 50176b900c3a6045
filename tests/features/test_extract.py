"""Stored rows are what the target computes, whatever the batches and interruptions."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_samples import CONFIG, SPEC, contents, extract_to, random_samples

from sstf.data.progress import NoProgress
from sstf.errors import DamagedDataError, TargetError
from sstf.features import ExtractConfig, FeatureSpec, FeatureStore, extract
from sstf.targets import Target
from sstf.types import TokenSample

module = import_module("sstf.features.extract")  # the package exports a function of this name


@pytest.fixture(scope="module")
def samples() -> list[TokenSample]:
    return random_samples()


@pytest.fixture(scope="module")
def unbroken(tiny_target: Target, samples: list[TokenSample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extract_to(tmp_path_factory.mktemp("unbroken"), tiny_target, samples)


@pytest.mark.parametrize("index", [0, 7, 16, 29])
def test_rows_are_those_of_a_direct_forward_pass(
    tiny_target: Target, samples: list[TokenSample], unbroken: Path, index: int
) -> None:
    sample = samples[index]
    rows = FeatureStore(unbroken)[index]
    with torch.inference_mode():
        direct = tiny_target.model(torch.tensor([sample.input_ids]), output_hidden_states=True, use_cache=False)
    # hidden_states[0] are the embeddings, so the output of 0-based layer i is number i + 1.
    expected = torch.cat([direct.hidden_states[layer + 1][0] for layer in SPEC.layers], -1)
    # Half a unit in the last place of bf16 is 2^-9 of the value.
    torch.testing.assert_close(rows.features.float(), expected, rtol=2**-8, atol=1e-4)
    torch.testing.assert_close(rows.hidden.float(), direct.hidden_states[-1][0], rtol=2**-8, atol=1e-4)
    assert rows.input_ids.tolist() == sample.input_ids
    assert rows.loss_mask.tolist() == sample.loss_mask
    trained = [t for t in range(len(sample.input_ids) - 1) if sample.loss_mask[t + 1]]
    others = [t for t in range(len(sample.input_ids)) if t not in trained]
    logits = direct.logits[0].float()
    assert torch.equal(rows.teacher_token[trained], logits[trained].argmax(-1))
    torch.testing.assert_close(rows.teacher_lse[trained], logits[trained].logsumexp(-1), rtol=0, atol=1e-4)
    assert rows.teacher_token[others].eq(-1).all()
    assert rows.teacher_lse[others].eq(0).all()


def test_the_last_stored_state_is_the_input_of_lm_head(tiny_target: Target, unbroken: Path) -> None:
    """After the final norm: the frozen head alone gives the target's choice."""
    store = FeatureStore(unbroken)
    frozen = store.frozen_head()
    agree = total = 0
    for i in range(len(store)):
        rows = store[i]
        known = rows.teacher_token >= 0
        agree += int((frozen.logits(rows.hidden[known]).argmax(-1) == rows.teacher_token[known]).sum())
        total += int(known.sum())
    assert agree / total > 0.99


def test_batching_and_padding_change_nothing(tiny_target: Target, samples: list[TokenSample]) -> None:
    """In float32, before the store rounds to bf16."""
    group = samples[:6]
    with tiny_target.tap(SPEC.layers) as taps:
        together = module._forward(tiny_target, group, taps.features)
        alone = [module._forward(tiny_target, [sample], taps.features)[0] for sample in group]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.features, other.features, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.hidden, other.hidden, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.teacher_lse, other.teacher_lse, rtol=0, atol=1e-5)
        assert torch.equal(one.teacher_token, other.teacher_token)


def test_an_interrupted_extraction_goes_on(
    tiny_target: Target, samples: list[TokenSample], unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, forward = module.write_shard, module._forward
    computed: list[str] = []

    def watched(target: Target, group: list[TokenSample], features: Any) -> Any:
        computed.extend(sample.id for sample in group)
        return forward(target, group, features)

    def failing(folder: Path, index: int, *rest: Any) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return write(folder, index, *rest)

    monkeypatch.setattr(module, "_forward", watched)
    monkeypatch.setattr(module, "write_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        extract_to(tmp_path, tiny_target, samples)
    with pytest.raises(DamagedDataError, match=r"manifest.json is missing: the features are not finished"):
        FeatureStore(tmp_path)
    finished = set(FeatureStore(unbroken).shards[0].ids + FeatureStore(unbroken).shards[1].ids)
    computed.clear()
    monkeypatch.setattr(module, "write_shard", write)
    extract_to(tmp_path, tiny_target, samples)
    assert set(computed) == {sample.id for sample in samples} - finished
    assert len(computed) == len(samples) - len(finished)
    assert contents(tmp_path) == contents(unbroken)


def test_a_shard_cut_off_by_a_kill_is_made_again(
    tiny_target: Target, samples: list[TokenSample], unbroken: Path, tmp_path: Path
) -> None:
    for name, data in contents(unbroken).items():
        if name != "manifest.json":
            (tmp_path / name).write_bytes(data[:-9] if name == "shard-00001.safetensors" else data)
    extract_to(tmp_path, tiny_target, samples)
    assert contents(tmp_path) == contents(unbroken)


def test_layer_taps_are_removed(tiny_target: Target, samples: list[TokenSample], tmp_path: Path) -> None:
    def hooks() -> list[int]:
        return [len(layer._forward_hooks) for layer in tiny_target.layers]

    before = hooks()  # transformers has its own there once somebody asked for hidden states
    extract_to(tmp_path, tiny_target, samples[:2])
    assert hooks() == before


@pytest.mark.parametrize("change", ["ids", "lengths"])
def test_shards_of_other_conversations_are_refused(
    tiny_target: Target, samples: list[TokenSample], unbroken: Path, tmp_path: Path, change: str
) -> None:
    for name, data in contents(unbroken).items():
        (tmp_path / name).write_bytes(data)
    last = samples[-1]
    other = (
        TokenSample("other", last.input_ids, last.loss_mask)
        if change == "ids"
        else TokenSample(last.id, last.input_ids[:-1], last.loss_mask[:-1])
    )
    with pytest.raises(DamagedDataError, match=r"shard-0\d+\.safetensors holds other conversations") as caught:
        extract_to(tmp_path, tiny_target, [*samples[:-1], other])
    assert caught.value.exit_code == 3


def test_what_the_target_lacks_is_named(tiny_target: Target, samples: list[TokenSample], tmp_path: Path) -> None:
    long = TokenSample("long", [5] * 257, [True] * 257)
    with pytest.raises(TargetError, match=r"257 tokens .* context of 256; lower data.max_length"):
        extract_to(tmp_path, tiny_target, [*samples, long])
    with pytest.raises(TargetError, match=r"layers 0 to 7; cannot read layers \[1, 8\]"):
        extract(tiny_target, samples, FeatureSpec((1, 8)), CONFIG, tmp_path, NoProgress())


def test_shards_keep_the_order_and_the_size(samples: list[TokenSample], unbroken: Path) -> None:
    store = FeatureStore(unbroken)
    assert store.ids == [sample.id for sample in samples]
    assert store.lengths == [len(sample.input_ids) for sample in samples]
    assert store.trained == [sum(sample.loss_mask) for sample in samples]
    assert all(sum(shard.lengths) <= CONFIG.shard_tokens for shard in store.shards)
    assert len(store.shards) >= 3
    assert store.layers == SPEC.layers
    assert store.tokens == sum(store.lengths)
    for i, sample in enumerate(samples):
        ids, mask = store.tokens_of(i)
        assert (ids.tolist(), mask.tolist()) == (sample.input_ids, sample.loss_mask)


def test_a_conversation_longer_than_a_batch_or_a_shard(tiny_target: Target, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 290, (250,), generator=generator).tolist()
    long = TokenSample("long", ids, [False] * 3 + [True] * 247)
    config = ExtractConfig(shard_tokens=256, batch_tokens=64)
    store = FeatureStore(extract_to(tmp_path, tiny_target, [*random_samples(2), long], config))
    assert len(store[2].features) == 250
