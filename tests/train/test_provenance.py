"""What is recorded about a training, and what never is."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from tiny_store import METHOD

from sstf.features import ExtractConfig, FeatureStore
from sstf.features.online import OnlineFeatures
from sstf.methods import Eagle3Method
from sstf.targets import Target
from sstf.train.provenance import checkout, command, provenance, record_start, scrubbed
from sstf.types import TokenSample

LAUNCH = {"kind": "ddp", "processes": 2, "machines": 1, "backend": "gloo", "device": "cpu"}


def test_an_entry_says_with_what_a_run_was_made(store: FeatureStore) -> None:
    entry = provenance({"name": "tiny", "train": {"steps": 3}}, store, LAUNCH, 7)
    assert json.loads(json.dumps(entry)) == entry
    assert entry["config"] == {"name": "tiny", "train": {"steps": 3}}
    assert entry["launch"] == LAUNCH and entry["from_step"] == 7 and entry["started"].endswith("+00:00")
    assert entry["target"] == {"name": "pinned", "fingerprint": store.target.fingerprint}
    assert entry["data"]["data"] == store.origin.data and len(entry["data"]["shards"]) == 64
    assert entry["data"]["conversations"] == 24 and entry["data"]["tokens"] == store.tokens
    assert entry["versions"]["torch"] == entry["hardware"]["torch"]
    assert entry["hardware"]["cores"] >= 1 and entry["hardware"]["memory_gib"] > 0.1
    assert entry["sstf"]["version"] == "0.1.0"


def test_the_same_conversations_are_known_from_a_store_and_online(
    store: FeatureStore, tiny_target: Target, samples: list[TokenSample]
) -> None:
    spec = Eagle3Method(METHOD).feature_spec(tiny_target.spec)
    online = OnlineFeatures(tiny_target, samples, spec, ExtractConfig())
    assert online.made_from()["data"] == store.made_from()["data"]
    fewer = OnlineFeatures(tiny_target, samples[1:], spec, ExtractConfig())
    assert fewer.made_from()["data"] != store.made_from()["data"]


def test_every_start_is_recorded_and_a_damaged_record_is_kept(tmp_path: Path) -> None:
    for processes in (1, 2, 1):
        record_start(tmp_path, {"launch": {"processes": processes}})
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [entry["launch"]["processes"] for entry in starts] == [1, 2, 1]
    for damaged in ('{"starts": [{"lau', "[]", "{}"):
        (tmp_path / "run.json").write_text(damaged)
        record_start(tmp_path, {"a": 1})
        assert json.loads((tmp_path / "run.json").read_text()) == {"starts": [{"a": 1}]}
        assert (tmp_path / "run.json.damaged").read_text() == damaged


# ---- secrets ---------------------------------------------------------------------------------------------------------

HUB, SERVER, WANDB = "hf_" + "a1B2" * 8, "sk-" + "x9" * 12, "0123456789" * 4


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        (["train", "c.yaml", "train.steps=3"], "sstf train c.yaml train.steps=3"),
        (["train", "target.token=abc"], "sstf train target.token=***"),
        (["train", "data.source.api_key=abc"], "sstf train data.source.api_key=***"),
        (["--api-key", "abc", "c.yaml"], "sstf --api-key *** c.yaml"),
        (["--password=abc"], "sstf --password=***"),
        (["--token", "--verbose"], "sstf --token --verbose"),
        (["train.batch_tokens=64", "max_new_tokens=8"], "sstf train.batch_tokens=64 max_new_tokens=8"),
        (["data.answers.engine.api_key_env=KEY"], "sstf data.answers.engine.api_key_env=KEY"),
        ([f"a={HUB}", HUB, f"x={SERVER}", f"note={WANDB}"], "sstf a=*** *** x=*** note=***"),
        ([f"target.revision={WANDB}"], f"sstf target.revision={WANDB}"),
        (["url=https://me:pw@host/v1?token=abc&x=1"], "sstf url=https://***@host/v1?token=***&x=1"),
    ],
)
def test_a_command_line_without_its_secrets(typed: list[str], kept: str) -> None:
    assert command(["/usr/local/bin/sstf", *typed]) == kept


def test_the_home_folder_goes_unnamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/jane")
    typed = ["/home/jane/.venv/bin/sstf", "train", "/home/jane/c.yaml", "output_dir=/home/jane/runs", "/home/janet/x"]
    assert command(typed) == "sstf train ~/c.yaml output_dir=~/runs /home/janet/x"


@pytest.mark.parametrize(
    ("module", "kept"),
    [("sstf.train.__main__", "python -m sstf.train c.yaml token=***"), (None, "sstf c.yaml token=***")],
)
def test_how_this_process_was_started(monkeypatch: pytest.MonkeyPatch, module: str | None, kept: str) -> None:
    """Of `python -m`, Python tells the file; of a script, no module."""
    main = ModuleType("__main__")
    main.__spec__ = ModuleSpec(module, None) if module else None
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["/opt/sstf", "c.yaml", "token=abc"])
    assert command() == kept


def test_settings_without_secrets() -> None:
    settings = {
        "data": {"engine": {"api_key_env": "MY_KEY", "password": 1234, "token": None}},
        "train": {"step_tokens": 1024, "betas": (0.9, 0.95), "note": ["plain", HUB]},
    }
    assert scrubbed(settings) == {
        "data": {"engine": {"api_key_env": "MY_KEY", "password": "***", "token": None}},
        "train": {"step_tokens": 1024, "betas": [0.9, 0.95], "note": ["plain", "***"]},
    }


# ---- the version of the code -----------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(
        ["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_checkout_and_its_changes(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    nothing = {"commit": None, "modified": None}
    assert checkout(package) == nothing
    git(tmp_path, "init", "-q")
    assert checkout(package) == nothing  # the package of another repository's environment, say
    git(tmp_path, "add", ".")
    assert checkout(package) == nothing  # no commit yet
    git(tmp_path, "commit", "-q", "-m", "one")
    (tmp_path / "notes.txt").write_text("not code")
    clean = {"commit": git(tmp_path, "rev-parse", "HEAD"), "modified": False}
    assert checkout(package) == clean
    (package / "new.py").write_text("")
    assert checkout(package) == clean | {"modified": True}


def test_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert checkout() == {"commit": None, "modified": None}
