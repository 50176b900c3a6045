"""`sstf bench` whole: two real servers on loopback, exit codes, the report, and bad input in a sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from stand_in import Reply, StandIn

from sstf.cli import main

Serve = Callable[..., StandIn]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *map(str, arguments)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def echo(number: int, body: dict) -> Reply:
    """The same text for the same request, of as many tokens as letters."""
    text = body["messages"][-1]["content"][:5]
    return Reply(list(text), len(text))


def prompts(tmp_path: Path, count: int) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"prompt {i}"}) + "\n" for i in range(count)))
    return path


def recorded(tmp_path: Path, count: int, **fields: object) -> Path:
    path = tmp_path / "recorded.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"{i:05}"}], "temperature": 0, **fields} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_bench_from_prompts_to_report(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    baseline, candidate = serve(name="old", behave=echo), serve(name="new", behave=echo, key="s3cret-key")
    passes = "vllm:spec_decode_num_drafts_total {0}\nvllm:spec_decode_num_accepted_tokens_total {1}\n"
    candidate.metrics = lambda: passes.format(4 * len(candidate.requests), 2 * len(candidate.requests))
    monkeypatch.setenv("NEW_KEY", "s3cret-key")
    report = tmp_path / "report.json"
    code = run(
        *("--baseline", baseline.url, "--candidate", f"{candidate.url}/v1", "--candidate-key-env", "NEW_KEY"),
        *("--prompts", prompts(tmp_path, 5), "--concurrency", "1,2", "--requests", "4", "--rounds", "2"),
        *("--max-tokens", "7", "--temperature", "0.5", "--objective", "e2e=1000s", "--json", report),
    )
    shown = capsys.readouterr()
    assert code == 0, shown.err
    found = json.loads(report.read_text())
    assert found["schema"] == "sstf-bench/1"
    assert found["partial"] is None
    assert [load["load"] for load in found["loads"]] == ["concurrency 1", "concurrency 2"]
    for load in found["loads"]:
        for side in ("baseline", "candidate"):
            flow = load[side]
            assert (flow["requests"], flow["failed"], flow["good_share"], flow["errors"]) == (4, 0, 1.0, [])
            assert flow["tokens_per_s"] == pytest.approx(20 / flow["wall_s"])
            assert flow["goodput"] == flow["requests_per_s"] == pytest.approx(4 / flow["wall_s"])
            assert flow["usage"]["wall_s"] > 0  # of this process, which listens
        assert load["baseline"]["acceptance"] is None
        assert load["candidate"]["acceptance"]["accepted_length"] == pytest.approx(1.5)
        assert load["candidate"]["acceptance"]["received_length"] == pytest.approx(1.0)  # (20 - 4) / 16
        for metric in ("ttft", "itl", "tpot", "e2e"):
            for low, middle, high in ((f[1], f[0], f[2]) for f in load["latency_s"][metric]["candidate"]):
                assert 0 <= low <= middle <= high
    # The second load goes on where the first ended, and begins again: prompts 4, 0, 1, 2
    asked = [body["messages"][0]["content"][-1] for _, body in baseline.requests]
    assert asked == sorted(asked[:4]) + asked[4:]
    assert sorted(asked[4:]) == ["0", "1", "2", "4"]
    assert sorted(json.dumps(body["messages"]) for _, body in baseline.requests) == sorted(
        json.dumps(body["messages"]) for _, body in candidate.requests
    )
    assert {(body["max_tokens"], body["temperature"], body["model"]) for _, body in candidate.requests} == {
        (7, 0.5, "new")
    }
    assert "8 requests of 5 prompts" in shown.out
    assert "s3cret" not in shown.out + shown.err + report.read_text()


def test_a_shadow_that_may_go(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    code = run(
        *("--baseline", serve(behave=echo).url, "--candidate", serve(behave=echo).url),
        *("--shadow", recorded(tmp_path, 6), "--json", report),
        *("--limit", "requests=6", "--limit", "e2e_p50=1000", "--limit", "e2e_p95=1000", "--limit", "ttft_p95=1000"),
    )
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert "GO: every check holds" in shown.out
    advice = json.loads(report.read_text())["advice"]
    assert (advice["go"], advice["compared"], advice["greedy"], advice["identical"]) == (True, 6, 6, 6)


def test_a_shadow_that_may_not(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    candidate = serve(behave=lambda number, body: Reply(["000", "X[/]"], 5) if number == 3 else echo(number, body))
    slow = [part for name in ("e2e_p50", "e2e_p95", "ttft_p95") for part in ("--limit", f"{name}=1000")]
    code = run(
        *("--baseline", serve(behave=echo).url, "--candidate", candidate.url),
        *("--shadow", recorded(tmp_path, 5), "--limit", "requests=5", *slow, "--rounds", "1"),
    )
    shown = capsys.readouterr().out
    assert code == 1
    assert "NO-GO: identical greedy answers 80% (4 of 5), limit at least 90%" in shown
    assert "request 4, after 3 of 5 characters" in shown
    assert "'000' -> '03'" in shown and "'000' -> 'X[/]'" in shown


def test_recorded_requests_are_sent_as_they_are(serve: Serve, tmp_path: Path) -> None:
    server = serve(behave=echo)
    run("--baseline", server.url, "--candidate", server.url, "--shadow", recorded(tmp_path, 1, seed=3, top_p=0.5))
    _, body = server.requests[0]
    assert body == {
        "messages": [{"role": "user", "content": "00000"}],
        **{"temperature": 0, "seed": 3, "top_p": 0.5},
        **{"model": "target", "stream": True, "stream_options": {"include_usage": True}},
    }


def test_a_server_that_dies_leaves_a_partial_report(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = serve(behave=echo)

    def behave(number: int, body: dict) -> Reply:
        if number == 6:
            baseline.stop()
        return echo(number, body)

    baseline.behave = behave
    report = tmp_path / "report.json"
    code = run(
        *("--baseline", baseline.url, "--candidate", serve(behave=echo).url),
        *("--prompts", prompts(tmp_path, 12), "--requests", "12", "--json", report, "--objective", "ttft=9s"),
    )
    shown = capsys.readouterr()
    assert code == 1
    assert f"PARTIAL: baseline {baseline.url} is gone: " in shown.out
    assert "Traceback" not in shown.out + shown.err
    found = json.loads(report.read_text())
    assert found["partial"].startswith(f"baseline {baseline.url} is gone")
    (load,) = found["loads"]
    # Rounds of 3: the third is the baseline's first
    assert (load["baseline"]["requests"], load["candidate"]["requests"]) == (6, 6)
    assert load["latency_s"]["e2e"]["ratio"][0] is not None


def test_a_shadow_that_ends_early_is_a_no(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    candidate = serve(behave=lambda number, body: Reply(status=500, body=b'{"detail": "worker died"}'))
    code = run(*("--baseline", serve(behave=echo).url, "--candidate", candidate.url, "--shadow", recorded(tmp_path, 4)))
    shown = capsys.readouterr().out
    assert code == 1
    assert "failed all 1 requests of a round (500: worker died)" in shown
    assert "NO-GO: both servers" in shown


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--baseline-model", "other"), "has no model other"),
        (("--suite", "absent-suite"), "absent-suite"),
        (("--shadow", "absent.jsonl"), "absent.jsonl cannot be read"),
        (("--arrival", "bursty"), "expected closed, poisson:RATE or trace:FILE"),
        (("--arrival", "poisson:1", "--concurrency", "2"), "--concurrency is for closed arrival"),
        (("--candidate-key-env", "ABSENT_KEY"), "ABSENT_KEY is not set"),
        (("--limit", "identical=0.5"), "--limit is for the advice of --shadow and --mirror"),
        (("--shadow", "x.jsonl", "--max-tokens", "4"), "others' requests are sent as they are"),
        (("--shadow", "x.jsonl", "--limit", "identical"), "expected NAME=NUMBER"),
        (("--shadow", "x.jsonl", "--limit", "identical=2"), "identical"),
        (("--shadow", "x.jsonl", "--limit", "equal=1"), "equal"),
        (("--concurrency", "0"), "--concurrency"),
        (("--temperature", "-1"), "--temperature"),
        (("--temperature", "nan"), "--temperature"),
        (("--timeout", "0"), "--timeout"),
        (("--objective", "ttft=500"), "'ttft=500' is no objective"),
        (("--objective", "p95=5s"), "'p95=5s' is no objective"),
        (("--candidate", "http://127.0.0.1:9"), "no server answers"),
        (("--candidate", "127.0.0.1:9"), "is no server's address"),
        (("--candidate-pid", "4194305"), "no process 4194305"),
        (("--record", "x.jsonl"), "--record is for --mirror"),
        (("--mirror", "0", "--arrival", "poisson:1"), "whose clients ask when they like"),
        (("--mirror", "70000"), "--mirror"),
        (("--mirror", "0", "--record", "/proc/x"), "--record /proc/x cannot be written"),
    ],
)
def test_bad_input_is_a_sentence(
    serve: Serve, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], complaint: str
) -> None:
    url = serve(behave=echo).url
    code = run("--baseline", url, "--candidate", url, "--requests", "1", *arguments)
    shown = capsys.readouterr()
    assert code == 2
    assert complaint in shown.err
    assert "Traceback" not in shown.out + shown.err


def test_two_loads_of_a_shadow(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = serve().url
    assert run("--baseline", url, "--candidate", url, "--shadow", recorded(tmp_path, 2), "--concurrency", "1,2") == 2
    assert "compares under one load, found 2" in capsys.readouterr().err


def test_without_the_client_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("sstf.bench")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "httpx", None)
    assert run("--baseline", "http://127.0.0.1:9", "--candidate", "http://127.0.0.1:9") == 2
    assert "sstf bench needs httpx; install it with: pip install 'sstf[engines]'" in capsys.readouterr().err
