"""A bench's page: the advice, the plots with their values, and nothing in it that runs or loads."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pages import Parsed, dom
from stand_in import Reply, StandIn

from sstf.bench.acceptance import Counters
from sstf.bench.arrivals import Level
from sstf.bench.client import Answer
from sstf.bench.drive import Load, Measured, Round
from sstf.bench.page import figures, page
from sstf.bench.report import Report, load_figures
from sstf.bench.requests import CHAT, Request
from sstf.bench.shadow import Limits, advise
from sstf.cli import main

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!-- &lt;"
ABOUT = {
    "started": "2026-01-01T00:00:00+00:00",
    "servers": {
        "baseline": {"url": "127.0.0.1:1", "model": "plain", "pid": None},
        "candidate": {"url": "127.0.0.1:2", "model": EVIL, "pid": None},
    },
    "settings": {"suite": EVIL, "shadow": None, "mirror": None, "max_tokens": 8, "temperature": 0.0},
    "notes": [EVIL],
}


def answers(seconds: float, text: str = "abcdefghij", count: int = 20) -> list[Answer]:
    """All alike: the first of ten tokens after a tenth of the seconds, then one in every tenth."""
    return [Answer(str(i), 0.0, seconds / 10, (seconds / 10,) * 9, seconds, text, 10, "length") for i in range(count)]


def load(
    level: Level, old: Sequence[Answer], new: Sequence[Answer], counters: tuple[Counters, Counters] | None = None
) -> Load:
    requests = [Request(answer.request, CHAT, {"temperature": 0}) for answer in old]
    sides = [Measured([Round(list(found), sum(a.e2e_s for a in found))]) for found in (old, new)]
    if counters:
        sides[1].before, sides[1].after = counters
    return Load(level, requests, *sides)


SPECULATES = (Counters(0.0, accepted=0.0), Counters(100.0, accepted=60.0, accepted_at={0: 50.0, 1: 10.0}))
LOADS = [
    load(Level(f"concurrency {n}", n), answers(n * 1.0), answers(n * 0.5), SPECULATES) for n in (1, 2, 4)
]  # fmt: skip


def report(*loads: Load, **changes: Any) -> Report:
    found = [load_figures(each, {"e2e": 1.5}) for each in loads]
    return replace(Report(ABOUT, found, None, None), **changes)


def shadowed(old: Sequence[Answer], new: Sequence[Answer]) -> Report:
    one = load(Level("concurrency 1", 1), old, new)
    whole = report(one)
    return replace(whole, advice=advise(one.requests, old, new, whole.loads[0].latencies, Limits(), None))


def titles(svg: str) -> list[str]:
    return re.findall(r"<title>(.*?)</title>", svg)


def test_nothing_is_run_or_loaded() -> None:
    different = [replace(answer, text=EVIL) for answer in answers(0.5)]
    made = replace(shadowed(answers(1.0), different), partial=EVIL)
    parsed = Parsed(page(made))
    assert not parsed.scripts and len(parsed.styles) == 1
    parsed.assert_closed(parsed.styles)


def test_every_plot_by_load() -> None:
    parsed = Parsed(page(report(*LOADS)))
    assert [a["aria-label"] for tag, a in parsed.tags if tag == "svg"] == [
        "Time to the first token (ttft)",
        "Time between tokens (itl)",
        "Time per output token after the first (tpot)",
        "Time of a whole answer (e2e)",
        "Tokens a second",
        "Requests a second",
        "Requests a second that keep to the objective",
        "Accepted length",
        "Survival: passes that accepted position i",
    ]


def test_values_against_concurrency() -> None:
    """At concurrency n an answer of the baseline takes n seconds, one of the candidate half of that, one by one."""
    found = figures(report(*LOADS).loads)
    shown = titles(found["e2e"])
    for name, factor in (("baseline", 1000), ("candidate", 500)):
        for percentile in (50, 95, 99):
            expected = [f"{name} P{percentile}: {n}, {factor * n:,}" for n in (1, 2, 4)]
            assert [t for t in shown if t.startswith(f"{name} P{percentile}")] == expected
    assert titles(found["tokens"])[:2] == ["baseline: 1, 10", "baseline: 2, 5"]
    assert titles(found["goodput"]) == [
        "baseline: 1, 1", "baseline: 2, 0", "baseline: 4, 0", "candidate: 1, 2", "candidate: 2, 1", "candidate: 4, 0",
    ]  # fmt: skip
    assert titles(found["accepted-length"]) == [f"candidate: {n}, 1.6" for n in (1, 2, 4)]
    assert titles(found["survival"])[:2] == ["candidate, concurrency 1: 1, 0.5", "candidate, concurrency 1: 2, 0.1"]


def test_other_loads_stand_in_bars() -> None:
    """One load, with intervals by percentile; and loads without a concurrency, by name."""
    [one] = report(LOADS[0]).loads
    assert titles(figures([one])["e2e"])[:2] == [
        "P50, baseline: 1,000 (1,000 to 1,000)",
        "P50, candidate: 500 (500 to 500)",
    ]
    named = [replace(each, concurrency=None, name=f"poisson {n}/s") for n, each in enumerate(report(*LOADS).loads, 1)]
    assert "poisson 2/s, baseline P50: 2,000 (2,000 to 2,000)" in titles(figures(named)["e2e"])
    assert titles(figures(named)["tokens"])[0] == "poisson 1/s, baseline: 10"


def test_without_acceptance_or_objective_their_plots_are_left_out() -> None:
    bare = [load_figures(load(Level("concurrency 1", 1), answers(1.0), answers(0.5)), {})]
    assert list(figures(bare)) == ["ttft", "itl", "tpot", "e2e", "tokens", "requests"]


def test_the_advice_with_its_reason() -> None:
    assert ">GO: every check holds</p>" in page(shadowed(answers(1.0), answers(0.5)))
    assert "No advice" in page(report(*LOADS)) and 'id="differences"' not in page(report(*LOADS))
    made = page(shadowed(answers(1.0), answers(2.0)))
    assert '<p id="verdict" class="no">NO-GO: ttft P95 2.00 (2.00 to 2.00), limit at most 1.2' in made
    assert "<td>e2e P50</td><td>2.00 (2.00 to 2.00)</td><td>at most 1 of the baseline&#x27;s</td><td>FAILS</td>" in made


def test_the_first_difference_is_shown() -> None:
    new = answers(0.5)
    new[7] = replace(new[7], text="abcXefghij")
    made = page(shadowed(answers(1.0), new))
    assert "1 of 20 greedy answers differ, in the median after 30% of the text." in made
    assert "<li>request 7, after 3 of 10 characters" in made
    assert 'abc<span class="old">defghij</span>' in made and 'abc<span class="new">Xefghij</span>' in made


def test_a_partial_run_says_so() -> None:
    made = page(report(LOADS[0], partial="candidate is gone"))
    assert "<strong>PARTIAL:</strong> candidate is gone" in made
    assert "<svg" not in page(report(partial="nothing was measured"))


def test_the_command_writes_it(
    serve: Callable[..., StandIn], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def behave(number: int, body: dict[str, Any]) -> Reply:
        return Reply(list("Hello"), 5)

    command = ["bench", "--baseline", serve(behave=behave).url, "--candidate", serve(name="new", behave=behave).url]
    command += ["--concurrency", "1,2", "--requests", "4", "--rounds", "1", "--html", str(tmp_path / "bench.html")]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    assert "bench.html" in capsys.readouterr().out
    made = (tmp_path / "bench.html").read_text(encoding="utf-8")
    assert "<title>new against target</title>" in made and made.count("<svg") == 6
    assert "concurrency 2, 4 requests to each" in made


@pytest.mark.slow
def test_a_browser_shows_the_bench(tmp_path: Path) -> None:
    different = [replace(answer, text=EVIL) for answer in answers(0.5)]
    body = dom(tmp_path, page(shadowed(answers(1.0), different)))
    assert "owned" not in re.findall(r"<title>(.*?)</title>", body)[0].replace("document.title='owned'", "")
    assert "<img" not in body and "<script" not in body
    assert 'id="verdict" class="no"' in body and body.count('<span class="new">') == 20
    assert body.count("<svg") == 7
