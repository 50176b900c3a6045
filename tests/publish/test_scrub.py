"""Keys and local paths are taken out, and what is left over is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sstf.errors import ExportError
from sstf.publish.scrub import check_files, scrubbed_for_others

# Written in two parts, so that nothing that searches for keys takes this file for a leak.
KEYS = [
    "hf_" + "a1B2" * 8,
    "sk-" + "x9" * 12,
    "ghp_" + "q" * 30,
    "AKIA" + "Z" * 16,
    "-----BEGIN RSA " + "PRIVATE KEY-----",
]
name = st.text(st.sampled_from("abcdefgh-_.0123"), min_size=1, max_size=8).filter(lambda text: text.strip("."))


@st.composite
def paths(draw: st.DrawFn) -> str:
    start = draw(st.sampled_from(["/home/", "/Users/", "/mnt/", "/root/", "~", "C:\\Users\\", "file:///home/"]))
    slash = "\\" if start.startswith("C:") else "/"
    inner = ["wilma-secret", *draw(st.lists(name, max_size=3)), "chats.jsonl"]
    return start + slash.join(["" if start == "~" else inner[0], *([inner[0]] if start == "~" else []), *inner[1:]])


@st.composite
def values(draw: st.DrawFn) -> Any:
    path = draw(paths())
    leaf = draw(st.sampled_from([path, f"read {path} twice", f"({path})", f"a={path}", f'"{path}", and {path}']))
    wrap = draw(st.sampled_from(["value", "key", "list", "nested"]))
    return {"value": leaf, "key": {leaf: 1}, "list": [1, leaf], "nested": {"a": [{"b": leaf}]}}[wrap]


@given(values())
def test_no_path_names_a_folder(value: Any) -> None:
    text = json.dumps(scrubbed_for_others(value))
    assert "wilma" not in text and "home" not in text and "Users" not in text
    assert "chats.jsonl" in text, "what was read is still told"


@pytest.mark.parametrize(
    "text",
    [
        "val/accuracy/0",
        "tokens emitted by verify passes / verify passes",
        "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "about ~20 % and 3/4",
        "runs/demo/extract/3b2b1f204b3d",
        "see docs/data.md",
        "1 / (1 - a)",
    ],
)
def test_texts_that_are_no_paths_stay(text: str) -> None:
    if text.startswith("http"):
        text = f"see {text}"  # an address alone is a server's
    assert scrubbed_for_others(text) == text


def test_homes_and_servers() -> None:
    assert scrubbed_for_others({"a": "/home/ann", "b": "~", "c": "~ann/x", "d": "http://gpu7.lab:8000/v1"}) == {
        "a": "~",
        "b": "~",
        "c": "x",
        "d": "http://***/v1",
    }


def test_keys_are_taken_out() -> None:
    assert scrubbed_for_others({"hub_token": "abc", "note": f"with {KEYS[0]}", "tokens": 5}) == {
        "hub_token": "***",
        "note": "with ***",
        "tokens": 5,
    }


def test_a_clean_folder(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("Figures /s, ~5 %, https://huggingface.co/home/x; see /reset and a/home/b.\n")
    (tmp_path / "run.json").write_text(json.dumps({"sha": "a" * 40, "path": "chats.jsonl"}))
    check_files(tmp_path, "the-key-itself")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("file", ["README.md", "deep/run.json", "plot.svg"])
def test_a_key_is_found(tmp_path: Path, key: str, file: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"note": f"with {key}"}))
    with pytest.raises(ExportError, match="holds what looks like an access key, so nothing was published") as raised:
        check_files(tmp_path, None)
    assert key not in str(raised.value) and file in str(raised.value)


@pytest.mark.parametrize(
    "path", ["/home/ann/x", "/Users/ann", "/root/x", "C:\\Users\\ann", "see file:///home/ann/x", "/mnt/x/y"]
)
def test_a_path_is_found(tmp_path: Path, path: str) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"note": path}))
    with pytest.raises(ExportError, match="holds a local path"):
        check_files(tmp_path, None)


def test_the_own_key_is_found_whatever_it_looks_like(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("made with plainword\n")
    with pytest.raises(ExportError, match="the key that it would be sent with"):
        check_files(tmp_path, "plainword")


def test_the_header_of_weights_is_searched(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"made": f"by {KEYS[0]}"})
    with pytest.raises(ExportError, match=r"model.safetensors: holds what looks like an access key"):
        check_files(tmp_path, None)
