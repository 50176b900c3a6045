"""Stored rows are what the target computes, whatever the batches and interruptions."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_samples import CONFIG, SPEC, contents, extract_to, random_samples
from hypothesis import given
from hypothesis import strategies as st

from sstf.data.progress import NoProgress
from sstf.errors import DamagedDataError, TargetError
from sstf.features import ExtractConfig, FeatureSpec, FeatureStore, HiddenSignal, TopKSignal, extract, shards, verify
from sstf.features.codecs import CodecName, CompressionName
from sstf.features.shards import row_max
from sstf.targets import Target
from sstf.types import HiddenTeacher, TokenSample, TopKTeacher

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
    assert rows.input_ids.tolist() == sample.input_ids
    assert rows.loss_mask.tolist() == sample.loss_mask
    trained = [t for t in range(len(sample.input_ids) - 1) if sample.loss_mask[t + 1]]
    others = [t for t in range(len(sample.input_ids)) if t not in trained]
    logits = direct.logits[0].float()
    assert torch.equal(rows.teacher_token[trained], logits[trained].argmax(-1))
    assert rows.teacher_token[others].eq(-1).all()
    assert isinstance(rows.teacher, HiddenTeacher)
    # Only where the next token is trained.
    torch.testing.assert_close(rows.teacher.hidden.float(), direct.hidden_states[-1][0][trained], rtol=2**-8, atol=1e-4)
    torch.testing.assert_close(rows.teacher.lse, logits[trained].logsumexp(-1), rtol=0, atol=1e-4)


def test_the_last_stored_state_is_the_input_of_lm_head(tiny_target: Target, unbroken: Path) -> None:
    """After the final norm: the frozen head alone gives the target's choice."""
    store = FeatureStore(unbroken)
    frozen = store.frozen_head()
    agree = total = 0
    for i in range(len(store)):
        rows = store[i]
        known = rows.teacher_token >= 0
        assert isinstance(rows.teacher, HiddenTeacher)
        agree += int((frozen.logits(rows.teacher.hidden).argmax(-1) == rows.teacher_token[known]).sum())
        total += int(known.sum())
    assert agree / total > 0.99


def test_batching_and_padding_change_nothing(tiny_target: Target, samples: list[TokenSample]) -> None:
    """In float32, before the store rounds to bf16."""
    group = samples[:6]
    with tiny_target.tap(SPEC.layers) as taps:
        together = shards.read_features(tiny_target, group, taps.features, HiddenSignal())
        alone = [shards.read_features(tiny_target, [one], taps.features, HiddenSignal())[0] for one in group]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.features, other.features, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.teacher.hidden, other.teacher.hidden, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.teacher.lse, other.teacher.lse, rtol=0, atol=1e-5)
        assert torch.equal(one.teacher_token, other.teacher_token)


