"""What a training was made with, so that its figures can be traced: `run.json`, beside them.

The file has one entry for every start: a run that is stopped and goes on elsewhere, with other processes or another
version, tells so. It holds no environment, and no keys that a command line or a setting may carry.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sstf.data.atomic import write_json_atomic
from sstf.features import FeatureSource
from sstf.machine import hardware

FILE = "run.json"
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "safetensors", "numpy")
HIDDEN = "***"
# The last word of a name whose value is nobody's business: `hub_token`, not `batch_tokens` or `api_key_env`.
SECRET_NAME = re.compile(r"(?:^|[._-])(?:api_?key|key|token|secret|password|passwd|credentials?|auth)$", re.IGNORECASE)
# What keys of the hub, of wandb and of model servers look like, and what stands before the @ of an address.
SECRET_VALUE = re.compile(
    r"\bhf_\w{16,}|\bsk-[\w-]{16,}|\bwandb_v1_\w{16,}|(?<=://)[^/\s@]+(?=@)|(?<=[?&]token=)[^&\s]+|(?<=Bearer )\S+"
)
OLD_WANDB_KEY = re.compile(r"\b[0-9a-f]{40}\b")  # as long as a git commit, which a setting may well name
COMMIT_NAME = re.compile(r"(?:revision|commit|sha)$", re.IGNORECASE)


def provenance(
    config: Mapping[str, Any], source: FeatureSource, launch: Mapping[str, Any], step: int
) -> dict[str, Any]:
    """The entry of one start.

    Args:
        config: the effective configuration.
        source: what is trained on.
        launch: what actually started: processes, machines, backend, and how they share the head.
        step: optimiser steps that earlier starts did.
    """
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "from_step": step,
        "command": command(),
        "launch": dict(launch),
        "sstf": {"version": version("sstf"), **checkout()},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
        "hardware": hardware(),
        "target": {"name": scrubbed(source.target.name), "fingerprint": source.target.fingerprint},
        "data": {"name": _without_home(source.name), "conversations": len(source.ids), "tokens": sum(source.lengths)}
        | source.made_from(),
        "config": scrubbed(dict(config)),
    }


def record_start(folder: Path, entry: Mapping[str, Any]) -> None:
    """Add the entry of a start to `folder/run.json`. A file that was damaged is kept under another name: a record
    must not keep a run from going on."""
    path = folder / FILE
    starts: list[Any] = []
    if path.exists():
        try:
            starts = list(json.loads(path.read_text(encoding="utf-8"))["starts"])
        except (ValueError, KeyError, TypeError):
            path.replace(path.with_suffix(".json.damaged"))
    write_json_atomic(path, {"starts": [*starts, dict(entry)]})


def command(arguments: Sequence[str] | None = None) -> str:
    """How this process was started, as typed but for secrets and the name of the home folder.

    Args:
        arguments: the program and what follows; this process's unless given.
    """
    program, *rest = sys.argv if arguments is None else arguments
    module = sys.modules["__main__"].__spec__ if arguments is None else None
    # `python -m` puts the path of a file in place of the module's name.
    name = f"python -m {module.name.removesuffix('.__main__')}" if module else Path(program).name
    words, hide = [name], False
    for word in rest:
        option, equals, value = word.partition("=")
        if hide and not word.startswith("-"):
            words.append(HIDDEN)
        elif equals:
            words.append(f"{option}={_without_home(_scrubbed_text(option.lstrip('-'), value))}")
        else:
            words.append(_without_home(_scrubbed_text("", word)))
        hide = word.startswith("-") and not equals and bool(SECRET_NAME.search(word.lstrip("-")))
    return " ".join(words)


def scrubbed(value: Any, name: str = "") -> Any:
    """A setting, or sections of them, without secrets.

    >>> scrubbed({"url": "https://me:pw@host/", "hub_token": "abc", "batch_tokens": 64, "api_key_env": "KEY"})
    {'url': 'https://***@host/', 'hub_token': '***', 'batch_tokens': 64, 'api_key_env': 'KEY'}
    """
    if isinstance(value, Mapping):
        return {key: scrubbed(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [scrubbed(inner, name) for inner in value]
    if SECRET_NAME.search(name) and value is not None:
        return HIDDEN
    return _scrubbed_text(name, value) if isinstance(value, str) else value


def checkout(package: Path = Path(__file__).parents[1]) -> dict[str, Any]:
    """`commit`, and whether the package's files differ from it (`modified`); both None outside a git checkout.

    An environment may lie in a checkout of something else, whose commit says nothing: git has to know the package.
    """
    unknown = {"commit": None, "modified": None}
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return unknown
    commit, status = _git(package, "rev-parse", "HEAD"), _git(package, "status", "--porcelain", "--", ".")
    return unknown if commit is None or status is None else {"commit": commit, "modified": bool(status)}


def _git(folder: Path, *arguments: str) -> str | None:
    # Without its locks git changes nothing, beside whatever runs there.
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _scrubbed_text(name: str, text: str) -> str:
    if SECRET_NAME.search(name) and text:
        return HIDDEN
    text = SECRET_VALUE.sub(HIDDEN, text)
    return text if COMMIT_NAME.search(name) else OLD_WANDB_KEY.sub(HIDDEN, text)


def _without_home(text: str) -> str:
    home = str(Path.home())
    return re.sub(rf"{re.escape(home)}(?=/|$)", "~", text) if len(home) > 1 else text
