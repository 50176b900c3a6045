"""What a training can be asked for: where it begins, how it chooses, when it ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_store import METHOD, make_store, make_trainer, metrics, train, train_config, weights

from sstf.data.progress import NoProgress
from sstf.decode import SpeculativeDecoder
from sstf.errors import ConfigError
from sstf.features import ExtractConfig, FeatureStore, OnlineFeatures
from sstf.formats import Engine, export_head, load_any, read_any
from sstf.methods import Eagle3Config, Eagle3Method
from sstf.methods.checkpoint import load_head, read_head, save_head
from sstf.targets import Target
from sstf.train.checkpoint import PARTS, read_checkpoint
from sstf.train.config import RealDecodeConfig
from sstf.train.feed import noisy, unsupervised
from sstf.train.real_decode import RealDecode
from sstf.train.trainer import Trainer
from sstf.trees import Chain
from sstf.types import TokenSample

LAST = "checkpoints/step-00000012"


def last_bytes(folder: Path) -> list[bytes]:
    """Weights, optimiser state and averages at the end."""
    return [(folder / LAST / f"{part}.safetensors").read_bytes() for part in PARTS]


def falling(monkeypatch: pytest.MonkeyPatch, values: dict[int, float]) -> None:
    """Validation says so much at each step, and what lies between is measured."""
    real = Trainer.validate

    def validate(self: Trainer) -> Any:
        return replace(real(self), simulated_accepted_length=values[self.progress.step])

    monkeypatch.setattr(Trainer, "validate", validate)


# ---- averaged weights ------------------------------------------------------------------------------------------------


def test_averaged_weights_are_what_is_kept(store: FeatureStore, tmp_path: Path) -> None:
    config = train_config(ema=0.9, steps=6, validate_every=6, checkpoint_every=6)
    trainer = make_trainer(store, tmp_path, config)
    average = weights(trainer)
    while trainer.progress.step < 6:
        before = trainer.progress.step
        trainer.train_step()
        decay = min(0.9, (1 + before) / (10 + before))
        average = {name: decay * average[name] + (1 - decay) * value for name, value in weights(trainer).items()}
    last = weights(trainer)
    trainer = make_trainer(store, tmp_path, config)
    trainer.run(NoProgress(), "tiny", {})
    kept = load_file(tmp_path / "head" / "head.safetensors")
    for name, value in average.items():
        torch.testing.assert_close(kept[name], value)
        assert torch.equal(weights(trainer)[name], last[name])  # training went on from its own
    assert any(not torch.equal(last[name], kept[name]) for name in last)


def test_averaged_weights_resume_to_the_bit(store: FeatureStore, tmp_path: Path) -> None:
    config = train_config(ema=0.9)
    train(store, tmp_path / "unbroken", config)
    begun = make_trainer(store, tmp_path / "resumed", config)
    while begun.progress.step < 5:
        begun.train_step()
    begun._checkpoint()
    train(store, tmp_path / "resumed", config)
    assert last_bytes(tmp_path / "resumed") == last_bytes(tmp_path / "unbroken")


# ---- where a training begins -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head that knows something. Read only."""
    folder = tmp_path_factory.mktemp("trained")
    train(store, folder, train_config(steps=60, validate_every=20, checkpoint_every=60))
    return folder / "head"


def test_a_warm_start_begins_where_the_head_ended(store: FeatureStore, trained: Path, tmp_path: Path) -> None:
    said = read_head(trained).run
    config = train_config(warm_start=trained, optimizer={"learning_rate": 1e-9})
    train(store, tmp_path / "second", config)
    first = next(row for row in metrics(tmp_path / "second") if row["step"] == 0)
    for name in ("val/simulated_accepted_length", "val/accuracy/0", "val/overlap/0", "val/loss/2"):
        assert first[name] == pytest.approx(said[name], abs=1e-6), name
    assert said["val/simulated_accepted_length"] > 1.05


