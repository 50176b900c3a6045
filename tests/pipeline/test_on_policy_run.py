"""A run with a second phase: rollouts of the trained head, and training on them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pipeline_runs import WriteConfig, open_run

from sstf import pipeline
from sstf.cli import main
from sstf.errors import ConfigError
from sstf.features import FeatureStore
from sstf.formats import find_head
from sstf.methods import METHODS, TrainableMethod, build_method
from sstf.methods.checkpoint import read_head
from sstf.pipeline import STAGES, Run
from sstf.train.on_policy import read_rollouts
from sstf.train.parallel import open_launch
from sstf.train.trainer import Trainer

SECTION: dict[str, Any] = {"rounds": 2, "conversations": 4, "max_new_tokens": 12, "steps": 3, "slots": 2}
TINY: dict[str, dict[str, Any]] = {
    "dflash": {"block_size": 4, "num_layers": 1},
    "domino": {"block_size": 4, "num_layers": 1, "gru_size": 8, "rank": 4},
    "dspark": {"block_size": 3, "num_layers": 1, "rank": 4},
    "eagle": {"ttt_steps": 2},
    "eagle3": {"ttt_steps": 2, "draft_vocab_size": 200},
    "early_exit": {"exit_layer": 6, "draft_vocab_size": 200},
    "medusa": {"heads": 2},
    "p_eagle": {"depth": 3, "draft_vocab_size": 200},
}


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def head_bytes(run: Run) -> bytes:
    return (run.head / "head.safetensors").read_bytes()


def test_a_run_with_rollouts(write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    plain = open_run(write_config())
    config = write_config(on_policy=SECTION)
    run = open_run(config)
    assert all(run.keys[stage] == plain.keys[stage] for stage in ("data", "extract", "train"))
    assert all(run.keys[stage] != plain.keys[stage] for stage in ("eval", "export"))
    assert plain.stages == STAGES and set(plain.keys) == set(STAGES)
    run.up_to("eval", "export")
    summary = run.summary("on_policy")
    assert summary is not None
    trained = run.summary("train")
    assert trained is not None
    folder = run.folder("on_policy")
    first, second = summary["rounds"]
    assert first["accepted_length_before"] == trained["accepted_length"] == summary["accepted_length_before"]
    assert second["accepted_length_before"] == first["accepted_length"] >= trained["accepted_length"]
    assert summary["accepted_length"] == second["accepted_length"] >= first["accepted_length"]
    assert [one["steps"] for one in summary["rounds"]] == [3, 3]
    for number, one in enumerate(summary["rounds"], start=1):
        rollouts = read_rollouts(folder / f"round-{number}" / "rollouts")
        assert rollouts is not None and len(rollouts) == one["rollouts"] <= 4
        assert one["rejected_passes"] > 0
        store = FeatureStore(folder / f"round-{number}" / "features")
        assert [store.ids[i] for i in range(len(store))] == [rollout.sample.id for rollout in rollouts]
        log = (folder / f"round-{number}" / "metrics.jsonl").read_text(encoding="utf-8")
        rate = [json.loads(line) for line in log.splitlines()]
        assert max(row["lr"] for row in rate if "lr" in row) == pytest.approx(0.3 * 1e-3)
        assert rate[0]["step"] == 0 and "val/simulated_accepted_length" in rate[0]
    assert read_head(run.head).layers == read_head(run.folder("train") / "head").layers
    assert summary["parity"]["verdict"] == "pass", summary["parity"]
    assert (folder / "run.json").is_file()
    assert find_head(str(run.config.folder)) == run.head
    report = json.loads((run.folder("eval") / "report.json").read_text(encoding="utf-8"))
    assert report["head"] == str(run.head)
    done = {stage: (run.folder(stage) / "done.json").stat().st_mtime_ns for stage in run.stages}
    with pytest.raises(SystemExit) as ended:
        main(["on-policy", str(config)])
    assert ended.value.code == 0 and "on-policy head" in capsys.readouterr().out
    assert done == {stage: (run.folder(stage) / "done.json").stat().st_mtime_ns for stage in run.stages}
    other = open_run(config, "on_policy.decay=0.5")
    assert other.keys["train"] == run.keys["train"] and other.keys["on_policy"] != run.keys["on_policy"]
    assert open_run(config, "on_policy.slots=1").keys == run.keys


@pytest.mark.parametrize("online", [False, True])
def test_a_killed_phase_goes_on(
    online: bool, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the second round, and again before its rollouts were written: the same bits."""
    config = write_config(
        train__parity=False, train__steps=2, on_policy=SECTION, extract__online=online, train__checkpoint_every=1
    )
    undisturbed = open_run(config, f"output_dir={tmp_path / 'undisturbed'}")
    undisturbed.up_to("on_policy")
    whole = Trainer.train_step
    left = 2 + 3 + 2  # the training, the first round, two steps of the second

    def dying(self: Trainer, asked_to_stop: bool = False) -> dict[str, float]:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return whole(self, asked_to_stop)

    monkeypatch.setattr(Trainer, "train_step", dying)
    run = open_run(config)
    with pytest.raises(Killed):
        run.up_to("on_policy")
    second = run.folder("on_policy") / "round-2"
    assert list((second / "checkpoints").iterdir())
    written = (second / "rollouts" / "tokens.json").stat().st_mtime_ns
    left = 1
    again = open_run(config)
    again.up_to("on_policy")
    assert left == 0  # it went on, it did not begin anew
    assert (second / "rollouts" / "tokens.json").stat().st_mtime_ns == written
    assert head_bytes(again) == head_bytes(undisturbed)


