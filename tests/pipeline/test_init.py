"""`sstf init`: for every method and target, a file that loads, means what it says, and that `sstf plan` takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Gemma2Config, LlamaConfig, LlavaConfig, PreTrainedTokenizerFast

from sstf.cli import main
from sstf.config import RunConfig
from sstf.config_loading import Section, dump, inline, load
from sstf.data.config import SampleSource
from sstf.decode.adaptive import tree_policies
from sstf.decode.limits import refuse_beyond
from sstf.errors import ConfigError
from sstf.formats import engines_of
from sstf.methods import METHODS, TrainableMethod, build_method
from sstf.starter import description, read_target, suit
from sstf.trees import Chain

# That of the embedded target: of its configuration alone, so that its weights are not needed.
EMBEDDED_SHAPE = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
)  # fmt: skip


def run(*arguments: str | Path) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.fixture(scope="module")
def targets(
    tiny_target_folder: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Folders without weights."""
    base = tmp_path_factory.mktemp("outlines")
    small = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    configs: dict[str, Any] = {
        "embedded shape": EMBEDDED_SHAPE,
        "tiny": LlamaConfig.from_pretrained(tiny_target_folder),
        "shallow": LlamaConfig(**small, num_hidden_layers=2),
        "gemma": Gemma2Config(**small, num_hidden_layers=8, num_key_value_heads=2, head_dim=16),
        "images": LlavaConfig(),
    }
    for name, config in configs.items():
        PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(base / name)
        config.save_pretrained(base / name)
    return {name: base / name for name in configs}


