"""What must not leave this machine: keys, and paths that name people and folders. Taken out where texts are written,
and looked for once more in every file before it goes.

Taking out (`scrubbed_for_others`) knows the names of settings, so it is thorough; the search (`check_files`) sees text
alone and refuses, because a card with a hole in it is worse than a question. What a setting's name says about its value
is left to `train.provenance`.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sstf.errors import ExportError
from sstf.train.provenance import HIDDEN, SECRET_VALUE, scrubbed

# An absolute path inside a text: a drive, `~` or nothing, then at least two names. Not what follows a word, a colon or
# another slash: those are addresses and fractions.
_NAME = r"[^\s/\\\"'`<>|:,;()\[\]{}]+"
_PATH = re.compile(rf"(?<![\w.:/\\~*])(?:file://)?(?:[A-Za-z]:[/\\]|~[\w.-]*/|/{_NAME}/)(?:{_NAME}[/\\])*(?:{_NAME})?")
_WHOLE_PATH = re.compile(r"^(?:file://)?(?:[A-Za-z]:[/\\]|~[\w.-]*(?:[/\\]|$)|\.{1,2}[/\\]|/(?=[^/\s]))")
_HOME = re.compile(r"(?:^|[/\\])(?:home|Users)[/\\][^/\\]+[/\\]?$|^~[\w.-]*[/\\]?$|^/root/?$")
_ADDRESS = re.compile(r"^(https?://)[^/\s]+")
# What is looked for at the end, by the words in which it is reported.
_LEAKS = {
    "what looks like an access key": re.compile(
        SECRET_VALUE.pattern + r"|\bgh[pousr]_\w{20,}|\bAKIA[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY"
    ),
    "a local path": re.compile(
        rf"(?<![\w.])/(?:home|Users|root)/\w|[A-Za-z]:(?:\\\\?|/)Users(?:\\\\?|/)\w|{_PATH.pattern}"
    ),
}
_TEXTS = (".json", ".md", ".svg", ".txt", ".yaml", ".jsonl")


def scrubbed_for_others(value: Any) -> Any:
    """A JSON value without keys, local paths (their last name stays) and the addresses of servers.

    >>> scrubbed_for_others({"path": "/home/me/chats.jsonl", "note": "see ~/x/y.md", "url": "http://gpu7:8000/v1"})
    {'path': 'chats.jsonl', 'note': 'see y.md', 'url': 'http://***/v1'}
    """
    return _without_places(scrubbed(value))


def _without_places(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_text(str(key)): _without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    return _text(value) if isinstance(value, str) else value


def _text(text: str) -> str:
    if _WHOLE_PATH.match(text) and "\n" not in text:
        return _last_name(text)
    if _ADDRESS.match(text):
        return _ADDRESS.sub(rf"\1{HIDDEN}", text)
    return _PATH.sub(lambda found: _last_name(found[0]), text)


def _last_name(path: str) -> str:
    if _HOME.search(path):
        return "~"
    return PurePosixPath(path.replace("\\", "/")).name or "~"


def check_files(folder: Path, token: str | None) -> None:
    """Search every text in `folder`, the headers of safetensors files among them.

    Args:
        folder: what is about to go out.
        token: the key that it is sent with, which must not be in it.

    Raises:
        ExportError: something was found; the sentence names the file and the kind, never the text.
    """
    for file in sorted(folder.rglob("*")):
        for text in _texts(file):
            what = next((words for words, pattern in _LEAKS.items() if pattern.search(text)), None)
            if what is None and token and token in text:
                what = "the key that it would be sent with"
            if what:
                raise ExportError(
                    f"{file}: holds {what}, so nothing was published; take it out of the run's configuration or name "
                    "and publish again"
                )


def _texts(file: Path) -> Iterator[str]:
    if file.suffix in _TEXTS:
        yield file.read_text(encoding="utf-8")
    elif file.suffix == ".safetensors":
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            yield json.dumps(json.loads(stream.read(size)).get("__metadata__", {}))
