"""`sstf data` and its looks at the data: --preview before and after the stage, --verify on sound and damaged stores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pipeline_runs import WriteConfig, open_run

from sstf.cli import main

Ended = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ended(capsys: pytest.CaptureFixture[str]) -> Ended:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, printed.out, " ".join(printed.err.split())

    return run


def test_data_says_what_became_of_the_rows(write_config: WriteConfig, tmp_path: Path, ended: Ended) -> None:
    config = write_config()
    with (tmp_path / "conversations.jsonl").open("a") as file:
        file.write(json.dumps({"id": "long", "messages": [{"role": "user", "content": "x" * 300}]}) + "\n")
    code, out, _ = ended("data", config)
    assert code == 0
    report = open_run(config).data_report()
    assert f"12 samples, {report['tokens']:,} tokens" in out
    assert "13 rows read, 13 usable" in out
    assert "dropped: 1 fewer than min_trained_tokens within max_length" in out
    assert "compared with the prompts of builtin" in out


def test_a_preview_before_the_stage_shows_the_answers_of_the_source(
    write_config: WriteConfig, tmp_path: Path, ended: Ended
) -> None:
    config = write_config()
    code, out, _ = ended("data", config, "--preview")
    assert code == 0
    assert "⟦Hello<|im_end|>⟧" in out.replace("\n", "")
    assert "with the answers of the source, before the target writes its own" in out
    run = open_run(config)
    page = (run.config.folder / "preview.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and '"id":"c0"' in page.replace(" ", "")
    assert run.summary("data") is None and not run.generated.exists()  # nothing was generated


def test_a_preview_after_the_stage_shows_what_is_trained(finished: Path, tmp_path: Path, ended: Ended) -> None:
    copy = shutil.copytree(open_run(finished).config.folder, tmp_path / "run")
    code, out, _ = ended("data", finished, "--preview", f"output_dir={copy}")
    assert code == 0 and "12 samples as trained" in out
    assert (open_run(finished, f"output_dir={copy}").folder("data") / "preview.html").is_file()


def test_verify(finished: Path, tmp_path: Path, ended: Ended) -> None:
    copy = shutil.copytree(open_run(finished).config.folder, tmp_path / "run")
    code, out, err = ended("data", finished, f"output_dir={copy}", "--verify")
    assert (code, [line.split()[0] for line in out.splitlines()]) == (0, ["sound", "sound"])
    run = open_run(finished, f"output_dir={copy}")
    for file in (run.folder("extract") / "shard-00001.safetensors", run.folder("data") / "tokens.safetensors"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 8
        file.write_bytes(data)
    code, out, err = ended("data", finished, f"output_dir={copy}", "--verify")
    assert (code, [line.split()[0] for line in out.splitlines()]) == (3, ["DAMAGED", "DAMAGED"])
    assert "shard-00001.safetensors" in err and "tokens.safetensors does not match the checksum" in err


def test_nothing_to_verify(write_config: WriteConfig, ended: Ended) -> None:
    code, _, err = ended("data", write_config(), "--verify")
    assert code == 2 and "nothing is stored for" in err


def test_self_written_conversations_cannot_be_previewed_before_they_are_written(
    write_config: WriteConfig, ended: Ended
) -> None:
    config = write_config(data__source={"kind": "self_written", "conversations": 2})
    code, _, err = ended("data", config, "--preview")
    assert code == 2 and "run `sstf data` first, then preview them" in err


def test_an_evaluation_on_trained_prompts_says_so(write_config: WriteConfig, tmp_path: Path, ended: Ended) -> None:
    config = write_config()
    run = open_run(config)
    run.up_to("train")
    row = json.loads((run.folder("data") / "conversations.jsonl").read_text().splitlines()[2])
    (tmp_path / "suite.jsonl").write_text(json.dumps({"prompt": row["messages"][0]["content"]}) + "\n")
    code, _, err = ended("eval", config)
    assert code == 0
    assert "1 training conversations hold a prompt of" in err and "its figures flatter the head" in err
    summary = open_run(config).summary("eval")
    assert summary is not None and summary["conversations_with_its_prompts"] == 1
    # Named as a suite, it is kept out of the training.
    kept_out = open_run(config, f"data.filters.suites=[{tmp_path / 'suite.jsonl'}]")
    kept_out.up_to("data")
    assert kept_out.data_report()["dropped"] == {"holds an evaluation prompt": 1}
    assert kept_out.generated == run.generated


def test_online_training_needs_no_features_and_gives_the_same_losses(write_config: WriteConfig) -> None:
    config = write_config(extract__codec="bf16")  # other codecs round more than the target does
    stored, online = open_run(config), open_run(config, "extract.online=true")
    stored.up_to("train")
    online.up_to("train")
    assert not online.folder("extract").exists() or online.folder("extract") == stored.folder("extract")
    assert online.folder("train") != stored.folder("train")
    logs = []
    for run in (stored, online):
        lines = (run.folder("train") / "metrics.jsonl").read_text().splitlines()
        logs.append([{k: v for k, v in json.loads(line).items() if k.startswith(("train/", "val/"))} for line in lines])
    assert len(logs[0]) == len(logs[1]) >= 4
    for expected, found in zip(*logs, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


def test_online_there_is_nothing_to_extract(write_config: WriteConfig, ended: Ended) -> None:
    code, _, err = ended("extract", write_config(), "extract.online=true")
    assert code == 2 and "there is nothing to extract; use `sstf train`" in err
