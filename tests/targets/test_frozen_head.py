from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, PreTrainedTokenizerBase

from sstf.errors import DamagedDataError, TargetError
from sstf.targets import FrozenHead, Target, load_target
from sstf.targets.frozen_head import read_frozen_head

SMALL: dict[str, Any] = dict(
    vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0,
)  # fmt: skip


def read(target: Target) -> FrozenHead:
    return read_frozen_head(target.model, target.decoder, target.layers, "tiny")


def same(one: FrozenHead, other: FrozenHead) -> None:
    assert (one.softcap, one.scale, one.rms_norm) == (other.softcap, other.scale, other.rms_norm)
    for name in ("embeddings", "lm_head", "final_norm"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.last_layer.keys() == other.last_layer.keys()
    for name, tensor in one.last_layer.items():
        assert torch.equal(tensor, other.last_layer[name]), name


def test_reads_the_models_own_parameters(tiny_target: Target) -> None:
    frozen, state = tiny_target.frozen_head, tiny_target.model.state_dict()
    assert torch.equal(frozen.embeddings, state["model.embed_tokens.weight"])
    assert torch.equal(frozen.lm_head, state["lm_head.weight"])
    assert torch.equal(frozen.final_norm, state["model.norm.weight"])
    prefix = "model.layers.7."
    assert frozen.last_layer.keys() == {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    for name, tensor in frozen.last_layer.items():
        assert torch.equal(tensor, state[prefix + name])


@torch.inference_mode()
def test_logits_are_the_models(tiny_target: Target) -> None:
    ids = torch.tensor([[4, 5, 250]])
    hidden = tiny_target.decoder(ids, use_cache=False).last_hidden_state
    expected = tiny_target.model(ids, use_cache=False).logits
    found = tiny_target.frozen_head.logits(hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    some = torch.tensor([299, 0, 17])
    torch.testing.assert_close(tiny_target.frozen_head.logits(hidden, some), expected[..., some])


def test_round_trip(tiny_target: Target, tmp_path: Path) -> None:
    frozen = tiny_target.frozen_head
    frozen.save(tmp_path / "frozen.safetensors")
    same(FrozenHead.load(tmp_path / "frozen.safetensors"), frozen)
    same(frozen.to(torch.device("cpu")), frozen)


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    weight = torch.randn(50, 4)
    sizes = []
    for name, lm_head in (("tied", weight), ("own", weight.clone())):
        path = tmp_path / name
        frozen = FrozenHead(weight, lm_head, torch.ones(4), {"a.b": torch.ones(2)}, softcap=30.0, scale=0.25)
        frozen.save(path)
        loaded = FrozenHead.load(path)
        same(loaded, frozen)
        assert (loaded.lm_head.data_ptr() == loaded.embeddings.data_ptr()) == (name == "tied")
        sizes.append(path.stat().st_size)
    assert sizes[1] - sizes[0] >= 50 * 4 * 4


def test_scale_and_softcap_by_hand() -> None:
    weight = torch.tensor([[2.0], [-1.0]])
    frozen = FrozenHead(weight, weight, torch.ones(1), {}, softcap=4.0, scale=0.5)
    expected = 4 * torch.tanh(torch.tensor([3.0, -1.5]) / 4)  # (2, -1) * 3 * 0.5
    torch.testing.assert_close(frozen.logits(torch.tensor([3.0])), expected)


@pytest.mark.parametrize("architecture", ["gemma2", "granite"])
def test_architectures_that_transform_their_logits(
    architecture: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = (
        Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=2.0))
        if architecture == "gemma2"
        else GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0))
    )
    target = Target(architecture, model, tokenizer)
    frozen = target.frozen_head
    assert (frozen.softcap, frozen.scale) == ((2.0, 1.0) if architecture == "gemma2" else (0.0, 0.125))
    assert frozen.rms_norm == (architecture == "granite")  # Gemma multiplies by 1 + weight
    frozen.save(tmp_path / "frozen.safetensors")
    same(FrozenHead.load(tmp_path / "frozen.safetensors"), frozen)
    ids = torch.tensor([[4, 5, 250]])
    with torch.inference_mode():
        hidden = target.decoder(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(frozen.logits(hidden), model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-5)


def test_biased_output_layer_is_refused(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    biased = nn.Linear(64, 300)
    monkeypatch.setattr(tiny_target.model, "get_output_embeddings", lambda: biased)
    with pytest.raises(
        TargetError, match=r"target tiny: its output layer is Linear\(.*bias=True\), expected a Linear without"
    ):
        read(tiny_target)
    monkeypatch.setattr(tiny_target.model, "get_output_embeddings", lambda: None)
    with pytest.raises(TargetError, match="its output layer is None"):
        read(tiny_target)


def test_logits_made_in_an_unknown_way_are_refused(tiny_target: Target) -> None:
    def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * 1.5

    handle = tiny_target.model.lm_head.register_forward_hook(double)
    try:
        with pytest.raises(TargetError, match=r"differs from the model's own logits by 33\.3% .* not supported yet"):
            read(tiny_target)
    finally:
        handle.remove()


def test_nan_weights_are_refused(tiny_target_folder: Path) -> None:
    target = load_target(str(tiny_target_folder), dtype="float32", device="cpu")
    target.model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(TargetError, match="differs from the model's own logits by nan%"):
        _ = target.frozen_head


def test_damage(tiny_target: Target, tmp_path: Path) -> None:
    path = tmp_path / "frozen.safetensors"
    tiny_target.frozen_head.save(path)
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:100], b"", b"\xff" * 200):
        path.unlink()  # not written over: loaded tensors are mapped from the file
        path.write_bytes(broken)
        with pytest.raises(DamagedDataError, match=r"the frozen head cannot be read .* run `sstf extract` again"):
            FrozenHead.load(path)
    path.unlink()
    with pytest.raises(DamagedDataError):
        FrozenHead.load(path)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])
def test_whether_the_final_norm_is_a_plain_one(
    architecture: str, tiny_target: Target, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Gemma multiplies by 1 + weight. What was found is kept with the frozen head; earlier files did not say."""
    torch.manual_seed(0)
    target = {
        "llama": lambda: tiny_target,
        "gemma2": lambda: Target("gemma2", Gemma2ForCausalLM(Gemma2Config(**SMALL)), tokenizer),
        "granite": lambda: Target("granite", GraniteForCausalLM(GraniteConfig(**SMALL)), tokenizer),
    }[architecture]()
    frozen = target.frozen_head
    assert frozen.rms_norm == (architecture != "gemma2")
    frozen.save(tmp_path / "frozen")
    assert FrozenHead.load(tmp_path / "frozen").rms_norm == frozen.rms_norm
    assert frozen.to(torch.device("cpu")).rms_norm == frozen.rms_norm
    tensors = load_file(tmp_path / "frozen")
    save_file(tensors | {"logit_transform": tensors["logit_transform"][:2]}, tmp_path / "frozen")
    assert FrozenHead.load(tmp_path / "frozen").rms_norm
