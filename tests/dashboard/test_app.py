from __future__ import annotations

import base64
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from serving import Engine, dashboard, events, served

from sstf.cli import main
from sstf.dashboard import app
from sstf.dashboard.app import serve
from sstf.dashboard.board import Board

PAGE = Path(app.__file__).parent / "page"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "train" / "k"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "lr": 0.5}\n')
    return folder / "metrics.jsonl"


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["dashboard", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return " ".join(error.split())


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing to watch" in refused([], capsys)
    assert "holds no run" in refused([str(tmp_path)], capsys)
    assert "is no address" in refused(["--engine", "localhost:8000"], capsys)
    assert "--band" in refused(["--engine", "http://localhost:8000", "--band", "3:2"], capsys)
    engine = ["--engine", "http://localhost:8000"]
    assert "--host 0.0.0.0 shows the page to others" in refused([*engine, "--host", "0.0.0.0"], capsys)
    assert "is empty or not set" in refused([*engine, "--api-key-env", "SSTF_NO_SUCH_KEY"], capsys)
    assert "choose another --port" in refused([*engine, "--port", "99999"], capsys)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "choose another --port" in refused([*engine, "--port", str(taken.getsockname()[1])], capsys)


def test_nothing_heavy_is_imported() -> None:
    program = (
        "import sys; import sstf.cli, sstf.dashboard.app; "
        "print([m for m in ('torch', 'transformers', 'numpy', 'datasets') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert out.stdout == "[]\n"


def test_the_page_needs_no_other_host() -> None:
    for path in PAGE.rglob("*.*"):
        text = path.read_text(encoding="utf-8")
        own = [url for url in re.findall(r"https?://[^\s\"')]+", text) if "github.com/leeoniya/uPlot" not in url]
        assert own == [] and "@import" not in text and "url(" not in text, path
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    assert "<style" not in html and not re.search(r"<script(?![^>]*src=)", html), "the policy allows files alone"
    assert not re.search(r"\son[a-z]+=|style=", html)


def test_vendored_files_carry_their_licence() -> None:
    licence = (PAGE / "vendor" / "uPlot-LICENSE").read_text(encoding="utf-8")
    assert licence.startswith("The MIT License (MIT)") and "Leon Sorokin" in licence
    assert "uPlot (v1.6.32)" in (PAGE / "vendor" / "uPlot.iife.min.js").read_text(encoding="utf-8")[:80]


def test_the_stream_tells_what_grows(log: Path) -> None:
    """One process: its page, its stream while a log grows and an engine works, and its end under an open stream."""
    with served(Engine()) as engine, dashboard(log.parents[2], "--engine", f"head={engine.url}") as board:
        with board.get("") as answer:
            assert b"sstf dashboard" in answer.read()
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
        for path in ("page/main.js", "page/vendor/uPlot.iife.min.js", "page/vendor/uPlot-LICENSE"):
            with board.get(path) as answer:
                assert answer.read() == (PAGE.parent / path).read_bytes()
        for path in ("page/../app.py", "page/%2e%2e/app.py", "docs", "openapi.json"):
            assert board.refusal(path)[0] == 404
        assert board.refusal("state", Host="evil.example")[0] == 403

        step, seen, lengths = 1, 0, set()
        with board.get("events?window=900") as stream:
            for name, news in events(stream):
                assert name == "state" and news["window"] == 900
                for source in news["sources"]:
                    if source["id"] == "run-0":
                        seen = source["step"]
                    if seen == step < 4:
                        step += 1
                        with log.open("a") as file:
                            file.write(json.dumps({"step": step, "lr": 0.5 / step}) + "\n")
                    if source["id"] == "engine-0":
                        lengths.add(source["latest"].get("accepted_length"))
                engine.work(100, 150)
                if seen == 4 and 2.5 in lengths:
                    break
            state = board.state()
            assert [row[0] for row in state["sources"][0]["table"]["rows"]] == [1, 2, 3, 4]
            assert set(engine.asked) == {"/metrics"}
            assert board.stop(signal.SIGTERM) == 0, "with a stream open"


def test_a_page_does_not_outlive_its_watching(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board([log.parents[2]], [])

    def broken() -> bool:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(board.runs[0], "poll", broken)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        serve(board, "127.0.0.1", 0, None, lambda url: None)


def test_with_a_key_nothing_is_shown_without_it(log: Path) -> None:
    arguments = (log.parents[2], "--host", "0.0.0.0", "--api-key-env", "SSTF_TEST_KEY")
    with dashboard(*arguments, SSTF_TEST_KEY="k:ey") as board:
        basic = "Basic " + base64.b64encode(b"me:k:ey").decode()
        for given in ("", "Bearer", "Bearer wrong", "Basic !!!", basic[:-4], "Digest k:ey"):
            for path in ("", "page/main.js", "state", "events"):
                status, challenge = board.refusal(path, Authorization=given)
                assert status == 401 and challenge.startswith("Basic realm=")
        for given in (basic, "Bearer k:ey"):
            with board.get("state", Authorization=given, Host="any.example") as answer:
                assert json.load(answer)["sources"]
        assert board.stop(signal.SIGINT) == 0
