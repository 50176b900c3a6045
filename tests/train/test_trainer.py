"""The training loop on the tiny target: its curve, its objective, its restarts."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_store import METHOD, head_bytes, make_store, make_trainer, metrics, train, train_config, weights
from torch import Tensor

from sstf.data.progress import NoProgress
from sstf.errors import DamagedDataError, DataError
from sstf.features import Features, FeatureStore
from sstf.features.store import write_manifest, write_shard
from sstf.methods import Eagle3Config, Eagle3Method
from sstf.methods import checkpoint as head_files
from sstf.methods.base import News
from sstf.methods.checkpoint import read_head
from sstf.targets import Target
from sstf.train import checkpoint as checkpoint_files
from sstf.train.trainer import Trainer
from sstf.trees import Chain, DraftContext
from sstf.types import TokenSample

FIRST_LOSS = 0.22765  # nats a token, step 0 of the test-time training
LAST_LOSS = 0.0806


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def train_until(store: FeatureStore, folder: Path, steps: int) -> None:
    """Start a training that dies right after `steps` optimiser steps of this process."""
    trainer = make_trainer(store, folder)
    step = trainer.train_step
    left = steps

    def dying(asked_to_stop: bool = False) -> dict[str, float]:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return step(asked_to_stop)

    trainer.train_step = dying  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.run(NoProgress(), "tiny", {})


@pytest.fixture(scope="module")
def unbroken(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    train(store, folder)
    return folder


# ---- what a run gives ------------------------------------------------------------------------------------------------


def test_the_loss_curve(store: FeatureStore, tmp_path: Path) -> None:
    """Pinned: a change of numerics has to be meant. The tolerance is for other CPUs and versions of torch."""
    train(store, tmp_path, train_config(steps=40, validate_every=40, checkpoint_every=40))
    loss = [row["train/loss/0"] for row in metrics(tmp_path) if "train/loss/0" in row]
    assert len(loss) == 40
    assert loss[0] == pytest.approx(FIRST_LOSS, rel=1e-3)
    assert sum(loss[-5:]) / 5 == pytest.approx(LAST_LOSS, rel=3e-2)
    assert sum(loss[-5:]) / 5 < 0.6 * sum(loss[:5]) / 5


def test_bf16_trains_and_its_masters_stay_float32(store: FeatureStore, tmp_path: Path) -> None:
    config = train_config(steps=40, precision="bf16", validate_every=40, checkpoint_every=40)
    trainer = make_trainer(store, tmp_path, config)
    trainer.run(NoProgress(), "tiny", {})
    loss = [row["train/loss/0"] for row in metrics(tmp_path) if "train/loss/0" in row]
    assert sum(loss[-5:]) < 0.6 * sum(loss[:5])
    assert {p.dtype for p in trainer.module.head.parameters()} == {torch.float32}
    moments = [
        v
        for optimizer in trainer.parallel.optimizers
        for state in optimizer.state.values()
        for key, v in state.items()
        if key != "step"
    ]
    assert {moment.dtype for moment in moments} == {torch.float32}
    assert {tensor.dtype for tensor in read_head(tmp_path / "head").tensors.values()} == {
        torch.float32,
        torch.int64,
        torch.bool,
    }


def test_only_the_head_is_optimised(store: FeatureStore, tmp_path: Path) -> None:
    trainer = make_trainer(store, tmp_path)
    optimised = {
        id(p) for optimizer in trainer.parallel.optimizers for group in optimizer.param_groups for p in group["params"]
    }
    assert optimised == {id(p) for p in trainer.module.head.parameters()}
    frozen = {
        "embeddings": trainer.module.frozen.embeddings,
        "lm_head": trainer.module.frozen.lm_head,
        "head's": trainer.module.head.embeddings,
    }
    assert not any(id(tensor) in optimised or tensor.requires_grad for tensor in frozen.values())
    before = {name: tensor.clone() for name, tensor in frozen.items()} | weights(trainer)
    trainer.run(NoProgress(), "tiny", {})
    for name, tensor in frozen.items():
        assert torch.equal(tensor, before[name]), name
    assert all(not torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_the_summary_names_the_head_in_the_folder(store: FeatureStore, tmp_path: Path) -> None:
    summary = train(store, tmp_path)
    best = [row for row in metrics(tmp_path) if "val/simulated_accepted_length" in row]
    assert [row["step"] for row in best] == [3, 6, 9, 12]
    top = max(row["val/simulated_accepted_length"] for row in best)
    first = next(row["step"] for row in best if row["val/simulated_accepted_length"] == top)
    assert (summary["accepted_length"], summary["best_step"]) == (top, first)
    assert (summary["steps"], summary["processes"]) == (12, 1)
    assert read_head(tmp_path / "head").run["step"] == first


def test_without_held_out_text_the_last_head_is_kept(store: FeatureStore, tmp_path: Path) -> None:
    summary = train(store, tmp_path, train_config(validation_conversations=0))
    assert (summary["accepted_length"], summary["best_step"]) == (None, 12)
    assert read_head(tmp_path / "head").run["step"] == 12


def test_two_precisions_in_one_process(store: FeatureStore, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16", "fp32"):
        assert make_trainer(store, tmp_path, train_config(precision=precision)).train_step()["grad_norm"] > 0


# ---- the objective ---------------------------------------------------------------------------------------------------


def gradients(trainer: Trainer, step: list[int], monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What the optimiser gets for one step of these conversations."""
    taken: dict[str, torch.Tensor] = {}

    def take() -> None:
        for name, parameter in trainer.module.head.named_parameters():
            assert parameter.grad is not None
            taken[name] = parameter.grad.clone()

    trainer.plan = trainer.feed.plan = [step]
    monkeypatch.setattr(trainer.parallel.optimizers[0], "step", take)
    trainer.train_step()
    return taken


