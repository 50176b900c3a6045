"""A target whose weights lie in several places is the same target: its spec, its features, its frozen head."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tiny_models import tiny_llama
from transformers import PreTrainedTokenizerBase

from sstf.errors import TargetError
from sstf.targets import Target, TargetConfig, load_configured, load_target
from sstf.targets import huggingface as module
from sstf.targets.placement import DeviceMap, layers_on_disk

SOME_ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.norm": "disk",
    "lm_head": "disk",
    **{f"model.layers.{i}": "cpu" if i in (0, 5) else "disk" for i in range(8)},
}


@torch.inference_mode()
def passed(target: Target) -> list[torch.Tensor]:
    """Taps, last hidden state and logits of one batch."""
    ids = torch.randint(3, 290, (2, 11), generator=torch.Generator().manual_seed(3))
    with target.tap((6, 0, 3)) as taps:
        hidden = target.decoder(ids.to(target.device), use_cache=False).last_hidden_state
        return [taps.features(), hidden, target.frozen_head.logits(hidden)]


@pytest.mark.parametrize(
    "device_map", ["disk", "auto", {"": "disk"}, SOME_ON_DISK], ids=["disk", "auto", "all", "some"]
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_spread_target_is_the_same_target(
    device_map: DeviceMap, tied: bool, dtype: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Bit for bit, whether the checkpoint's dtype is the one that is asked for or not."""
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "tiny", max_shard_size="300KB")
    assert len(list((tmp_path / "tiny").glob("*.safetensors"))) > 1
    tokenizer.save_pretrained(tmp_path / "tiny")
    whole = load_target(str(tmp_path / "tiny"), dtype, "cpu")  # type: ignore[arg-type]
    if tied and device_map is SOME_ON_DISK:
        device_map = SOME_ON_DISK | {"lm_head": "cpu"}
    spread = load_configured(TargetConfig(name=str(tmp_path / "tiny"), dtype=dtype, device_map=device_map))  # type: ignore[arg-type]
    assert spread.spec == whole.spec
    assert spread.device == whole.device
    assert spread.offloaded == (device_map != "auto")
    for found, expected in zip(passed(spread), passed(whole), strict=True):
        assert torch.equal(found, expected)
    assert whole.frozen_head.lm_head.is_meta is False
    for name, expected in vars(whole.frozen_head).items():
        found = vars(spread.frozen_head)[name]
        if isinstance(expected, torch.Tensor):
            assert torch.equal(found, expected), name
    for name, parameter in whole.frozen_head.last_layer.items():
        assert torch.equal(spread.frozen_head.last_layer[name], parameter)
    spread.frozen_head.save(tmp_path / "spread.safetensors")
    whole.frozen_head.save(tmp_path / "whole.safetensors")
    assert (tmp_path / "spread.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_the_map_disk_leaves_the_layers_on_the_disk(tiny_target_folder: Path) -> None:
    places = layers_on_disk(str(tiny_target_folder), torch.device("cpu"), None, False)
    assert places == {
        "model.layers": "disk",
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    target = load_target(str(tiny_target_folder), "float32", "cpu", device_map="disk")
    on_disk = {name for name, parameter in target.model.named_parameters() if parameter.is_meta}
    assert on_disk == {name for name, _ in target.model.named_parameters() if name.startswith("model.layers.")}
    passed(target)
    assert on_disk == {name for name, parameter in target.model.named_parameters() if parameter.is_meta}


def test_the_scratch_folder_goes_with_the_target(
    tiny_target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    target = load_target(str(tiny_target_folder), "float32", device_map="disk")
    assert len(list(tmp_path.iterdir())) == 1
    del target
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_maps_that_cannot_be(tiny_target_folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValidationError, match=r"target.device is 'cuda:1' and target.device_map is 'auto'; a map"):
        TargetConfig(name="x", device="cuda:1", device_map="auto")
    with pytest.raises(ValidationError, match="device_map"):
        TargetConfig(name="x", device_map="everywhere")  # type: ignore[arg-type]
    with pytest.raises(TargetError, match=r"target.device_map is 'cuda:63', which this machine .* does not have"):
        load_target(str(tiny_target_folder), device_map={"": "cuda:63"})
    with pytest.raises(TargetError, match=r"target .*tiny: cannot be loaded .*does not give any device"):
        load_target(str(tiny_target_folder), device_map={"model.embed_tokens": "disk"})
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(TargetError, match=r"are one tensor, of which target.device_map puts only one on the disk"):
        load_target(str(tmp_path), device_map=SOME_ON_DISK)


def test_threads_that_share_a_target_see_their_own_passes(tiny_target: Target) -> None:
    """Both have their taps open while both run."""
    gate = threading.Barrier(2, timeout=20)
    found: dict[int, torch.Tensor] = {}

    def run(first: int) -> None:
        ids = torch.arange(first, first + 9)[None]
        with torch.inference_mode(), tiny_target.tap((1, 4)) as taps:
            gate.wait()
            tiny_target.decoder(ids, use_cache=False)
            gate.wait()
            found[first] = taps.features()

    threads = [threading.Thread(target=run, args=(first,)) for first in (5, 105)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.inference_mode():
        for first in (5, 105):
            ids = torch.arange(first, first + 9)[None]
            states = tiny_target.model(ids, output_hidden_states=True, use_cache=False).hidden_states
            assert torch.equal(found[first], torch.cat([states[2], states[5]], -1))


@pytest.mark.parametrize(
    ("rope", "threads"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, True),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, True),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, False),
    ],
)
def test_targets_that_change_while_they_run_take_one_thread(
    rope: dict[str, object], threads: bool, tokenizer: PreTrainedTokenizerBase, tiny_target_folder: Path
) -> None:
    assert Target("x", tiny_llama(rope_parameters=rope), tokenizer).takes_threads is threads
    assert load_target(str(tiny_target_folder), "float32", device_map="disk").takes_threads is False
