"""The page in a real browser: elements, values that move, keys, colours, narrow screens, and no complaint."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from browser import Page, chromium
from serving import Engine, dashboard, served

pytestmark = pytest.mark.slow


@pytest.fixture
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("browser")) as tab:
        tab.size(1280, 900)
        tab.scheme("light")
        yield tab
        assert tab.complaints == []
        assert {url.split("/")[2].split(":")[0] for url in tab.requested if url.startswith("http")} == {"127.0.0.1"}


def log_steps(path: Path, first: int, last: int) -> None:
    with path.open("a") as file:
        for step in range(first, last + 1):
            figures = {f"train/{name}/{i}": 5 / step + i for name in ("loss", "overlap", "accuracy") for i in range(3)}
            if step % 10 == 0:
                figures |= {"val/simulated_accepted_length": 1 + step / 100, "val/loss/0": 6 / step}
            pace = {
                "lr": 1e-3,
                "grad_norm": 1.5,
                "tokens_per_second": 800.0 + step,
                "eta_seconds": 75.0,
                "memory_gib": 1.5,
            }
            file.write(json.dumps({"step": step, **figures, **pace}) + "\n")


def fact(label: str) -> str:
    one = f"[...document.querySelectorAll('.facts div')].find(d => d.firstChild.textContent === '{label}')"
    return f"{one}.lastChild.textContent"


def cell(label: str, column: int) -> str:
    row = f"[...document.querySelectorAll('#engines tbody tr')].find(r => r.firstChild.textContent === '{label}')"
    return f"{row}.children[{column}].textContent"


def painted(title: str) -> str:
    """Share of a plot's pixels that are not transparent."""
    figure = f"[...document.querySelectorAll('figure')].find(f => f.textContent.startsWith('{title}'))"
    return (
        f"(() => {{ const c = {figure}.querySelector('canvas'); "
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; "
        "let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n / (d.length / 4); })()"
    )