def test_accumulation_changes_nothing(store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, pieces, found = [0, 1, 2, 3, 4, 5], [], []
    for tokens in (1000, 60, 16):
        trainer = make_trainer(store, tmp_path, train_config(clip=1e9, batch_tokens=tokens))
        pieces.append(len(trainer.feed.pieces(step)))
        found.append(gradients(trainer, step, monkeypatch))
    assert pieces == [1, 2, 6]
    for other in found[1:]:
        for parameter, gradient in found[0].items():
            torch.testing.assert_close(other[parameter], gradient, rtol=1e-6, atol=1e-6, msg=parameter)


def test_the_step_is_the_sum_over_valid_tokens_divided_once(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(store, tmp_path, train_config(clip=1e9))
    output = trainer.module(store.batch([2, 7]))
    (output.loss / output.valid[0]).backward()
    expected = {name: p.grad.clone() for name, p in trainer.module.head.named_parameters() if p.grad is not None}
    trainer.parallel.forget()
    trainer.feed.batch_tokens = 16
    for name, gradient in gradients(trainer, [2, 7], monkeypatch).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_the_gradient_is_clipped(store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(store, tmp_path, train_config(clip=0.01))
    taken = gradients(trainer, [0, 1], monkeypatch)
    assert torch.stack([g.norm() for g in taken.values()]).norm() == pytest.approx(0.01, rel=1e-3)


def test_simulated_accepted_length_is_that_of_real_chains(store: FeatureStore, tmp_path: Path) -> None:
    """The held-out text is greedy, so a chain that a real drafter grows at an anchor matches it token by token."""
    config = train_config(steps=60, validation_conversations=6, validate_every=60, checkpoint_every=60)
    trainer = make_trainer(store, tmp_path, config)
    trainer.run(NoProgress(), "tiny", {})
    head, steps = trainer.module.head, METHOD.ttt_steps
    drafter = trainer.method.drafter(head, torch.device("cpu"))
    accepted = []
    for index in trainer.held_out:
        rows = store[index]
        ids, mask = rows.input_ids.tolist(), rows.loss_mask.tolist()
        for t in range(len(ids) - 2):
            text = ids[t + 2 : t + 2 + steps]
            if len(text) < steps or not all(mask[t + 2 : t + 2 + steps]):
                continue
            news = News(0, rows.input_ids[1 : t + 2].tolist(), rows.features[: t + 1])
            drafter.start(1, len(ids) + steps)
            (tree,) = drafter.propose([news], Chain(depth=steps), DraftContext(steps))
            drafts = tree.tokens.tolist()
            accepted.append(next((i for i in range(steps) if drafts[i] != text[i]), steps))
    expected = 1 + sum(accepted) / len(accepted)
    assert expected > 1.05
    assert trainer.validate().simulated_accepted_length == pytest.approx(expected, abs=1e-6)


# ---- restarts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5, 7, 11])
def test_a_killed_run_ends_the_same(store: FeatureStore, unbroken: Path, tmp_path: Path, steps: int) -> None:
    """Checkpoints after 5 and 10, validation after 3, 6, 9: a head that was chosen may be newer than the checkpoint."""
    train_until(store, tmp_path, steps)
    train(store, tmp_path)
    assert head_bytes(tmp_path) == head_bytes(unbroken)
    assert (tmp_path / "head" / "head.json").read_bytes() == (unbroken / "head" / "head.json").read_bytes()
    assert metrics(tmp_path) == metrics(unbroken)
    for name in ("head.safetensors", "optimizer.safetensors", "average.safetensors", "progress.json"):
        last = f"checkpoints/step-00000012/{name}"
        assert (tmp_path / last).read_bytes() == (unbroken / last).read_bytes(), name


def test_killed_again_and_again(store: FeatureStore, unbroken: Path, tmp_path: Path) -> None:
    for steps in (6, 2, 6):  # dies at 6, then at 7, then at 11
        train_until(store, tmp_path, steps)
    train(store, tmp_path)
    assert head_bytes(tmp_path) == head_bytes(unbroken)
    assert metrics(tmp_path) == metrics(unbroken)


def falling_acceptance(monkeypatch: pytest.MonkeyPatch, values: dict[int, float]) -> None:
    real = Trainer.validate

    def validate(self: Trainer) -> Any:
        result = real(self)
        object.__setattr__(result, "simulated_accepted_length", values[self.progress.step])
        return result

    monkeypatch.setattr(Trainer, "validate", validate)


@pytest.mark.parametrize("steps", [3, 4, 6, 8, 9, 10])
def test_the_choice_of_the_best_head_survives_a_kill(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """The best validation is at step 6, between the checkpoints of 5 and 10, and the kill anywhere around it."""
    falling_acceptance(monkeypatch, {3: 1.2, 6: 1.9, 9: 1.5, 12: 1.4})
    train(store, tmp_path / "unbroken")
    train_until(store, tmp_path / "killed", steps)
    summary = train(store, tmp_path / "killed")
    assert (summary["best_step"], summary["accepted_length"]) == (6, 1.9)
    assert read_head(tmp_path / "killed" / "head").run["step"] == 6
    assert head_bytes(tmp_path / "killed") == head_bytes(tmp_path / "unbroken")
    assert (
        head_bytes(tmp_path / "killed")
        != (tmp_path / "killed" / "checkpoints" / "step-00000012" / "head.safetensors").read_bytes()
    )


def test_a_kill_while_the_best_head_is_written(
    store: FeatureStore, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New tensors beside the old description: the repeated validation writes both again."""
    write = head_files.write_json_atomic

    def dying(path: Path, value: Any) -> None:
        if value["run"]["step"] > 5:
            raise Killed
        write(path, value)

    falling_acceptance(monkeypatch, {3: 1.1, 6: 1.9, 9: 1.5, 12: 1.4})
    with monkeypatch.context() as patch:
        patch.setattr(head_files, "write_json_atomic", dying)
        with pytest.raises(Killed):
            train(store, tmp_path)
    with pytest.raises(DamagedDataError, match=r"head\.safetensors: altered or cut off"):
        read_head(tmp_path / "head")
    train(store, tmp_path)
    assert read_head(tmp_path / "head").run["step"] == 6


def test_a_finished_run_does_nothing_again(store: FeatureStore, unbroken: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(unbroken, tmp_path / "again")
    trainer = make_trainer(store, folder)
    trainer.train_step = lambda asked: pytest.fail("a step was taken")  # type: ignore[method-assign]
    summary = trainer.run(NoProgress(), "tiny", {})
    assert summary["steps"] == 12
    assert metrics(folder) == metrics(unbroken)


@pytest.mark.parametrize("file", ["head.safetensors", "optimizer.safetensors", "average.safetensors", "progress.json"])
@pytest.mark.parametrize("damage", ["cut", "altered", "missing"])
def test_a_damaged_checkpoint_is_named(
    store: FeatureStore, unbroken: Path, tmp_path: Path, file: str, damage: str
) -> None:
    folder = shutil.copytree(unbroken, tmp_path / "run")
    path = folder / "checkpoints" / "step-00000012" / file
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[5 if file == "progress.json" else -5] ^= 0x41
        path.write_bytes(data)
    with pytest.raises(DamagedDataError, match=r"step-00000012.*delete") as caught:
        make_trainer(store, folder)
    assert caught.value.exit_code == 3
    # Doing what the message says goes on from the checkpoint before.
    shutil.rmtree(path.parent)
    train(store, folder)
    assert head_bytes(folder) == head_bytes(unbroken)


def test_a_checkpoint_without_optimiser_is_damaged(store: FeatureStore, unbroken: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(unbroken, tmp_path / "run")
    path = folder / "checkpoints" / "step-00000012" / "progress.json"
    progress = json.loads(path.read_text())
    del progress["sha256"]["optimizer"]
    path.write_text(json.dumps(progress))
    with pytest.raises(DamagedDataError, match=r"progress\.json: altered"):
        make_trainer(store, folder)


def test_keep_last(store: FeatureStore, tmp_path: Path) -> None:
    train(store, tmp_path, train_config(checkpoint_every=2, keep_last=3))
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert found == ["step-00000008", "step-00000010", "step-00000012"]


def test_a_kill_between_writing_and_renaming(
    store: FeatureStore, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def dying(self: Path, target: Path) -> Path:
        if "step-00000010" in self.name:
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        with pytest.raises(Killed):
            train(store, tmp_path)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == [".step-00000010.part", "step-00000005"]
    assert make_trainer(store, tmp_path).progress.step == 5
    train(store, tmp_path)
    assert head_bytes(tmp_path) == head_bytes(unbroken)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]


def test_a_full_disk_while_checkpointing_keeps_the_older_one(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint_files.write_tensors

    def full(path: Path, tensors: Mapping[str, Tensor]) -> str:
        if "step-00000010" in str(path) and path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")
        return write(path, tensors)

    monkeypatch.setattr(checkpoint_files, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        train(store, tmp_path)
    assert make_trainer(store, tmp_path).progress.step == 5


# ---- what a run refuses ----------------------------------------------------------------------------------------------


def spoiled(store: FeatureStore, target: Target, folder: Path, spoil: Callable[[Features], None]) -> FeatureStore:
    """A copy of `store` in one shard, every conversation passed through `spoil`."""
    folder.mkdir()
    # Copies: what a store hands out are views of its files.
    rows = [replace(row, features=row.features.clone()) for row in (store[i] for i in range(len(store)))]
    for row in rows:
        spoil(row)
    target.frozen_head.save(folder / "frozen.safetensors")
    write_manifest(folder, store.origin, [write_shard(folder, 0, store.ids, rows, store.origin)])
    return FeatureStore(folder)


def test_features_that_are_not_numbers_stop_the_run(store: FeatureStore, tiny_target: Target, tmp_path: Path) -> None:
    def spoil(row: Features) -> None:
        row.features[3, 5] = float("nan")

    bad = spoiled(store, tiny_target, tmp_path / "features", spoil)
    trainer = make_trainer(bad, tmp_path / "run")
    before = weights(trainer)
    with pytest.raises(DataError, match=r"step 0: the features of .* are not finite from row 3 on") as caught:
        trainer.run(NoProgress(), "tiny", {})
    place, name = re.search(r"conversation (\d+) of .*shard-00000.* \((c\d+)\)", str(caught.value)).groups()  # type: ignore[union-attr]
    assert bad.ids[int(place)] == name
    assert int(place) in trainer.plan[0]
    # The optimiser has not moved, and the log is closed.
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_a_gradient_that_overflows_stops_the_run(store: FeatureStore, tmp_path: Path) -> None:
    trainer = make_trainer(store, tmp_path, train_config(optimizer={"learning_rate": 0.99}, step_tokens=256, clip=1e30))
    with torch.no_grad():
        for parameter in trainer.module.head.parameters():
            parameter.mul_(1e30)
    with pytest.raises(DataError, match=r"not finite though .*lower train\.optimizer\.learning_rate"):
        trainer.run(NoProgress(), "tiny", {})


def test_nothing_to_train_on(tiny_target: Target, tmp_path: Path) -> None:
    store = make_store(tiny_target, [TokenSample("a", [5, 6, 7, 8], [False] * 4)], tmp_path / "features")
    with pytest.raises(DataError, match="no conversation to train on"):
        make_trainer(store, tmp_path / "run")


def test_other_layers_than_the_stores(store: FeatureStore, tmp_path: Path) -> None:
    method = Eagle3Config(layers=(0, 2, 5), ttt_steps=3, draft_vocab_size=200)
    with pytest.raises(DamagedDataError, match=r"holds layers \[1, 3, 4\], the method reads \[0, 2, 5\]"):
        Trainer(store, Eagle3Method(method), method, train_config(), tmp_path, 0)


def test_an_epoch_sees_every_conversation_once(store: FeatureStore, tmp_path: Path) -> None:
    trainer = make_trainer(store, tmp_path, train_config(steps=None, epochs=2))
    seen = [i for step in trainer.plan for i in step]
    assert sorted(seen) == sorted(trainer.training * 2)
    assert set(seen[: len(trainer.training)]) == set(trainer.training)
    assert not set(seen) & set(trainer.held_out)


def test_a_plan_is_a_prefix_of_a_longer_one(store: FeatureStore, tmp_path: Path) -> None:
    short, long = (make_trainer(store, tmp_path, train_config(steps=n)).plan for n in (7, 40))
    assert (len(short), len(long)) == (7, 40)
    assert long[:7] == short


def test_the_seed_decides_everything(store: FeatureStore, tmp_path: Path) -> None:
    digests = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(hash(name) % 1000)  # whatever state the process was in
        make_trainer(store, tmp_path / name, train_config(steps=3), seed).run(NoProgress(), name, {})
        digests[name] = hashlib.sha256(head_bytes(tmp_path / name)).hexdigest()
    assert digests["a"] == digests["b"] != digests["c"]
