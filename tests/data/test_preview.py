from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from sstf.data.preview import Gap, Piece, choose, pieces, preview_html, print_preview, token_texts, visible
from sstf.types import TokenSample

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!-- &lt;"


def sample(tokenizer: PreTrainedTokenizerBase, *turns: tuple[str, bool], name: str = "one") -> TokenSample:
    ids, mask = [], []
    for text, trained in turns:
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += own
        mask += [trained] * len(own)
    return TokenSample(name, ids, mask)


@pytest.fixture
def two_turns(tokenizer: PreTrainedTokenizerBase) -> TokenSample:
    return sample(
        tokenizer,
        ("<|im_start|>user\nHi 你<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hello 好<|im_end|>", True),
        ("\n<|im_start|>user\nHi\t<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hi<|im_end|>", True),
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(text=st.text(max_size=30))
def test_the_texts_of_the_tokens_joined_are_the_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(t for t in texts if t is not None) == tokenizer.decode(ids)


def test_a_character_of_several_tokens_stands_at_the_last_one(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("a你b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5, "the test's tokenizer has a token a byte"
    assert token_texts(tokenizer, ids) == ["a", "", "", "你", "b"]
    shown = pieces(tokenizer, TokenSample("x", ids, [False] * 5))
    assert [piece.shown for piece in shown] == ["a", "⋯", "⋯", "你", "b"]
    assert [piece.part for piece in shown] == [None, "你", "你", None, None]


def test_a_character_that_is_cut_is_shown_as_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = tokenizer("你", add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    assert token_texts(tokenizer, [*whole[:2], end, *whole]) == ["", "\ufffd", "<|im_end|>", "", "", "你"]
    assert token_texts(tokenizer, whole[:2]) == ["", "\ufffd"], "at the end of a sample"
    assert token_texts(tokenizer, [*whole[:1], 10**6, *whole]) == ["\ufffd", None, "", "", "你"]


def test_ids_outside_the_vocabulary_have_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    size = len(tokenizer)
    assert token_texts(tokenizer, [-1, size, size + 7]) == [None, None, None]
    [first, second] = pieces(tokenizer, TokenSample("x", [size, 0], [True, False]))
    assert (first.unknown, first.shown) == (True, f"⟨{size}?⟩")
    assert (second.unknown, second.special) == (False, True)


def test_white_space_and_what_cannot_be_seen() -> None:
    assert visible("a b\n\tc\r") == "a·b↵\n⇥   c␍"
    assert visible("\x1b[2J\x00\u202e\u200b\u00a0") == "‹U+001B›[2J‹U+0000›‹U+202E›‹U+200B›‹U+00A0›"
    assert visible("\u0301") == "◌\u0301"
    assert visible("👩\u200d🔬 你") == "👩\u200d🔬·你"
    assert visible("\ud800") == "‹U+D800›"


def test_samples_are_taken_in_turn_from_the_sources() -> None:
    sources = ["a"] * 10 + ["b"] * 2 + ["c"]
    assert choose(sources, 5) == [0, 1, 10, 11, 12]
    assert choose(sources, 7) == [0, 1, 2, 3, 10, 11, 12]
    assert choose(sources, 99) == list(range(13))
    assert choose([], 3) == []


def printed(samples: list[TokenSample], tokenizer: PreTrainedTokenizerBase, **console: Any) -> str:
    out = StringIO()
    print_preview(Console(file=out, width=10_000, **console), samples, ["chats"] * len(samples), tokenizer)
    return out.getvalue()


def test_the_terminal_without_colour(tokenizer: PreTrainedTokenizerBase, two_turns: TokenSample) -> None:
    # 13 + 6 + 11 + 2 tokens: words are one, other characters one a byte
    assert printed([two_turns], tokenizer, no_color=True) == (
        "context ⟦trained⟧ special; 1 of 1 samples\n\n"
        "one (chats): 32 tokens, 8 trained (25.0%), trained turns: 2\n"
        "<|im_start|>user↵\nHi·⋯⋯你<|im_end|>↵\n<|im_start|>assistant↵\n"
        "⟦Hello·⋯⋯好<|im_end|>⟧↵\n<|im_start|>user↵\nHi⇥   <|im_end|>↵\n<|im_start|>assistant↵\n"
        "⟦Hi<|im_end|>⟧\n\n"
    )


def test_colours_tell_the_kinds_apart(tokenizer: PreTrainedTokenizerBase, two_turns: TokenSample) -> None:
    out = printed([two_turns], tokenizer, force_terminal=True, color_system="standard")
    assert "\x1b[1;30;43mHello\x1b[0m" in out, "the first token after a prompt, black on yellow"
    assert "\x1b[1;30;43mHi\x1b[0m" in out
    assert "\x1b[1;35m<|im_end|>" in out, "special in the context"
    assert "\x1b[1;37;45m<|im_end|>" in out, "special and trained"


def test_no_text_drives_the_terminal(tokenizer: PreTrainedTokenizerBase) -> None:
    out = printed([sample(tokenizer, ("\x1b]0;owned\x07 [bold]x[/bold]", True), name="\x1b[2J")], tokenizer)
    assert "\x1b" not in out and "\x07" not in out
    assert "[bold]x[/bold]" in out, "and none is taken for rich's markup"


def test_long_runs_are_shortened_and_say_so(tokenizer: PreTrainedTokenizerBase) -> None:
    out = printed([sample(tokenizer, ("x" * 1000, False), ("y" * 250, True), ("z" * 240, False))], tokenizer)
    assert "x" * 120 + " [… 760 context tokens not shown …] " in out
    assert "⟦" + "y" * 120 + " [… 10 trained tokens not shown …] " + "y" * 120 + "⟧" in out
    assert "z" * 240 in out


class Parsed(HTMLParser):
    """Tags with their attributes, and the text of script elements."""

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


def test_the_page_holds_every_token_and_nothing_that_is_run(
    tokenizer: PreTrainedTokenizerBase, two_turns: TokenSample
) -> None:
    evil = sample(tokenizer, (EVIL, False), (EVIL, True), name=EVIL)
    html = preview_html([two_turns, evil], ["chats", EVIL], tokenizer, title=EVIL)
    parsed = Parsed(html)
    assert [tag for tag, _ in parsed.tags].count("script") == 2, "the data and the page's own"
    assert not any(tag in ("img", "link", "iframe") or "src" in a or "href" in a for tag, a in parsed.tags)
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert not re.search(r"https?:|url\(|@import", html)
    policy = next(a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none';")
    for content in (parsed.scripts[1], parsed.styles[0]):
        assert base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() in policy

    data = json.loads(parsed.scripts[0])
    first, second = data["samples"]
    assert first["ids"] == two_turns.input_ids
    assert [bool(flags & 1) for flags in first["flags"]] == two_turns.loss_mask
    assert (first["tokens"], first["trained"], first["turns"]) == (32, 8, 2)
    assert (second["id"], second["source"]) == (EVIL, EVIL)
    assert "".join(data["texts"][i][0] for i in second["texts"]) == visible(EVIL) * 2
    assert data["vocabulary"][str(tokenizer.eos_token_id)] == "<|im_end|>"


def test_the_page_says_what_was_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    long = sample(tokenizer, ("x" * 5000, True))
    samples = [long, *(sample(tokenizer, ("y", True), name=str(i)) for i in range(9))]
    html = preview_html(samples, ["a"] * 5 + ["b"] * 5, tokenizer, "data", limit=4)
    assert "4 of 10 samples, taken in turn from 2 sources; 1 of them shortened, where more than 4,000" in html
    data = json.loads(Parsed(html).scripts[0])
    assert [s["id"] for s in data["samples"]] == ["one", "0", "4", "5"]
    shown = data["samples"][0]
    assert shown["tokens"] == 5000
    assert len(shown["ids"]) == 4001
    assert (shown["ids"][2000], shown["flags"][2000]) == (1000, 16 | 1)
    assert data["texts"][shown["texts"][2000]][0] == Gap(1000, True).shown
    assert "<p>9 of 9 samples.</p>" in preview_html(samples[1:], ["a"] * 9, tokenizer, "data")


def test_piece_without_text() -> None:
    assert Piece(0, 5, "", trained=False, special=False, unknown=False).shown == "∅"


@pytest.mark.slow
def test_a_browser_shows_the_page(tokenizer: PreTrainedTokenizerBase, two_turns: TokenSample, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    evil = sample(tokenizer, (EVIL, False), (EVIL, True), name=EVIL)
    page = tmp_path / "preview.html"
    page.write_text(preview_html([evil, two_turns], [EVIL, "chats"], tokenizer, "preview"), encoding="utf-8")
    dom = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    body = dom[: dom.index('<script type="application/json"')]
    assert "<title>preview</title>" in body, "not 'owned'"
    assert "<img" not in body and "<script" not in body
    assert body.count('class="token trained') >= len(EVIL) - 3
    assert len(re.findall(r'class="token trained first"', body.split('id="tokens"')[1])) == 1
    assert len(re.findall(r'class="token trained last"', body.split('id="tokens"')[1])) == 1
    assert "2 of 2 samples" in body
