"""Published heads through the commands that take a head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from published_heads import eagle, speculators

from sstf.chat import ChatConfig, open_chat
from sstf.cli import main
from sstf.errors import HeadError
from sstf.formats import read_any
from sstf.methods.checkpoint import save_head
from sstf.methods.eagle3 import Eagle3Method
from sstf.targets import Target


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and error output."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, " ".join(err.split())


@pytest.fixture
def own(tiny_target: Target, tmp_path: Path) -> Path:
    """A head folder of ours, with the numbers of a published one."""
    stored = read_any(eagle().write(tmp_path / "source"), tiny_target.spec)
    draft_tokens = stored.tensors["d2t"] + stored.tensors["d2t"].new_tensor(range(100))
    head = Eagle3Method(stored.config).build_head(tiny_target.spec, tiny_target.frozen_head, draft_tokens)
    head.load_state_dict(stored.tensors)
    save_head(tmp_path / "head", stored.config, head, tiny_target.spec, {})
    return tmp_path / "head"


def test_export_of_a_head(
    own: Path, tiny_target: Target, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # where the target is looked for, in vain
    for engine, needs in (("vllm", "needs vLLM 0.8.5 or later"), ("speculators", "needs speculators 0.3.0 or later")):
        code, out, _ = run(capsys, "export", own, "--to", engine)
        folder = own.with_name(f"head-{engine}")
        assert code == 0 and str(folder) in out and needs in out
        assert read_any(folder, tiny_target.spec).layers == (1, 3, 4)
    code, _, _ = run(capsys, "export", own, "--to", "vllm")
    assert code == 0  # an earlier export is written over
    verifier = json.loads((own.with_name("head-speculators") / "config.json").read_text())["speculators_config"]
    assert verifier["verifier"] == {"name_or_path": None, "architectures": ["LlamaForCausalLM"]}


def test_export_from_one_form_to_another(
    tiny_target: Target, tiny_target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = eagle().write(tmp_path / "theirs"), tmp_path / "ours"
    options = ("export", source, "--to", "speculators", "--out", out)
    code, _, err = run(capsys, *options)
    assert code == 2 and "names no target; say --target NAME" in err and not out.exists()
    assert run(capsys, *options, "--target", tiny_target_folder)[0] == 0
    assert read_any(out, tiny_target.spec).config == read_any(source, tiny_target.spec).config
    verifier = json.loads((out / "config.json").read_text())["speculators_config"]["verifier"]
    assert verifier["name_or_path"] == str(tiny_target_folder)


def test_exports_that_cannot_be(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    for arguments, message in (
        ((own,), "is a folder; to export a head, say --to vllm, sglang, speculators or transformers"),
        ((own, "train.steps=1", "--to", "vllm"), "has no setting train.steps=1"),
        ((own, "--to", "vllm", "--out", tmp_path / "mine"), "holds something else than an earlier export"),
        ((own, "--to", "vllm", "--out", own), "holds something else than an earlier export"),
        ((tmp_path / "mine", "--to", "vllm"), "no head there"),
    ):
        code, _, err = run(capsys, "export", *arguments)
        assert code == 2 and message in err and "Traceback" not in err
    assert (tmp_path / "mine" / "diary.txt").exists() and (own / "head.json").exists()


def test_evaluation_of_a_published_head(
    tiny_target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "suite.jsonl"
    turn = {"id": "a", "category": "chat", "messages": [{"role": "user", "content": "Hi"}]}
    suite.write_text(json.dumps(turn) + "\n")
    head = speculators([2, 4, 5])
    head.config["speculators_config"]["verifier"]["name_or_path"] = str(tiny_target_folder)
    folder = head.write(tmp_path / "theirs")
    settings = [f"eval.suite={suite}", "eval.repeats=1", "eval.max_new_tokens=8"]
    code, out, _ = run(capsys, "eval", folder, *settings, "--out", tmp_path / "report")
    assert code == 0 and "decoding, batch 1" in out
    rows = json.loads((tmp_path / "report" / "report.json").read_text())["rows"]
    assert {row["arm"] for row in rows} == {"plain", "ngram", "chain", "tree"}
    for arguments, message in (
        (["train.steps=3"], "train.steps=3: a head is evaluated by settings such as eval.prompts=8 alone"),
        (["eval.promts=3"], 'Did you mean "prompts"?'),
        (["--out", suite], "is no folder"),
    ):
        code, _, err = run(capsys, "eval", folder, *arguments)
        assert code == 2 and message in err


def test_a_chat_with_a_published_head(tiny_target_folder: Path, tmp_path: Path) -> None:
    folder = eagle().write(tmp_path)
    with pytest.raises(HeadError, match="names no target"):
        open_chat(str(folder), ChatConfig())
    chat = open_chat(str(folder), ChatConfig(max_new_tokens=8), str(tiny_target_folder))
    assert chat.drafter == f"{folder} (eagle3)"
    assert chat.ask("Hello").figures.tokens == 8