def test_an_interrupted_extraction_goes_on(
    tiny_target: Target, samples: list[TokenSample], unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, forward = shards.write_shard, shards.read_features
    computed: list[str] = []

    def watched(target: Target, group: list[TokenSample], *rest: Any) -> Any:
        computed.extend(sample.id for sample in group)
        return forward(target, group, *rest)

    def failing(folder: Path, index: int, *rest: Any) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return write(folder, index, *rest)

    monkeypatch.setattr(shards, "read_features", watched)
    monkeypatch.setattr(shards, "write_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        extract_to(tmp_path, tiny_target, samples)
    with pytest.raises(DamagedDataError, match=r"manifest.json is missing: the features are not finished"):
        FeatureStore(tmp_path)
    finished = set(FeatureStore(unbroken).shards[0].ids + FeatureStore(unbroken).shards[1].ids)
    computed.clear()
    monkeypatch.setattr(shards, "write_shard", write)
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
def test_other_data_is_refused(
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
    with pytest.raises(
        DamagedDataError, match=r"shard-00000\.safetensors was made with data \w+, this run has"
    ) as caught:
        extract_to(tmp_path, tiny_target, [*samples[:-1], other])
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"codec": "fp8"}, "with codec bf16, this run has fp8"),
        ({"compression": "zstd"}, "with compression none, this run has zstd"),
        ({"teacher": TopKSignal(k=8)}, r"with teacher \{'kind': 'hidden'\}, this run has \{'kind': 'topk', 'k': 8\}"),
        ({"batch_tokens": 64}, "with batch_tokens 128, this run has 64"),
    ],
)
def test_other_settings_are_refused(
    tiny_target: Target, samples: list[TokenSample], unbroken: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    folder = shutil.copytree(unbroken, tmp_path / "store")
    with pytest.raises(DamagedDataError, match=rf"shard-00000\.safetensors was made {says}; delete"):
        extract_to(folder, tiny_target, samples, CONFIG.model_copy(update=change))
    assert contents(folder) == contents(unbroken)


def test_another_target_layers_or_template_are_refused(
    tiny_target: Target, samples: list[TokenSample], unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(unbroken, tmp_path / "store")
    with pytest.raises(DamagedDataError, match=r"made with layers \[1, 3, 4\], this run has \[1, 2, 4\]"):
        extract(tiny_target, samples, FeatureSpec((1, 2, 4)), CONFIG, folder, NoProgress())
    with monkeypatch.context() as patch:
        patch.setattr(tiny_target, "spec", replace(tiny_target.spec, fingerprint="0" * 16))
        with pytest.raises(DamagedDataError, match=r"made with target tiny \(\w+\), this run has tiny \(0+\)"):
            extract_to(folder, tiny_target, samples)
    with monkeypatch.context() as patch:
        patch.setattr(tiny_target.tokenizer, "chat_template", "{{ messages }}")
        with pytest.raises(DamagedDataError, match="made with chat_template"):
            extract_to(folder, tiny_target, samples)
    extract_to(folder, tiny_target, samples)
    assert contents(folder) == contents(unbroken)


def test_frozen_parts_of_another_target_do_not_stay(
    tiny_target: Target, samples: list[TokenSample], unbroken: Path, tmp_path: Path
) -> None:
    frozen = replace(tiny_target.frozen_head, final_norm=tiny_target.frozen_head.final_norm + 1)
    frozen.save(tmp_path / "frozen.safetensors")
    extract_to(tmp_path, tiny_target, samples)
    assert contents(tmp_path) == contents(unbroken)


def test_shards_can_be_made_one_by_one_in_any_order(
    tiny_target: Target, samples: list[TokenSample], unbroken: Path, tmp_path: Path
) -> None:
    """As several processes would: each shard by itself."""
    origin = module.origin_of(tiny_target, samples, SPEC, CONFIG)
    groups = shards.shards_of(samples, CONFIG.shard_tokens)
    order = [2, 0, *range(3, len(groups)), 1]
    infos = {i: shards.make_shard(tiny_target, groups[i], origin, tmp_path, lambda tokens: None) for i in order}
    module.close_store(tiny_target, origin, tmp_path, [infos[i] for i in range(len(groups))])
    assert contents(tmp_path) == contents(unbroken)


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize(("codec", "error"), [("bf16", 2**-8), ("int8", 0.02), ("fp8", 0.05)])
def test_every_codec_gives_back_what_was_extracted(
    tiny_target: Target,
    samples: list[TokenSample],
    unbroken: Path,
    tmp_path: Path,
    codec: CodecName,
    compression: CompressionName,
    error: float,
) -> None:
    config = CONFIG.model_copy(update={"codec": codec, "compression": compression})
    store = FeatureStore(extract_to(tmp_path, tiny_target, samples, config))
    assert verify(tmp_path, NoProgress(), samples).sound
    exact = FeatureStore(unbroken)
    for i in range(len(samples)):
        rows, expected = store[i], exact[i]
        assert torch.equal(rows.input_ids, expected.input_ids) and torch.equal(rows.loss_mask, expected.loss_mask)
        assert torch.equal(rows.teacher_token, expected.teacher_token)
        assert isinstance(rows.teacher, HiddenTeacher) and isinstance(expected.teacher, HiddenTeacher)
        assert torch.equal(rows.teacher.lse, expected.teacher.lse)
        for found, wanted in ((rows.features, expected.features), (rows.teacher.hidden, expected.teacher.hidden)):
            assert found.dtype == torch.bfloat16
            distance = (found.float() - wanted.float()).norm(dim=-1)
            assert bool((distance <= error * wanted.float().norm(dim=-1)).all())


def test_the_record_knows_the_size_beforehand(tiny_target: Target, samples: list[TokenSample], tmp_path: Path) -> None:
    """All but the names of the tensors."""
    config = CONFIG.model_copy(update={"codec": "int8", "teacher": TopKSignal(k=16)})
    store = FeatureStore(extract_to(tmp_path, tiny_target, samples, config))
    taught = sum(store.trained)  # no first token is trained here but where the prompt has no token
    taught -= sum(sample.loss_mask[0] for sample in samples)
    headers = 0
    for shard in store.shards:
        data = (tmp_path / shard.file).read_bytes()
        headers += 8 + int.from_bytes(data[:8], "little")
    size = sum(shard.size for shard in store.shards)
    assert store.origin.record().bytes_of(store.tokens, taught) == size - headers


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_top_k_is_that_of_a_direct_forward_pass(
    tiny_target: Target, samples: list[TokenSample], tmp_path: Path, compression: CompressionName
) -> None:
    config = CONFIG.model_copy(update={"teacher": TopKSignal(k=12), "compression": compression})
    store = FeatureStore(extract_to(tmp_path, tiny_target, samples, config))
    assert verify(tmp_path, NoProgress(), samples).sound
    for i in (0, 7, 29):
        sample, rows = samples[i], store[i]
        with torch.inference_mode():
            logits = tiny_target.model(torch.tensor([sample.input_ids]), use_cache=False).logits[0].double()
        trained = [t for t in range(len(sample.input_ids) - 1) if sample.loss_mask[t + 1]]
        expected = torch.log_softmax(logits[trained], -1).topk(12, -1)
        assert isinstance(rows.teacher, TopKTeacher)
        assert torch.equal(rows.teacher.tokens, expected.indices)
        # float16 has eleven bits: half a unit in the last place is 2^-11 of the value at most.
        torch.testing.assert_close(rows.teacher.log_probs.double(), expected.values, rtol=2**-11, atol=1e-5)
        assert torch.equal(rows.teacher_token[trained], expected.indices[:, 0])
        assert int((rows.teacher_token >= 0).sum()) == len(trained)


def test_equal_logits_come_by_their_ids() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 3.0], [0.0, 0.0, 5.0, 0.0, 0.0, 0.0]])
    values, ids = shards.top_k(logits, 5)
    assert ids[0].tolist() == [1, 3, 5, 2, 4] and values[0].tolist() == [3, 3, 3, 2, 2]
    assert ids[1, 0] == 2 and ids[1, 1:].tolist() == sorted(ids[1, 1:].tolist())
    many = torch.randint(4, (50, 40), generator=torch.Generator().manual_seed(1)).float()
    assert torch.equal(shards.top_k(many, 40)[1][:, 0], torch.tensor([row.index(max(row)) for row in many.tolist()]))


