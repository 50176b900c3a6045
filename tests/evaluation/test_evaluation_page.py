"""The report's page: nothing in it runs or loads but its own script, and the rejections can be looked through."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pages import Parsed, dom

from sstf.evaluation.figures import figures
from sstf.evaluation.page import page as page_of
from sstf.evaluation.rejections import CAUSES, Rejection

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!-- &lt;"
COST = {"verify_s": [0.01] * 9, "draft_s": 0.001, "host_s": 0.001, "plain_host_s": 0.001}


def row(arm: str, category: str = "all", **changes: Any) -> dict[str, Any]:
    fields = {
        "arm": arm, "temperature": 0.0, "category": category, "prompts": 2, "accepted_length": 1.8,
        "accepted_length_ci": [1.5, 2.0], "survival": [0.6, 0.2], "acceptance_rate": [0.6, 0.33],
        "tokens_per_second": 20.0, "speedup": 1.4, "speedup_ci": [1.2, 1.6], "draft_ms": 1.0, "verify_ms": 9.0,
        "host_ms": 1.0, "identical": 1.0, "repetition": 0.1, "void": None,
    }  # fmt: skip
    return fields | changes


def report() -> dict[str, Any]:
    return {
        "schema": 2,
        "sstf": "0",
        "target": {"name": EVIL, "dtype": "float32"},
        "head": "h",
        "eval": {"suite": EVIL, "policies": {"chain": {"kind": "chain", "depth": 2}}},
        "engine": "e",
        "hardware": {"gpu": None, "processor": "p", "threads": 1, "torch": "2"},
        "formulas": {"speedup": "a / b"},
        "rows": [row("plain"), row("chain"), row("chain", EVIL, void="repetitive: why")],
        "by_mode": [],
        "by_length": [],
        "limits": [],
        "distributions": [
            {"arm": "chain", "temperature": 0.0, "histogram": [4, 4, 2],
             "by_context": [{"low": 0, "high": 64, "passes": 10, "accepted_length": 1.8}]},
        ],
        "rejections": {"chain": {cause: 1 for cause in CAUSES}},
        "costs": {"1": COST, "4": COST},
        "training": [[10, 1.2], [20, 1.4]],
    }  # fmt: skip


def rejection(number: int, *causes: str, position: int = 1, text: str = "") -> Rejection:
    emitted, drafted = f"E{number}", f"D{number}"
    before = f"before {text}"
    return Rejection("chain", f"p{number}", "c", position, causes, emitted, drafted, 0.9, 0.05, 0.4, before, "after")


def page(content: dict[str, Any], rejections: list[Rejection]) -> str:
    return page_of(content, figures(content), rejections)


REJECTIONS = [
    rejection(0, "special token", text=EVIL),
    rejection(1, "near tie", "deep position", position=3),
    rejection(2, "other"),
    rejection(3, "other", position=2),
]


def test_nothing_is_run_or_loaded_but_the_pages_own() -> None:
    text = page(report(), REJECTIONS)
    parsed = Parsed(text)
    assert [tag for tag, _ in parsed.tags].count("script") == 2, "the data and the page's own"
    parsed.assert_closed([parsed.scripts[1], *parsed.styles])
    assert not re.search(r"https?:", text)
    data = json.loads(parsed.scripts[0])
    assert data["rejections"][0]["before"] == f"before {EVIL}"
    assert [cause for cause, _ in data["causes"]] == list(CAUSES)


def test_every_plot_is_there() -> None:
    labels = [a["aria-label"] for tag, a in Parsed(page(report(), [])).tags if tag == "svg"]
    assert labels == [
        "Survival: passes that accepted position i",
        "Acceptance rate: of the passes that reached position i",
        "Tokens emitted by a pass (T=0)",
        "Accepted length by category (T=0)",
        "Speedup by category (T=0)",
        "Where the time of a token goes",
        "Accepted length by context length",
        "Speedup of a chain by its depth (cost model)",
        "Training",
    ]


def test_the_speedup_of_a_depth_by_hand() -> None:
    """1 + 0.6 tokens of a step of 1 + 10 + 1 ms, against 11 ms a plain token."""
    text = page(report(), [])
    speed = (1 + 0.6) * 0.011 / 0.012
    assert f"batch 1: 1, {speed:.3g}" in text and f"batch 4: 2, {(1 + 0.6 + 0.2) * 0.011 / 0.013:.3g}" in text


def test_without_a_head_there_is_nothing_to_look_through() -> None:
    bare = report() | {"rejections": {}, "head": None, "training": None, "costs": {}}
    text = page(bare, [])
    assert 'id="list"' not in text and "Free baselines on" in text


# ---- in a browser ----------------------------------------------------------------------------------------------------

KEYS = """
const press = key => at("list").dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
press("ArrowDown"); press("End"); press("ArrowUp");
document.title = "now " + at("list").getAttribute("aria-activedescendant");
"""


def listed(body: str) -> list[str]:
    return re.findall(r'<span class="emitted">(E\d)</span>', body.split('id="list"')[1].split("</ol>")[0])


@pytest.mark.slow
def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    body = dom(tmp_path, page(report(), REJECTIONS))
    assert "owned" not in re.findall(r"<title>(.*?)</title>", body)[0].replace("document.title='owned'", "")
    assert "<img" not in body.split('<script type="application/json"')[0]
    assert listed(body) == ["E0", "E1", "E2", "E3"]
    assert 'aria-pressed="false">other: 2' in re.sub(r' title="[^"]*"', "", body)
    assert "4 of 4" in body and "p0 (c), chain, draft position 1: special token" in body


@pytest.mark.slow
def test_a_cause_is_filtered_by_address(tmp_path: Path) -> None:
    body = dom(tmp_path, page(report(), REJECTIONS), "#cause=other&position=2")
    assert listed(body) == ["E3"]
    assert "1 of 4" in body


@pytest.mark.slow
def test_keys_move_through_the_list(tmp_path: Path) -> None:
    text = page(report(), REJECTIONS)
    # The test's own keys need the policy out of the way.
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    body = dom(tmp_path, text.replace("</body>", f"<script>{KEYS}</script></body>"))
    assert "<title>now r2</title>" in body
    assert "p2 (c), chain, draft position 1: other" in body
