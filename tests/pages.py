"""Pages that a report is written as: taken apart, and opened in a browser."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest


class Parsed(HTMLParser):
    """Tags with their attributes, and the text of script and style elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style"):
            (self.scripts if self._open == "script" else self.styles).append(data)

    def assert_closed(self, own: list[str]) -> None:
        """Nothing is loaded, and nothing is run or styled but the contents `own`, which the page's policy names."""
        assert not any(tag in ("img", "link", "iframe") or "src" in a or "href" in a for tag, a in self.tags)
        assert not any(name.startswith("on") or name == "style" for _, a in self.tags for name in a)
        policy = next(a["content"] for _, a in self.tags if a.get("http-equiv") == "Content-Security-Policy")
        assert policy is not None and policy.startswith("default-src 'none';")
        assert policy.count("'sha256-") == len(own)
        for content in own:
            assert base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() in policy
            assert not re.search(r"url\(|@import", content)


def dom(tmp_path: Path, text: str, fragment: str = "") -> str:
    """The page as a browser makes it, without a complaint in its console."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    file = tmp_path / "page.html"
    file.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--enable-logging=stderr", "--dump-dom", file.as_uri() + fragment],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert not re.search(r"CONSOLE.*(Uncaught|Refused)", done.stderr), done.stderr
    return done.stdout