def test_top_k_is_no_more_than_the_vocabulary(tiny_target: Target, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"teacher": TopKSignal(k=1000)})
    store = FeatureStore(extract_to(tmp_path, tiny_target, random_samples(3), config))
    assert store.origin.teacher == TopKSignal(k=300)
    teacher = store[0].teacher
    assert isinstance(teacher, TopKTeacher)
    torch.testing.assert_close(
        teacher.log_probs.double().exp().sum(-1), torch.ones(len(teacher.tokens)).double(), rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("teacher", [HiddenSignal(), TopKSignal(k=3)])
def test_a_conversation_that_teaches_nothing(tiny_target: Target, tmp_path: Path, teacher: Any) -> None:
    samples = [TokenSample("none", [5, 6, 7], [False] * 3), TokenSample("one", [5], [True])]
    for compression in ("none", "zstd"):
        config = CONFIG.model_copy(update={"teacher": teacher, "compression": compression})
        store = FeatureStore(extract_to(tmp_path / compression, tiny_target, samples, config))
        assert verify(tmp_path / compression, NoProgress(), samples).sound
        assert all(len(next(iter(vars(store[i].teacher).values()))) == 0 for i in (0, 1))
        assert store[0].teacher_token.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("where", ["features", "hidden"])
def test_states_that_are_not_finite_stop_the_extraction(
    tiny_target: Target, samples: list[TokenSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """As a float16 target overflows."""
    module_of = tiny_target.layers[3] if where == "features" else tiny_target.decoder.norm
    handle = module_of.register_forward_hook(lambda layer, args, output: output * torch.inf)  # type: ignore[operator]
    try:
        with pytest.raises(
            TargetError, match=r"conversation s\d+: hidden states of target tiny are not finite in float32"
        ):
            extract_to(tmp_path, tiny_target, samples)
    finally:
        handle.remove()
    assert not (tmp_path / "manifest.json").exists()


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


@given(st.integers(1, 5), st.sampled_from([100, 128, 300, 384]), st.integers(0, 2**31))
def test_the_maximum_of_a_row_by_blocks(rows: int, vocab: int, seed: int) -> None:
    # Few different values, so that the maximum often stands in several places.
    logits = torch.randint(0, 40, (rows, vocab), generator=torch.Generator().manual_seed(seed)).float()
    best, where = row_max(logits)
    assert best.shape == where.shape == (rows, 1)
    for row, value, place in zip(logits.tolist(), best[:, 0].tolist(), where[:, 0].tolist(), strict=True):
        assert value == max(row) and place == row.index(max(row))