@pytest.mark.parametrize("shape", ["embedded shape", "tiny"])
@pytest.mark.parametrize("kind", METHODS)
def test_what_is_written_is_taken_as_it_is(
    kind: str, shape: str, targets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    assert run("init", "--target", targets[shape], "--method", kind, "-o", path) == 0
    assert f"sstf plan {path}" in capsys.readouterr().out
    config, outline = load(RunConfig, path), read_target(str(targets[shape]))
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(RunConfig, tmp_path / "again.yaml") == config
    method = build_method(config.method)
    assert config.method.kind == kind and config.target.name == str(targets[shape])
    for policy in config.eval.policies.values():
        refuse_beyond(method.limits, policy, kind)
        assert all(tree.depth >= 2 for tree in tree_policies(policy))
    if isinstance(method, TrainableMethod):
        assert config.data.source == SampleSource()
        assert config.data.max_length <= outline.spec.max_position_embeddings
        assert method.draft_vocab_size == (8192 if shape == "embedded shape" else 300)
        assert method.feature_spec(outline.spec).layers
        assert set(engines_of(kind)) <= set(config.export.chosen(kind))
    assert run("plan", path, "--no-calibration") == 0


@pytest.mark.parametrize("kind", METHODS)
def test_everything_is_said_and_said_once(kind: str, targets: dict[str, Path], tmp_path: Path) -> None:
    assert run("init", "--target", targets["embedded shape"], "--method", kind, "-o", tmp_path / "x.yaml") == 0
    lines = (tmp_path / "x.yaml").read_text().splitlines()
    assert lines[0] == f"# {description(kind)}"[:120]
    assert max(map(len, lines)) <= 120
    comments = [line.split("# ", 1)[1] for line in lines if "# " in line]
    assert len(comments) == len(set(comments)) > 10
    assert not any("None" in comment for comment in comments)
    sections = yaml.safe_load("\n".join(lines))
    assert {"name", "target", "method", "eval"} <= set(sections)
    assert next(iter(sections["method"])) == "kind"
    trains = isinstance(build_method(METHODS[kind][0]()), TrainableMethod)
    assert ({"data", "extract", "train"} <= set(sections)) == trains


def test_words_come_from_where_the_settings_are(targets: dict[str, Path], tmp_path: Path) -> None:
    assert run("init", "--target", targets["tiny"], "--method", "medusa", "-o", tmp_path / "x.yaml") == 0
    lines = (tmp_path / "x.yaml").read_text().splitlines()
    assert "  heads: 5  # `heads` is how many tokens are drafted at most." in lines
    assert "  max_length: 256  # `max_length` is in tokens; longer conversations are cut at the end." in lines
    assert "    tree: {kind: dynamic, depth: 4, top_k: 4, total_tokens: 12}" in lines
    assert run("init", "--target", targets["tiny"], "--method", "eagle3", "-o", tmp_path / "y.yaml") == 0
    assert "  layers: [1, 3, 4]" in (tmp_path / "y.yaml").read_text()
    assert run("init", "--target", targets["tiny"], "--method", "ngram", "-o", tmp_path / "z.yaml") == 0
    assert load(RunConfig, tmp_path / "z.yaml").eval.policies == {"chain": Chain(depth=3)}


def failing(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert run("init", *arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    ("shape", "kind", "why"),
    [
        ("shallow", "eagle3", "target shallow has layers 0 to 1, cannot read [1, 0, -2]"),
        ("gemma", "medusa", "target gemma: its final norm is no plain RMSNorm"),
        ("images", "ngram", "reads images or sound and cannot be loaded for text alone"),
        ("tiny", "medussa", f"there is no method 'medussa'; expected one of {', '.join(METHODS)}"),
        ("nowhere", "ngram", "its configuration and tokenizer cannot be read"),
    ],
)
def test_a_pair_that_cannot_be(
    shape: str, kind: str, why: str, targets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.yaml"
    target = targets.get(shape, tmp_path / shape)
    assert why in failing(capsys, "--target", target, "--method", kind, "-o", path)
    assert not path.exists()


def test_a_target_with_a_recurrent_state(targets: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that drafts with the target's own layers needs them to take tokens back; others draft chains."""
    outline = replace(read_target(str(targets["tiny"])), recurrent=True)
    suit("ngram", outline)
    monkeypatch.setattr(METHODS["ngram"][1], "shared_layers", 2)
    with pytest.raises(ConfigError, match="method ngram drafts with the first layers of target tiny, some of which ke"):
        suit("ngram", outline)


def test_nothing_is_written_over(
    targets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("init", "--target", targets["tiny"], "--method", "suffix") == 0
    path = Path("tiny-suffix.yaml")
    path.write_text("name: mine\n")
    arguments = ("--target", targets["tiny"], "--method", "suffix")
    assert "tiny-suffix.yaml is there already; name another file, or write over it with --force" in failing(
        capsys, *arguments
    )
    assert path.read_text() == "name: mine\n"
    assert "is there already; name a file in it" in failing(capsys, *arguments, "-o", tmp_path, "--force")
    assert run("init", *arguments, "--force") == 0
    assert load(RunConfig, path).name == "tiny-suffix"
    assert run("init", *arguments, "-o", "new/folder/x.yaml") == 0 and Path("new/folder/x.yaml").is_file()


def test_which_methods_there_are(targets: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("init") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert all(
        description(kind) in line and description(kind).endswith(".") for kind, line in zip(METHODS, lines, strict=True)
    )
    assert run("init", "--target", targets["shallow"]) == 0
    out = capsys.readouterr().out
    assert "not for shallow: method.layers: target shallow has layers 0 to 1" in out and "medusa" in out
    assert "needs a target" in failing(capsys, "--method", "medusa")


class Holder(Section):
    value: Any


@pytest.mark.parametrize("value", ["1e5", "a: b", "null", 1e-4, None, [1, [2]], {"a": [1, {"b": "~"}]}, "é", "x" * 300])
def test_inline_values_come_back(value: Any, tmp_path: Path) -> None:
    text = inline(value)
    assert "\n" not in text
    (tmp_path / "x.yaml").write_text(f"value: {text}\n")
    assert load(Holder, tmp_path / "x.yaml").value == value
