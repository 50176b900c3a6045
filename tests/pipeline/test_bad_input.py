"""Everything that a user can get wrong ends in a clear message, the right exit code, no traceback, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_runs import WriteConfig, open_run
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from sstf.cli import main
from sstf.config import RunConfig
from sstf.config_loading import dump, load
from sstf.data import atomic
from sstf.evaluation import EvalConfig
from sstf.pipeline import Run
from sstf.trees import Chain

Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command that must fail with `code`; returns its message."""

    def run(*arguments: str | Path, code: int = 2) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        seen = capsys.readouterr()
        assert ended.value.code == code, seen.err
        assert "Traceback" not in seen.err
        message = seen.err[seen.err.index("error: ") :]
        # One message, of which nothing is repeated, and no dump of a library's own words.
        assert message.count("error: ") == 1
        assert len(message) < 700, message
        assert message.count("\n") <= 1, message
        return message

    return run


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Run:
    """A finished run that a test may damage; its commands need `output_dir=` of it."""
    shutil.copytree(open_run(finished).config.folder, tmp_path / "run")
    return open_run(finished, f"output_dir={tmp_path / 'run'}")


def at(run: Run) -> str:
    return f"output_dir={run.config.folder}"


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_unknown_key(write_config: WriteConfig, fails: Fails) -> None:
    message = fails("run", write_config(train__learning_rat=1e-3))
    assert re.search(
        r'run\.yaml:\d+: train\.learning_rat: unknown key\. Did you mean "optimizer\.learning_rate"\?', message
    )


def test_unknown_key_in_an_override(write_config: WriteConfig, fails: Fails) -> None:
    message = fails("run", write_config(), "eval.repeat=2")
    assert 'override eval.repeat=2: eval.repeat: unknown key. Did you mean "repeats"?' in message


def test_wrong_type(write_config: WriteConfig, fails: Fails) -> None:
    message = fails("run", write_config(train__optimizer={"learning_rate": "fast"}))
    assert 'learning_rate: expected a number, found "fast" (text)' in message


def test_contradiction(write_config: WriteConfig, fails: Fails) -> None:
    message = fails("run", write_config(train__epochs=2))
    assert "train: give either epochs or steps: both found" in message


def test_missing_configuration(tmp_path: Path, fails: Fails) -> None:
    assert "no.yaml: no such file; expected a YAML configuration" in fails("run", tmp_path / "no.yaml")


def test_brackets_and_colons_of_a_message_are_shown(tmp_path: Path, fails: Fails) -> None:
    """They mean markup and emoji to the library that prints."""
    assert "[red]:car:.yaml: no such file" in fails("run", tmp_path / "[red]:car:.yaml")


def test_no_stage_starts_on_a_bad_configuration(write_config: WriteConfig, fails: Fails, tmp_path: Path) -> None:
    fails("run", write_config(train__epochs=2))
    assert not (tmp_path / "run").exists()


def test_training_a_method_that_has_none(write_config: WriteConfig, fails: Fails) -> None:
    assert "method.kind=ngram needs no training" in fails("train", write_config(method={"kind": "ngram"}))


