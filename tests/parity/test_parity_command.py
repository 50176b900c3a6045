"""`sstf parity`, and the ladder at the end of a training stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from sstf.cli import main
from sstf.config import RunConfig
from sstf.config_loading import load
from sstf.data.progress import NoProgress
from sstf.errors import ParityError
from sstf.formats import export_head
from sstf.heads import FusedEagle
from sstf.methods.checkpoint import read_head
from sstf.parity.ladder import training_precision
from sstf.pipeline import Run
from sstf.train.trainer import Trainer

SHORT = ("--prompts", "2", "--max-new-tokens", "8")


def parity(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["parity", *map(str, arguments), *SHORT])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_a_sound_head(learned: Path, tiny_target_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = parity(capsys, learned, "--target", tiny_target_folder)
    assert code == 0
    for words in ("trainer", "reloaded", "pass", "2 prompts, greedy, chains of 3, 8 tokens at most"):
        assert words in out
    assert "fail" not in out


def test_a_broken_export_ends_with_1(
    learned: Path, tiny_target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_head(read_head(learned), "vllm", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: t.roll(1, 0) if name == "fc.weight" else t for name, t in load_file(file).items()}, file)
    given = ("--target", tiny_target_folder, "--exported", tmp_path)
    code, out, _ = parity(capsys, learned, *given)
    assert code == 1 and "fc.weight differs by up to" in out
    code, out, _ = parity(capsys, learned, *given, "--depth", "1", "--json")
    found = json.loads(out)
    assert code == 1 and found["verdict"] == "fail" and found["depth"] == 1
    assert [rung["verdict"] for rung in found["rungs"]] == ["pass", "pass", "fail"]
    assert found["rungs"][2]["first_difference"] == "fc.weight"


def test_bad_input(learned: Path, tiny_target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = parity(capsys, tmp_path)
    assert code == 2 and "no head there" in err
    code, _, err = parity(capsys, learned, "--target", tiny_target_folder, "--vllm", tmp_path)
    assert code == 2 and "no virtual environment with vLLM" in err
    code, _, err = parity(capsys, learned, "--target", tiny_target_folder, "--depth", "0")
    assert code == 2 and "--depth" in err


def test_the_precision_of_the_training_beside_a_head(tmp_path: Path) -> None:
    (tmp_path / "head").mkdir()
    assert training_precision(tmp_path / "head") == "bf16"
    for text, precision in (("train: {precision: fp32}", "fp32"), ("train: {}", "bf16"), ("[", "bf16")):
        (tmp_path / "config.yaml").write_text(text)
        assert training_precision(tmp_path / "head") == precision


# ---- at the end of training ------------------------------------------------------------------------------------------


def config_of(target: Path, folder: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"tell {i}"}, {"role": "assistant", "content": f"so {i} it is"}]}
        for i in range(6)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields: dict[str, Any] = {
        "name": "tiny",
        "output_dir": str(folder / "run"),
        "target": {"name": str(target), "dtype": "float32", "device": "cpu"},
        "data": {
            "source": {"kind": "jsonl", "path": str(folder / "rows.jsonl")},
            "answers": {"kind": "keep"},
            "max_length": 128,
            "filters": {"near_duplicates": None},
        },
        "method": {"kind": "eagle3", "ttt_steps": 2, "draft_vocab_size": 200},
        "train": {"steps": 2, "step_tokens": 256, "validation_conversations": 0, "validate_every": 2},
    }
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(fields))
    return config


def test_training_is_not_complete_with_a_head_that_decodes_differently(
    tiny_target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny_target_folder, tmp_path)
    run = Run(load(RunConfig, config, []), NoProgress())
    with monkeypatch.context() as patched:
        patched.setattr(FusedEagle, "logits", lambda self, out: out @ self.head.lm_head.weight.T)
        with pytest.raises(ParityError, match=r"reloaded: logits\.0 is off by .*`sstf parity` shows every rung"):
            run.up_to("train")
    folder = run.folder("train")
    assert run.summary("train") is None and (folder / "head" / "head.json").is_file()

    # With the decoder as it should be, the same command finishes without another step.
    monkeypatch.setattr(Trainer, "train_step", None)
    again = Run(load(RunConfig, config, []), NoProgress())
    again.up_to("train")
    summary = again.summary("train")
    assert summary is not None and summary["parity"]["verdict"] == "pass"


def test_a_target_that_cannot_be_loaded_says_nothing_about_the_head(tiny_target_folder: Path, tmp_path: Path) -> None:
    notes: list[str] = []

    class Notes(NoProgress):
        def note(self, text: str) -> None:
            notes.append(text)

    target = tmp_path / "target"
    target.symlink_to(tiny_target_folder)
    config = config_of(target, tmp_path)
    run = Run(load(RunConfig, config, []), Notes())
    run.up_to("extract")
    keys = run.keys
    again = Run(load(RunConfig, config, []), Notes())
    again.__dict__["keys"] = keys  # which look at the target's files
    target.unlink()
    again.up_to("train")
    summary = again.summary("train")
    assert summary is not None and summary["parity"]["verdict"] == "not checked"
    assert any(note.startswith("parity was not checked: target") for note in notes)