@pytest.mark.parametrize("kind", sorted(TINY))
def test_every_method_has_a_second_phase(kind: str, finished: Path, tmp_path: Path) -> None:
    """On the data of a finished run."""
    folder = shutil.copytree(open_run(finished).config.folder, tmp_path / "run")
    fields = [f"method={json.dumps({'kind': kind} | TINY[kind])}", "train.parity=false", "train.steps=2"]
    fields += [f"output_dir={folder}"]
    section = json.dumps(SECTION | {"rounds": 1, "steps": 2})
    evaluation = 'eval.policies={"chain": {"kind": "chain", "depth": 2}}'
    run = open_run(finished, *fields, f"on_policy={section}", evaluation)
    run.up_to("on_policy")
    summary = run.summary("on_policy")
    assert summary is not None and summary["steps"] == 2
    assert summary["accepted_length"] >= summary["accepted_length_before"]
    assert read_head(run.head).config.kind == kind


def test_every_trained_method_is_tried() -> None:
    assert sorted(TINY) == sorted(
        kind for kind, (config, _) in METHODS.items() if isinstance(build_method(config()), TrainableMethod)
    )


WRONG = [
    ({"on_policy.depth": 3}, "on_policy.depth is 3, but method eagle3 teaches 2 draft positions; expected 1 to 2"),
    ({"on_policy.rounds": 0}, "on_policy.rounds: expected a number of at least 1, found 0"),
    ({"on_policy.decay": 1.5}, "on_policy.decay: expected a number of at most 1.0, found 1.5"),
    ({"on_policy.temperature": -1}, "on_policy.temperature: expected a number of at least 0.0, found -1"),
    ({"on_policy.round": 1}, "rounds"),  # did you mean
    ({"method": {"kind": "ngram"}, "on_policy.rounds": 1}, "method.kind=ngram has no head to train on rollouts"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str, write_config: WriteConfig) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_run(write_config(**changes))


def test_the_command_wants_its_section(write_config: WriteConfig) -> None:
    with pytest.raises(ConfigError, match="has no section on_policy"):
        open_run(write_config()).up_to("on_policy")


def test_several_processes_are_refused(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(train__parity=False, train__steps=1, on_policy=SECTION)
    run = open_run(config)
    run.up_to("train")
    two = replace(open_launch(), processes=2)
    monkeypatch.setattr(pipeline, "open_launch", lambda: two)
    with pytest.raises(ConfigError, match="on_policy lets one process decode and train, 2 were started"):
        run.up_to("on_policy")