@pytest.mark.parametrize("engine", ["vllm", "sglang", "speculators"])
def test_a_published_head_is_trained_further_from_what_it_was(
    store: FeatureStore, trained: Path, tiny_target: Target, tmp_path: Path, engine: Engine
) -> None:
    """The acceptance of step 0 is that of the head, simulated and decoded; nothing but its rounding to bf16 is lost."""
    said = read_head(trained).run
    export_head(read_head(trained), engine, tmp_path / "published")
    real = RealDecodeConfig(every=12, prompts=3, max_new_tokens=16)
    config = train_config(warm_start=tmp_path / "published", optimizer={"learning_rate": 1e-9}, real_decode=real)
    decode = RealDecode(tiny_target, METHOD.ttt_steps, real)
    trainer = Trainer(store, Eagle3Method(METHOD), METHOD, config, tmp_path / "second", 0, decode)
    started = {name: value.clone() for name, value in trainer.module.head.state_dict().items()}
    imported = read_any(tmp_path / "published", tiny_target.spec)
    assert imported.tensors.keys() == started.keys()
    assert all(torch.equal(started[name], tensor) for name, tensor in imported.tensors.items())
    trainer.run(NoProgress(), "tiny", {})
    first = next(row for row in metrics(tmp_path / "second") if row["step"] == 0)
    for name in ("val/simulated_accepted_length", "val/overlap/0"):
        assert first[name] == pytest.approx(said[name], rel=0.02), name
    assert first["val/simulated_accepted_length"] > 1.05
    decoder = SpeculativeDecoder(
        tiny_target, load_any(tmp_path / "published", tiny_target), Chain(depth=METHOD.ttt_steps)
    )
    lengths = []
    for index in trainer.held_out[:3]:
        ids, mask = store.tokens_of(index)
        lengths += decoder.generate(ids[: int(mask.nonzero()[0])], 16).accepted_lengths
    assert first["val/tau_real"] == pytest.approx(sum(lengths) / len(lengths))


def test_a_head_of_another_shape_names_the_settings(store: FeatureStore, tmp_path: Path) -> None:
    """The run's configuration says what is trained, so a shape is not taken over in silence."""
    theirs = Eagle3Config(draft_vocab_size=100, norm_before_residual=True, rope_theta=5e5)
    frozen = store.frozen_head()
    head = Eagle3Method(theirs).build_head(store.target, frozen, torch.arange(100))
    save_head(tmp_path / "theirs", theirs, head, store.target, {})
    config = train_config(warm_start=tmp_path / "theirs")
    with pytest.raises(ConfigError, match=r"set method\.rope_theta=500000\.0 method\.norm_before_residual=true$"):
        make_trainer(store, tmp_path / "run", config)
    own = METHOD.model_copy(update={"rope_theta": 5e5, "norm_before_residual": True})
    Trainer(store, Eagle3Method(own), own, config, tmp_path / "run", 0)
    deeper = own.model_copy(update={"num_layers": 2})
    with pytest.raises(ConfigError, match=r"another shape than the head of this run; set method\.num_layers=1$"):
        Trainer(store, Eagle3Method(deeper), deeper, config, tmp_path / "deeper", 0)


def test_a_head_from_before_its_target_scaled_positions(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was trained with plain positions, and says so."""
    train(store, tmp_path / "first")
    monkeypatch.setattr(store, "target", replace(store.target, rope_scaling={"rope_type": "linear", "factor": 4.0}))
    with pytest.raises(ConfigError, match=r'set method\.rope_scaling=\{"rope_type": "default"\}'):
        make_trainer(store, tmp_path / "second", train_config(warm_start=tmp_path / "first" / "head"))


def test_a_warm_start_keeps_the_heads_own_vocabulary(store: FeatureStore, tmp_path: Path) -> None:
    train(store, tmp_path / "first")
    begun = make_trainer(store, tmp_path / "second", train_config(warm_start=tmp_path / "first" / "head"), seed=9)
    assert torch.equal(begun.module.head.d2t, read_head(tmp_path / "first" / "head").tensors["d2t"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("folder", r"train\.warm_start: .*no head there"),
        ("kind", r"is a head of method medusa|unreadable"),
        ("layers", r"reads layers \[0, 3, 4\], these features are of \[1, 3, 4\]; set method\.layers"),
    ],
)
def test_heads_that_cannot_be_a_start(store: FeatureStore, tmp_path: Path, change: str, says: str) -> None:
    path = tmp_path / "first" / "head"
    if change == "folder":
        path = tmp_path / "nowhere"
    else:
        train(store, tmp_path / "first")
        fields = json.loads((path / "head.json").read_text())
        if change == "kind":
            fields["method"] = {"kind": "medusa"}
        else:
            fields["layers"] = [0, 3, 4]
        (path / "head.json").write_text(json.dumps(fields))
    with pytest.raises(Exception, match=says) as caught:
        make_trainer(store, tmp_path / "second", train_config(warm_start=path))
    assert caught.value.exit_code in (2, 3)  # type: ignore[attr-defined]


def test_going_on_in_another_folder_and_online(store: FeatureStore, tiny_target: Target, tmp_path: Path) -> None:
    """Stored features, then the target's own: the rest of the run is that of the stored ones, to rounding."""
    train(store, tmp_path / "stored")
    begun = make_trainer(store, tmp_path / "begun")
    while begun.progress.step < 5:
        begun.train_step()
    begun._checkpoint()
    samples = [
        TokenSample(name, *(part.tolist() for part in store.tokens_of(i)))  # type: ignore[arg-type]
        for i, name in enumerate(store.ids)
    ]
    online = OnlineFeatures(tiny_target, samples, Eagle3Method(METHOD).feature_spec(tiny_target.spec), ExtractConfig())
    config = train_config(resume_from=tmp_path / "begun")
    trainer = Trainer(online, Eagle3Method(METHOD), METHOD, config, tmp_path / "online", 0)
    assert trainer.progress.step == 5
    trainer.run(NoProgress(), "tiny", {})
    found, expected = (load_file(tmp_path / name / LAST / "head.safetensors") for name in ("online", "stored"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4, msg=name)
    assert next(row["step"] for row in metrics(tmp_path / "online")) > 5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ttt_steps": 2}, r"was written with method \{.*\"ttt_steps\": 3.*this run has .*\"ttt_steps\": 2"),
        ({"draft_vocab_size": 100}, r"was written with method"),
    ],
)
def test_another_methods_checkpoint_is_refused(
    store: FeatureStore, tmp_path: Path, change: dict[str, int], says: str
) -> None:
    train(store, tmp_path)
    method = Eagle3Config(**(METHOD.model_dump() | change))
    with pytest.raises(ConfigError, match=says):
        Trainer(store, Eagle3Method(method), method, train_config(), tmp_path, 0)