def test_output_folder_below_a_file(write_config: WriteConfig, fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = write_config(output_dir=str(tmp_path / "file" / "run"))
    assert re.search(r"cannot write to .*/file/run \(Not a directory\); set output_dir", fails("run", config))


def test_output_folder_is_a_file(write_config: WriteConfig, fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write to" in fails("run", write_config(output_dir=str(tmp_path / "file")))


def test_output_folder_without_permission(
    write_config: WriteConfig, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the refusal is played."""

    def deny(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    config = write_config()
    monkeypatch.setattr(Path, "mkdir", deny)
    assert "cannot write to" in fails("run", config)


# ---- data ------------------------------------------------------------------------------------------------------------


def break_line(path: Path, number: int) -> None:
    lines = path.read_text().splitlines(keepends=True)
    lines[number - 1] = '{"messages": [\n'
    path.write_text("".join(lines))


def test_broken_row_stops(write_config: WriteConfig, fails: Fails, tmp_path: Path) -> None:
    config = write_config()
    break_line(tmp_path / "conversations.jsonl", 3)
    message = fails("data", config)
    assert "conversations.jsonl:3: broken JSON" in message
    assert "Correct the row, or set on_bad_row=skip" in message


def test_broken_row_is_skipped_and_counted(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(data__on_bad_row="skip")
    break_line(tmp_path / "conversations.jsonl", 3)
    with pytest.raises(SystemExit) as ended:
        main(["data", str(config)])
    assert ended.value.code == 0
    report = json.loads((open_run(config).folder("data") / "report.json").read_text())
    assert report["read"] == {"read": 12, "kept": 11, "skipped": {"broken JSON": 1}, "repaired": {}}


def test_conversation_without_an_answer_to_keep(write_config: WriteConfig, fails: Fails, tmp_path: Path) -> None:
    config = write_config(data__answers={"kind": "keep"})
    (tmp_path / "conversations.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}))
    assert "conversations.jsonl:1: no assistant turn: there is no answer to keep" in fails("data", config)


def test_empty_data_set(write_config: WriteConfig, fails: Fails, tmp_path: Path) -> None:
    config = write_config()
    (tmp_path / "conversations.jsonl").write_text("")
    assert "The jsonl source holds no usable conversation: 0 rows read" in fails("data", config)


def test_missing_data_file(write_config: WriteConfig, fails: Fails, tmp_path: Path) -> None:
    config = write_config()
    (tmp_path / "conversations.jsonl").unlink()
    assert "conversations.jsonl does not exist" in fails("run", config)


def test_too_little_room_for_an_answer(write_config: WriteConfig, fails: Fails) -> None:
    assert "Raise data.max_length, lower data.min_trained_tokens" in fails("data", write_config(data__max_length=4))


# ---- target ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def target_copy(tiny_target_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_target_folder, tmp_path / "target")


def set_template(folder: Path, template: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    for old in folder.glob("chat_template*"):
        old.unlink()
    tokenizer.save_pretrained(folder)


PLAIN = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
NO_GENERATION_PROMPT = PLAIN  # the answer does not follow the prompt: the role marker stands between them
REWRITES_HISTORY = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '(thinks)' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("answers", [{"kind": "keep"}, {"kind": "regenerate", "max_new_tokens": 4}])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (NO_GENERATION_PROMPT, "the chat template does not put the answer right after the prompt"),
        (REWRITES_HISTORY, "chat template"),
        (None, "has no chat template"),
        ("{{ raise_exception('no system role') }}", "The chat template refuses the turns (user"),
        ("{% for m in messages %}", "chat template"),  # not valid Jinja
    ],
    ids=["no generation prompt", "rewrites history", "none", "refuses", "broken"],
)
def test_template_that_gives_no_mask(
    write_config: WriteConfig,
    target_copy: Path,
    fails: Fails,
    tmp_path: Path,
    template: str | None,
    expected: str,
    answers: dict[str, Any],
) -> None:
    set_template(target_copy, template)
    config = write_config(target__name=str(target_copy), data__answers=answers)
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "more"), ("assistant", "moon")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (tmp_path / "conversations.jsonl").write_text(json.dumps(row))
    assert expected in fails("data", config)


def test_target_folder_that_does_not_exist(write_config: WriteConfig, fails: Fails) -> None:
    assert "no config.json in /nowhere/model" in fails("run", write_config(target__name="/nowhere/model"))


def test_target_folder_without_config(write_config: WriteConfig, fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "expected a transformers model folder" in fails("run", write_config(target__name=str(tmp_path / "empty")))


def test_pickled_weights_are_refused(write_config: WriteConfig, target_copy: Path, fails: Fails) -> None:
    weights = target_copy / "model.safetensors"
    torch.save(load_file(weights), target_copy / "pytorch_model.bin")
    weights.unlink()
    message = fails("run", write_config(target__name=str(target_copy)))
    assert "cannot be loaded" in message and "safetensors" in message


@pytest.mark.parametrize("size", [0, 1000])
def test_truncated_weights(write_config: WriteConfig, target_copy: Path, fails: Fails, size: int) -> None:
    weights = target_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    assert "cannot be loaded" in fails("run", write_config(target__name=str(target_copy)))


def test_missing_weights_are_not_replaced_by_noise(write_config: WriteConfig, target_copy: Path, fails: Fails) -> None:
    weights = load_file(target_copy / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, target_copy / "model.safetensors", metadata={"format": "pt"})
    message = fails("run", write_config(target__name=str(target_copy)))
    assert "model.layers.3.mlp.up_proj.weight" in message


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_broken_json_in_the_target_folder(
    write_config: WriteConfig, target_copy: Path, fails: Fails, file: str
) -> None:
    (target_copy / file).write_text("{")
    assert "cannot be loaded" in fails("run", write_config(target__name=str(target_copy)))


def test_weights_of_another_shape(write_config: WriteConfig, target_copy: Path, fails: Fails) -> None:
    config = json.loads((target_copy / "config.json").read_text())
    (target_copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    assert "cannot be loaded" in fails("run", write_config(target__name=str(target_copy)))


@pytest.mark.parametrize("device", ["cuda:7", "tpu"])
def test_device_that_is_not_there(write_config: WriteConfig, fails: Fails, device: str) -> None:
    assert device in fails("run", write_config(target__device=device))


def test_layers_beyond_the_target(write_config: WriteConfig, fails: Fails) -> None:
    message = fails("run", write_config(method__layers=[1, 3, 8]))
    assert "method.layers: target tiny has layers 0 to 7, cannot read [1, 3, 8]" in message


def test_default_layers_on_a_shallow_target(
    write_config: WriteConfig, target_copy: Path, fails: Fails, tmp_path: Path
) -> None:
    weights = LlamaForCausalLM.from_pretrained(target_copy)
    weights.config.num_hidden_layers = 4
    LlamaForCausalLM(weights.config).save_pretrained(target_copy)
    message = fails("run", write_config(target__name=str(target_copy)))
    assert "has layers 0 to 3, cannot read [1, 1, 0]; name different layers in that range" in message


# ---- damaged results -------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Change one bit in the middle; the size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def redo(run: Run, *stages: str) -> None:
    for stage in stages:
        shutil.rmtree(run.folder(stage))


def test_altered_tokens(copied: Run, finished: Path, fails: Fails) -> None:
    redo(copied, "extract")
    tokens = copied.folder("data") / "tokens.safetensors"
    flip(tokens)
    message = fails("extract", finished, at(copied), code=3)
    assert f"{tokens} does not match the checksum in tokens.json" in message


def test_truncated_shard(copied: Run, finished: Path, fails: Fails) -> None:
    redo(copied, "train")
    shard = copied.folder("extract") / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    message = fails("train", finished, at(copied), code=3)
    assert re.search(r"shard-00001\.safetensors has \d+ bytes, expected \d+", message)


def test_altered_shard_and_the_way_out_that_the_message_names(
    copied: Run, finished: Path, fails: Fails, capsys: pytest.CaptureFixture[str]
) -> None:
    head = copied.folder("train") / "head" / "head.safetensors"
    expected = head.read_bytes()
    redo(copied, "train")
    shard = copied.folder("extract") / "shard-00001.safetensors"
    flip(shard)
    message = fails("train", finished, at(copied), code=3)
    assert f"{shard}: its checksum differs from the manifest's" in message
    assert "delete shard-00001.safetensors and the manifest.json beside it, and run `sstf extract` again" in message
    shard.unlink()
    (shard.parent / "manifest.json").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["train", str(finished), at(copied)])
    assert ended.value.code == 0, capsys.readouterr().err
    assert head.read_bytes() == expected


def test_missing_shard(copied: Run, finished: Path, fails: Fails) -> None:
    redo(copied, "train")
    (copied.folder("extract") / "shard-00000.safetensors").unlink()
    assert "shard-00000.safetensors is missing" in fails("train", finished, at(copied), code=3)


def test_altered_frozen_parts(copied: Run, finished: Path, fails: Fails) -> None:
    redo(copied, "train")
    flip(copied.folder("extract") / "frozen.safetensors")
    assert "frozen.safetensors is missing or altered" in fails("train", finished, at(copied), code=3)


def test_altered_checkpoint(copied: Run, finished: Path, fails: Fails) -> None:
    (copied.folder("train") / "done.json").unlink()
    flip(copied.folder("train") / "checkpoints" / "step-00000004" / "optimizer.safetensors")
    message = fails("train", finished, at(copied), code=3)
    assert "optimizer.safetensors: altered or cut off" in message and "earlier checkpoint" in message


@pytest.mark.parametrize("command", ["eval", "export"])
def test_altered_head(copied: Run, finished: Path, fails: Fails, command: str) -> None:
    redo(copied, command)
    flip(copied.folder("train") / "head" / "head.safetensors")
    assert "head.safetensors: altered or cut off" in fails(command, finished, at(copied), code=3)


def test_head_of_another_target(copied: Run, finished: Path, fails: Fails) -> None:
    redo(copied, "eval")
    description = copied.folder("train") / "head" / "head.json"
    fields = json.loads(description.read_text())
    fields["target"] |= {"name": "sibling", "fingerprint": "0123456789abcdef"}
    description.write_text(json.dumps(fields))
    message = fails("eval", finished, at(copied))
    assert "the head was trained for target sibling" in message
    assert "the same shape but other weights or another dtype" in message


def test_altered_answers(copied: Run, finished: Path, fails: Fails) -> None:
    (copied.folder("data") / "done.json").unlink()
    flip(copied.generated / "answers-00001.jsonl")
    assert "answers-00001.jsonl does not match its checksum" in fails("data", finished, at(copied), code=3)


# ---- suite -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no prompt"),
        ('{"prompt": "Hi"}\n{"prompt"', "suite.jsonl:2: expected a JSON object"),
        ('{"question": "Hi"}', "suite.jsonl:1: expected a JSON object with `prompt` or `messages`"),
        ('["Hi"]', "suite.jsonl:1: expected a JSON object"),
        ('{"prompt": " "}', "suite.jsonl:1: a message without text"),
        ('{"messages": [{"role": "system", "content": "Hi"}]}', "suite.jsonl:1: the last message must be a user's"),
        ('{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}', "'a' is the id of several prompts"),
    ],
)
def test_suite_that_cannot_be_used(
    write_config: WriteConfig, fails: Fails, tmp_path: Path, text: str, expected: str
) -> None:
    config = write_config()
    (tmp_path / "suite.jsonl").write_text(text)
    assert expected in fails("run", config)
    assert not (tmp_path / "run" / "data").exists()  # found out before any work


def test_suite_that_is_not_utf8(write_config: WriteConfig, fails: Fails, tmp_path: Path) -> None:
    config = write_config()
    (tmp_path / "suite.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    assert "byte 16 is not UTF-8" in fails("run", config)


def test_suite_that_does_not_exist(write_config: WriteConfig, fails: Fails) -> None:
    message = fails("run", write_config(eval__suite="no.jsonl"))
    assert "'no.jsonl', expected builtin, " in message and "or an existing JSONL file" in message


def test_suite_beyond_the_context(finished: Path, fails: Fails) -> None:
    assert "the target's context has 256; lower eval.max_new_tokens" in fails(
        "eval", finished, "eval.max_new_tokens=250"
    )


def test_policy_named_like_a_baseline() -> None:
    with pytest.raises(ValueError, match=r"policies may not be named \['ngram'\]"):
        EvalConfig.model_validate({"policies": {"ngram": {"kind": "chain"}}})


@pytest.mark.parametrize("command", ["plan", "run"])
def test_policies_that_the_method_cannot_draft(
    command: str, write_config: WriteConfig, fails: Fails, tmp_path: Path
) -> None:
    arms = {"near": {"kind": "chain", "depth": 2}, "wide": {"kind": "dynamic"}}
    policies = {"mine": {"kind": "bandit", "arms": arms}}
    said = fails(command, write_config(method={"kind": "ngram"}, eval__policies=policies))
    assert "run.yaml:" in said and "eval.policies.mine.arms.wide is a dynamic tree, but method ngram drafts" in said
    assert "expected kind: chain, any depth" in said
    assert not (tmp_path / "run").exists()


def test_default_policies_are_what_the_method_can_draft(write_config: WriteConfig, tmp_path: Path) -> None:
    config = load(RunConfig, write_config(method={"kind": "ngram"}))
    assert config.eval.policies == {"chain": Chain(depth=3)}
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(RunConfig, tmp_path / "again.yaml") == config
    assert load(RunConfig, write_config()).eval.policies == EvalConfig().policies


# ---- a full disk -----------------------------------------------------------------------------------------------------


def test_full_disk_when_a_file_is_written(
    write_config: WriteConfig, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second group of answers does not fit; the first is kept and used by the next run."""
    config = write_config()
    calls = 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:  # config.yaml and group 0, each with its folder
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", full)
        message = fails("data", config)
    assert "the disk is full; free some space and run the command again: what is done is kept" in message
    folder = open_run(config).generated
    assert [path.name for path in sorted(folder.iterdir())] == ["answers-00000.jsonl"]
    written = (folder / "answers-00000.jsonl").stat().st_mtime_ns
    open_run(config).up_to("data")
    assert (folder / "answers-00000.jsonl").stat().st_mtime_ns == written


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of so many KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kib: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("needs the right to mount a file system")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(
        [sys.executable, "-m", "sstf", *map(str, arguments)], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize(
    ("stage", "kib"),
    [("extract", 250), ("extract", 550), ("train", 1500)],
    ids=["frozen parts", "shards", "checkpoints"],
)
def test_truly_full_disk(
    copied: Run, finished: Path, fails: Fails, small_disk: Callable[[int], Path], stage: str, kib: int, tmp_path: Path
) -> None:
    disk = small_disk(kib)
    kept = ["data"] if stage == "extract" else ["data", "extract"]
    folder = disk if stage == "extract" else tmp_path / "run2"
    for name in kept:
        shutil.copytree(copied.folder(name), folder / name / copied.keys[name])
    if stage == "train":
        (folder / "train").symlink_to(disk)
    expected = "error: the disk is full; free some space"
    if stage == "extract":
        assert expected in fails(stage, finished, f"output_dir={folder}")
    else:  # a process of its own, because what was left unwritten is written once more when it ends
        ended = command(stage, finished, f"output_dir={folder}")
        assert ended.returncode == 2, ended.stderr
        assert "Traceback" not in ended.stderr and "Exception ignored" not in ended.stderr
        assert expected in ended.stderr
    for name in kept:
        assert (folder / name / copied.keys[name] / "done.json").is_file()
    subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
    run = open_run(finished, f"output_dir={folder}")
    run.up_to(stage)
    file = "shard-00000.safetensors" if stage == "extract" else "head/head.safetensors"
    assert (run.folder(stage) / file).read_bytes() == (copied.folder(stage) / file).read_bytes()


# ---- the process itself ----------------------------------------------------------------------------------------------


def test_exit_code_and_message_of_the_process(write_config: WriteConfig) -> None:
    ended = command("run", write_config(target__name="/nowhere/model"))
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "error: target /nowhere/model: no config.json in /nowhere/model" in ended.stderr
    assert ended.stdout == ""
