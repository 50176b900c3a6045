"""The planned bytes against real tensors and files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sstf.data.progress import NoProgress
from sstf.errors import TargetError
from sstf.features import ExtractConfig, FeatureStore, extract
from sstf.features.spec import HiddenSignal, TeacherSignal, TopKSignal
from sstf.methods import Eagle3Config
from sstf.methods.eagle3 import Eagle3Method
from sstf.planning import sizes
from sstf.targets import Target, TargetConfig
from sstf.targets.outline import TargetOutline, outline
from sstf.train.checkpoint import Checkpoint, Progress, save_checkpoint
from sstf.train.config import TrainConfig
from sstf.train.memory import frozen_bytes, peak_parts, trained
from sstf.train.module import HeadWithLoss
from sstf.train.optim import state_by_name
from sstf.types import TokenSample


@pytest.fixture(scope="module")
def shape(tiny_target_folder: Path) -> TargetOutline:
    return outline(TargetConfig(name=str(tiny_target_folder), dtype="float32", device="cpu"))


def samples(count: int = 6, length: int = 40) -> list[TokenSample]:
    ids = torch.randint(3, 300, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [TokenSample(str(i), row, [t >= length // 4 for t in range(length)]) for i, row in enumerate(ids)]


def test_an_outline_is_the_target_without_its_weights(shape: TargetOutline, tiny_target: Target) -> None:
    assert replace(shape.spec, fingerprint=tiny_target.spec.fingerprint) == tiny_target.spec
    assert shape.parameters == sum(p.numel() for p in tiny_target.model.parameters())
    assert shape.frozen.embeddings.device.type == "meta"
    real = tiny_target.frozen_head
    assert {n: t.shape for n, t in shape.frozen.last_layer.items()} == {n: t.shape for n, t in real.last_layer.items()}


def test_keys_and_values_are_those_of_a_real_cache(shape: TargetOutline, tiny_target: Target) -> None:
    cache = tiny_target.new_cache(32, batch=3)
    cache.write_behind(0)
    tiny_target.decoder(torch.ones(3, 2, dtype=torch.int64), past_key_values=cache, use_cache=True)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert sizes.cache_bytes(shape.spec, 3, 32) == held


def test_frozen_parts_are_as_large_as_their_file(shape: TargetOutline, tiny_target: Target, tmp_path: Path) -> None:
    tiny_target.frozen_head.save(tmp_path / "frozen.safetensors")
    assert frozen_bytes(shape.frozen) == pytest.approx((tmp_path / "frozen.safetensors").stat().st_size, rel=0.02)


def test_tied_weights_count_once(shape: TargetOutline) -> None:
    tied = replace(shape.frozen, lm_head=shape.frozen.embeddings)
    assert frozen_bytes(shape.frozen) - frozen_bytes(tied) == 300 * 64 * 4


@pytest.mark.parametrize("codec", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("signal", [HiddenSignal(), TopKSignal(k=8)])
def test_features_take_the_bytes_that_were_planned(
    codec: str, signal: TeacherSignal, shape: TargetOutline, tiny_target: Target, tmp_path: Path
) -> None:
    rows = samples()
    config = ExtractConfig.model_validate({"codec": codec, "teacher": signal.model_dump()})
    spec = Eagle3Method(Eagle3Config()).feature_spec(tiny_target.spec)
    extract(tiny_target, rows, spec, config, tmp_path, NoProgress())
    store = FeatureStore(tmp_path)
    written = 0
    for shard in store.shards:
        with safe_open(tmp_path / shard.file, framework="pt") as file:
            written += sum(t.numel() * t.element_size() for t in (file.get_tensor(key) for key in file.keys()))  # noqa: SIM118
    # Without the shards' JSON headers: on a few tokens they are most of the file, on a real shard a thousandth.
    planned = sizes.feature_bytes(shape.spec, 3, codec, signal, store.trained_tokens / store.tokens)  # type: ignore[arg-type]
    assert planned * store.tokens == pytest.approx(written, rel=1e-6)


def test_every_form_is_listed_and_zstd_only_where_it_was_measured(shape: TargetOutline) -> None:
    found = sizes.forms(shape.spec, 3, {"hidden": HiddenSignal(), "topk": TopKSignal()}, 0.5, {("bf16", "hidden"): 0.7})
    assert len(found) == 3 * 2 * 2
    by_key = {(f.codec, f.teacher, f.compression): f.bytes_per_token for f in found}
    plain = by_key["bf16", "hidden", "none"]
    assert plain is not None
    # 3 taps of 64 in bfloat16, 2 + 1 bytes of token and mask; of every second token 64 values, a token and a float32
    assert plain == 3 * 64 * 2 + 3 + 0.5 * (64 * 2 + 2 + 4)
    assert by_key["bf16", "hidden", "zstd"] == pytest.approx(0.7 * plain)
    assert by_key["int8", "topk", "zstd"] is None
    assert sizes.usual_bytes(shape.spec) == 8 * 64


def test_a_checkpoint_is_as_large_as_planned(tiny_target: Target, tmp_path: Path) -> None:
    head = Eagle3Method(Eagle3Config(draft_vocab_size=200)).build_head(
        tiny_target.spec, tiny_target.frozen_head, torch.arange(200)
    )
    optimizer = torch.optim.AdamW(head.parameters())
    for parameter in head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = state_by_name([optimizer], head.named_parameters())
    save_checkpoint(tmp_path, Checkpoint(Progress(step=1), {}, dict(head.state_dict()), state), keep=1)
    written = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert sizes.checkpoint_bytes(sizes.parameters_of(head)) == pytest.approx(written, rel=0.03)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_activations_are_what_backward_keeps(precision: str, steps: int, tiny_target: Target, tmp_path: Path) -> None:
    """Counted with hooks on the tensors that autograd saves, between two batch sizes: what grows with the tokens. The
    draft vocabulary is the whole, so that all positions behind the prompt are learned from."""
    method = Eagle3Method(Eagle3Config(ttt_steps=steps, draft_vocab_size=300))
    extract(tiny_target, samples(8, 64), method.feature_spec(tiny_target.spec), ExtractConfig(), tmp_path, NoProgress())
    store = FeatureStore(tmp_path)
    head = method.build_head(tiny_target.spec, tiny_target.frozen_head, torch.arange(300))
    module = HeadWithLoss(method, head, tiny_target.frozen_head, precision)

    def saved(count: int) -> int:
        held: dict[int, int] = {}
        kept: list[torch.Tensor] = []  # so that no address is used twice

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(store.batch(range(count)))
        return sum(held.values())

    config = TrainConfig(steps=1, precision=precision)
    what = trained(head, tiny_target.frozen_head, 3 * 64, steps, 46 / 62, config, torch.device("cpu"))
    planned = next(part.bytes for part in peak_parts(what, 4 * 62, 32) if part.name.startswith("activations"))
    real = saved(8) - saved(4)
    assert 0.85 * real <= planned <= 2 * real, planned / real


def test_the_parts_of_a_stage_by_hand(shape: TargetOutline) -> None:
    found = sizes.regeneration(shape.spec, shape.parameters, slots=4, capacity=100, prompt=10)
    parts = {part.name: part.bytes for part in found.parts}
    assert parts["weights"] == 4 * shape.parameters
    assert parts["keys and values, 4 x 100 tokens"] == 2 * 8 * 2 * 16 * 4 * 100 * 4
    # 40 tokens of 4 x (8 x 64 + 3 x 128) bytes are more than 4 x 16 x 300
    assert parts["passes"] == 40 * 4 * (8 * 64 + 3 * 128)
    assert found.bytes == sum(parts.values())
    online = sizes.with_target(found, shape.spec, shape.parameters, 64, 3)
    assert online.bytes > found.bytes + 4 * shape.parameters


def test_the_outline_of_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(TargetError, match="its configuration and tokenizer cannot be read"):
        outline(TargetConfig(name=str(tmp_path)))