def test_values_move_while_a_log_grows_and_an_engine_works(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / "demo" / "train" / "k"
    folder.mkdir(parents=True)
    log = folder / "metrics.jsonl"
    log_steps(log, 1, 20)
    evil = "<img src=x onerror=\"document.title='owned'\">"
    (folder / "run.json").write_text(json.dumps({"starts": [{"target": {"name": evil}, "started": evil}]}))
    (tmp_path / "demo" / "eval" / "e").mkdir(parents=True)
    length = {"accepted_length": 1.84, "accepted_length_ci": [1.58, 2.24], "acceptance_rate": [0.44, 0.33]}
    speed = {"tokens_per_second": 13.8, "speedup": 1.67, "speedup_ci": [1.4, 1.9]}
    row = {"arm": evil, "category": "all", "temperature": 0.0, **length, **speed}
    (tmp_path / "demo" / "eval" / "e" / "report.json").write_text(json.dumps({"rows": [row]}))

    plain, head = Engine(), Engine()
    with (
        served(plain),
        served(head),
        dashboard(
            tmp_path / "demo", "--engine", f"plain={plain.url}", "--engine", f"head={head.url}", "--band", "1.5:2.5"
        ) as board,
    ):
        page.open(board.url)
        page.wait(f"{fact('step')}.startsWith('20')")
        assert "800" not in page.js(fact("tokens/s")) and page.js(fact("left")) == "1:15 "
        assert page.js(fact("accepted length")) == "1.20 best 1.20 at step 20"
        assert page.js("document.querySelectorAll('#runs .plot canvas').length") == 6
        assert page.js(painted("Loss by draft position")) > 0.005, "lines are drawn"
        label = page.js("document.querySelector('#runs .plot').getAttribute('aria-label')")
        assert label == "Accepted length: simulated 1.20, step 20"
        assert "1.84 (1.58 to 2.24)" in page.text() and evil in page.text(), "as text"
        assert page.js("document.querySelectorAll('img').length") == 0

        log_steps(log, 21, 40)
        page.wait(f"{fact('step')}.startsWith('40')")
        page.wait(f"{fact('accepted length')} === '1.40 best 1.40 at step 40'")

        with plain.working(10, 0), head.working(10, 12):
            page.wait(f"{cell('accepted length', 2)} === '2.20' && {cell('accepted length', 1)} === '1.00'")
            # 22 tokens against 10 in as many requests, if this machine gives both threads the same time
            page.wait(f"Math.abs(parseFloat({cell('tokens/s', 3)}) - 2.2) < 1")
            page.wait(f"{painted('Speed')} > 0.002")
        assert page.js("[...document.querySelectorAll('#engines thead th')].map(h => h.textContent)") == [
            "plain", "head", "head / plain",
        ]  # fmt: skip
        page.wait(f"{painted('Processor and memory')} > 0.002")

        # keys: the list, plots point by point, windows, pause, sections
        page.key("?")
        page.wait("document.getElementById('shortcuts').open")
        page.key("Escape")
        page.wait("!document.getElementById('shortcuts').open")
        page.js("document.querySelector('#runs .plot').focus()")
        page.key("ArrowLeft")
        page.key("Home")
        page.wait("document.getElementById('spoken').textContent === 'step 10: simulated 1.10'")
        assert page.js("document.querySelector('#runs .legend b').textContent") == "1.10"
        page.key("2")
        page.wait("document.querySelector('#windows input:checked').value === '10800'")
        page.key("p")
        page.wait("document.getElementById('link').textContent === 'paused'")
        page.key("p")
        page.wait("document.getElementById('link').textContent === 'live'")
        page.key("e")
        page.wait("document.activeElement.id === 'engines'")
        assert page.requested[-1].endswith("events?window=10800")

        # the order of Tab: the way past the header first, then its controls
        page.js("document.activeElement.blur(); document.body.focus()")
        reachable = page.js(
            "[...document.querySelectorAll('a, input, button, [tabindex=\"0\"]')]"
            ".filter(e => e.getClientRects().length).map(e => e.id || e.className || e.name)"
        )
        assert reachable[:4] == ["skip", "window", "window", "window"] and "plot" in reachable
        assert page.js("[...document.querySelectorAll('button, .plot, section, .scroll')].every("
                       "e => e.textContent.trim() || e.getAttribute('aria-label'))")  # fmt: skip

        # light and dark: the system's, then the button's
        paper = "getComputedStyle(document.body).backgroundColor"
        light = page.js(paper)
        page.scheme("dark")
        page.wait(f"{paper} !== '{light}'")
        page.wait("document.getElementById('theme').textContent === 'Light'")
        page.key("t")
        page.wait(f"{paper} === '{light}'")

        page.size(360, 740)
        page.wait("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        page.wait("[...document.querySelectorAll('.plot canvas')].every(c => c.getBoundingClientRect().right <= 360)")

    assert page.wait("document.getElementById('link').className === 'lost'"), "the page says that it hears nothing"
    page.complaints.clear()  # the browser's own, of the connection that is gone


def test_an_alarm_is_shown_and_ends(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / "demo" / "train" / "k"
    folder.mkdir(parents=True)
    log = folder / "metrics.jsonl"
    log.write_text('{"step": 1, "val/simulated_accepted_length": 2.0}\n')
    with dashboard(tmp_path / "demo") as board:
        page.open(board.url)
        page.wait("document.body.dataset.drawn")
        assert page.js("document.getElementById('alarms').getAttribute('role')") == "alert"
        with log.open("a") as file:
            file.write('{"step": 2, "val/simulated_accepted_length": 1.5}\n')
        page.wait("document.getElementById('alarms').textContent.includes('1.50 at step 2 fell from 2.00 at step 1')")
        assert page.js("document.title") == "(1) sstf dashboard"
        with log.open("a") as file:
            file.write('{"step": 3, "val/simulated_accepted_length": 1.95}\n')
        page.wait("document.getElementById('alarms').textContent === ''")
        assert page.js("document.querySelectorAll('#log li').length") == 2
        assert page.js("document.title") == "sstf dashboard"


def test_a_real_training_is_watched(page: Page, tiny_target_folder: Path, tmp_path: Path) -> None:
    """`sstf train` in a process of its own; the page is there before it has begun."""
    answer = {"role": "assistant", "content": "Hello Hi " * 4}
    rows = [{"messages": [{"role": "user", "content": f"{i} {i * 7}?"}, answer]} for i in range(24)]
    (tmp_path / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "name": "tiny",
        "output_dir": str(tmp_path / "run"),
        "target": {"name": str(tiny_target_folder), "dtype": "float32", "device": "cpu"},
        "data": {
            "source": {"kind": "jsonl", "path": str(tmp_path / "conversations.jsonl")},
            "max_length": 128,
            "filters": {"near_duplicates": None, "loops": False},
        },
        "method": {"kind": "eagle3", "ttt_steps": 2, "draft_vocab_size": 200},
        "train": {"steps": 600, "step_tokens": 128, "optimizer": {"learning_rate": 1e-3}, "precision": "fp32",
                  "validation_conversations": 2, "validate_every": 150, "log_every": 1},
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "run" / "data").mkdir(parents=True)
    with dashboard(tmp_path / "run") as board:
        page.open(board.url)
        page.wait("document.querySelector('#runs .state').textContent === 'waiting'")
        command = [sys.executable, "-m", "sstf", "train", str(tmp_path / "tiny.yaml")]
        with (tmp_path / "train.log").open("wb") as out:
            training = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            page.wait("document.querySelector('#runs .state').textContent === 'training'")
            page.wait(f"parseInt({fact('step')}) > 0")
            page.wait("document.querySelector('#runs .state').textContent === 'finished'")
            assert training.wait(timeout=60) == 0, (tmp_path / "train.log").read_text()
        finally:
            training.kill()
            training.wait()
        assert page.js(fact("step")) == "600 of 600"
        page.wait("document.querySelector('#runs .plot').getAttribute('aria-label').endsWith('step 600')")
        done = json.loads(next((tmp_path / "run" / "train").glob("*/done.json")).read_text())
        assert page.js(fact("accepted length")).startswith(
            f"{board.state()['sources'][0]['latest']['val/simulated_accepted_length']:.2f}"
        )
        assert board.state()["sources"][0]["best"][0] == done["accepted_length"]