def test_other_data_or_another_order_is_refused(
    store: FeatureStore, tiny_target: Target, samples: list[TokenSample], tmp_path: Path
) -> None:
    train(store, tmp_path / "run")
    other = make_store(tiny_target, samples[1:], tmp_path / "features")
    with pytest.raises(ConfigError, match="was written with conversations"):
        make_trainer(other, tmp_path / "run")
    with pytest.raises(ConfigError, match="was written with seed 0, this run has 1"):
        make_trainer(store, tmp_path / "run", seed=1)
    with pytest.raises(ConfigError, match=r"was written with train\.step_tokens 64, this run has 32"):
        make_trainer(store, tmp_path / "run", train_config(step_tokens=32))
    with pytest.raises(ConfigError, match=r"train\.optimizer\.kind \"adamw\", this run has \"muon\""):
        make_trainer(store, tmp_path / "run", train_config(optimizer={"kind": "muon"}))


def test_a_folder_without_checkpoints_cannot_be_gone_on_with(store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.resume_from: .* holds no checkpoint"):
        make_trainer(store, tmp_path / "run", train_config(resume_from=tmp_path / "nothing"))


def test_muon_trains_and_resumes(store: FeatureStore, tmp_path: Path) -> None:
    config = train_config(optimizer={"kind": "muon", "learning_rate": 2e-3})
    train(store, tmp_path / "unbroken", config)
    begun = make_trainer(store, tmp_path / "resumed", config)
    while begun.progress.step < 5:
        begun.train_step()
    begun._checkpoint()
    train(store, tmp_path / "resumed", config)
    assert last_bytes(tmp_path / "resumed") == last_bytes(tmp_path / "unbroken")
    loss = [row["train/loss/0"] for row in metrics(tmp_path / "unbroken") if "train/loss/0" in row]
    assert sum(loss[-3:]) < sum(loss[:3])


# ---- how it chooses, when it ends ------------------------------------------------------------------------------------


def test_training_ends_when_acceptance_falls(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    falling(monkeypatch, {2: 1.5, 4: 1.6, 6: 1.4, 8: 1.3, 10: 9.0, 12: 9.0})
    config = train_config(patience=2, validate_every=2)
    summary = train(store, tmp_path, config)
    assert (summary["steps"], summary["planned_steps"]) == (8, 12)
    assert (summary["best_step"], summary["accepted_length"]) == (4, 1.6)
    again = make_trainer(store, tmp_path, config)
    again.train_step = lambda asked: pytest.fail("a step was taken")  # type: ignore[method-assign]
    assert again.run(NoProgress(), "tiny", {})["best_step"] == 4


def test_the_choice_by_real_decoding(store: FeatureStore, tiny_target: Target, tmp_path: Path) -> None:
    """`tau_real` is what the decoder reaches with the kept head on the same prompts, and it decides."""
    real = RealDecodeConfig(every=6, prompts=3, max_new_tokens=16)
    config = train_config(steps=48, real_decode=real)
    decode = RealDecode(tiny_target, METHOD.ttt_steps, real)
    trainer = Trainer(store, Eagle3Method(METHOD), METHOD, config, tmp_path, 0, decode)
    summary = trainer.run(NoProgress(), "tiny", {})
    rows = {row["step"]: row["val/tau_real"] for row in metrics(tmp_path) if "val/tau_real" in row}
    assert list(rows) == list(range(6, 49, 6))
    assert summary["chosen_by"] == "tau_real"
    assert summary["accepted_length"] == max(rows.values()) == rows[summary["best_step"]]
    decoder = SpeculativeDecoder(tiny_target, load_head(tmp_path / "head", tiny_target), Chain(depth=METHOD.ttt_steps))
    lengths = []
    for index in trainer.held_out[:3]:
        ids, mask = store.tokens_of(index)
        lengths += decoder.generate(ids[: int(mask.nonzero()[0])], 16).accepted_lengths
    assert sum(lengths) / len(lengths) == pytest.approx(summary["accepted_length"])
    assert summary["accepted_length"] > 1.0
    assert not (tmp_path / "candidate").exists()


# ---- steps that teach nothing, and noise -----------------------------------------------------------------------------


def test_a_step_without_supervision_is_skipped_and_counted(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config(steps=3, validation_conversations=0)
    trainer = make_trainer(store, tmp_path, config)
    batch, before = store.batch, weights(trainer)
    silent = set(trainer.plan[1])

    def without(indices: list[int]) -> Any:
        return unsupervised(batch(indices)) if set(indices) <= silent else batch(indices)

    monkeypatch.setattr(store, "batch", without)
    trainer.plan = trainer.feed.plan = [trainer.plan[1], *(step for step in trainer.plan if not silent & set(step))][:2]
    figures = trainer.train_step()
    assert "grad_norm" not in figures
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert (trainer.progress.step, trainer.progress.skipped) == (1, 1)
    assert trainer.train_step()["grad_norm"] > 0
    trainer._checkpoint()
    assert read_checkpoint(tmp_path / "checkpoints" / "step-00000002").progress.skipped == 1


def test_noise_is_of_the_conversation_not_of_the_batch(store: FeatureStore) -> None:
    one, two, both = (store.batch(indices) for indices in ([3], [5], [3, 5]))
    apart = [noisy(replace(batch, seeds=(seed,)), 0.1).features for batch, seed in ((one, 11), (two, 12))]
    together = noisy(replace(both, seeds=(11, 12)), 0.1)
    assert torch.equal(together.features, torch.cat(apart))
    assert not torch.equal(together.features, noisy(replace(both, seeds=(11, 13)), 0.1).features)
    noise = (together.features.float() - both.features.float()).square().mean(-1).sqrt()
    torch.testing.assert_close(
        noise / both.features.float().square().mean(-1).sqrt(), torch.full_like(noise, 0.1), rtol=0.3, atol=0
    )


def test_noise_resumes_and_leaves_validation_alone(store: FeatureStore, tmp_path: Path) -> None:
    config = train_config(feature_noise=0.2)
    train(store, tmp_path / "unbroken", config)
    begun = make_trainer(store, tmp_path / "resumed", config)
    quiet = make_trainer(store, tmp_path / "quiet")
    assert begun.validate() == quiet.validate()
    while begun.progress.step < 5:
        begun.train_step()
    begun._checkpoint()
    train(store, tmp_path / "resumed", config)
    train(store, tmp_path / "quiet")
    assert last_bytes(tmp_path / "resumed") == last_bytes(tmp_path / "unbroken") != last_bytes(tmp_path / "quiet")


def test_every_start_is_recorded(store: FeatureStore, tmp_path: Path) -> None:
    begun = make_trainer(store, tmp_path)
    while begun.progress.step < 5:
        begun.train_step()
    begun._checkpoint()
    for _ in range(2):
        make_trainer(store, tmp_path).run(NoProgress(), "tiny", {"name": "tiny"})
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [start["from_step"] for start in starts] == [5, 12]
    assert (starts[0]["config"], starts[0]["launch"]["kind"]) == ({"name": "tiny"}, "single")
    assert starts[0]["target"]["fingerprint"] == store.target.fingerprint
