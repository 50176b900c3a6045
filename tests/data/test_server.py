"""The sampler against a server that really misbehaves (`faulty_server`), over real sockets."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_server import Fault, FaultyServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from sstf.data import server_client
from sstf.data.config import RegenerateAnswers
from sstf.data.groups import GroupFiles
from sstf.data.journal import Journal, JournalEntry
from sstf.data.progress import NoProgress
from sstf.data.regenerate import regenerate
from sstf.data.server import ServerSampler
from sstf.data.server_client import ServerConfig
from sstf.errors import ConfigError, DataError
from sstf.types import Conversation, Message, SamplingParams

MAX_LENGTH = 256
KEY = "sk-Very.Secret/123"
ONE = SamplingParams(max_new_tokens=8)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(server_client, "LONGEST_WAIT_S", 0.1)


@pytest.fixture
def server(tokenizer: PreTrainedTokenizerBase) -> Iterator[FaultyServer]:
    # "H" and "i" are drawn as two tokens though the tokenizer would merge them.
    letters = [int(i) for i in tokenizer.convert_tokens_to_ids(list("Hiabcdefgh"))]
    running = FaultyServer(tokenizer, letters, int(tokenizer.eos_token_id))
    running.start()
    yield running
    running.stop()


class Client:
    """Makes samplers for one server, and collects what they say."""

    def __init__(self, server: FaultyServer, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        self.server, self.tokenizer, self.journal = server, tokenizer, folder / "journal.jsonl"
        self.said: list[str] = []

    def sampler(self, journal: Path | None = None, **changes: Any) -> ServerSampler:
        fields = {"timeout_s": 5.0, "give_up_after_s": 5.0, **changes}
        config = ServerConfig(base_url=self.server.url, **fields)
        ends = frozenset([self.server.end])
        return ServerSampler(
            config, self.tokenizer, ends, MAX_LENGTH, journal or self.journal, "target", self.said.append
        )


@pytest.fixture
def client(server: FaultyServer, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Client:
    return Client(server, tokenizer, tmp_path)


def work(server: FaultyServer, count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts that all differ, greedy and drawn in turn; some answers are cut at the limit."""
    prompts = [[1, *(server.letters[int(digit)] for digit in f"{i:04d}")] for i in range(count)]
    params = [SamplingParams(0.8 * (i % 2), 0.95, 20, 20 + i % 5, seed=2**62 + i) for i in range(count)]
    return prompts, params


def right(server: FaultyServer, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
    return [server.expect(prompt, p) for prompt, p in zip(prompts, params, strict=True)]


def threads() -> int:
    # The server has some of its own for every connection.
    return sum("_work" in thread.name for thread in threading.enumerate())


# ---- what is asked, and what comes back ------------------------------------------------------------------------------


def test_answers_are_ordered_and_right(server: FaultyServer, client: Client) -> None:
    # The earlier a request comes, the later it is answered: order is the client's work.
    server.settings.fault = lambda number, body: Fault(delay_s=0.05 if number < 6 else 0.0)
    prompts, params = work(server, 40)
    sampler, counts = client.sampler(), list[int]()
    results = sampler.sample(prompts, params, 6, counts.append)
    assert results == right(server, prompts, params)
    assert {r.finished for r in results} == {True, False}
    assert sum(counts) == sum(len(r.token_ids) for r in results)
    assert server.most_at_once == 6
    assert Counter(server.answered) == Counter(map(tuple, prompts))
    assert sampler.report.form == "token_ids"
    assert (sampler.report.model, sampler.report.root) == ("tiny", "/models/tiny")
    assert (sampler.report.answers, sampler.report.retokenised, sampler.report.retries) == (40, 0, 0)
    assert client.said == []
    assert threads() == 0


def test_every_setting_is_sent(server: FaultyServer, client: Client) -> None:
    params = [SamplingParams(0.7, 0.9, 0, 17, seed=2**62 + 5), SamplingParams(0.0, 1.0, 9, 3, seed=1)]
    client.sampler().sample([[5, 6], [7]], params, 1)
    assert server.requests[0] == {
        "model": "tiny",
        "prompt": [5, 6],
        "max_tokens": 17,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": [server.end],
        "skip_special_tokens": False,
        "return_token_ids": True,
        "seed": 5,  # the lower 31 bits
    }
    assert (server.requests[1]["top_k"], server.requests[1]["temperature"]) == (9, 0.0)


@pytest.mark.parametrize("gives_end", [True, False])
@pytest.mark.parametrize(
    ("form", "found"), [("token_ids", "token_ids"), ("tokens_as_ids", "logprobs"), ("content", "logprobs")]
)
def test_ids_in_every_form(server: FaultyServer, client: Client, form: str, found: str, gives_end: bool) -> None:
    server.settings.form, server.settings.gives_end = form, gives_end
    prompts, params = work(server, 10)
    sampler = client.sampler()
    assert sampler.sample(prompts, params, 3) == right(server, prompts, params)
    assert sampler.report.form == found
    assert (sampler.report.retokenised, client.said) == (0, [])


def test_text_alone_is_tokenised_and_counted(server: FaultyServer, client: Client) -> None:
    server.settings.form = "text"
    prompts, params = work(server, 30)
    expected = right(server, prompts, params)
    sampler = client.sampler()
    results = sampler.sample(prompts, params, 4)
    assert [r.finished for r in results] == [e.finished for e in expected]
    decode = client.tokenizer.decode
    assert [decode(r.token_ids) for r in results] == [decode(e.token_ids) for e in expected]
    # "H" and "i" were drawn as two tokens; from the text they are one: this is what the count warns of.
    assert [r.token_ids for r in results] != [e.token_ids for e in expected]
    assert (sampler.report.form, sampler.report.retokenised) == ("text", 30)
    assert len(client.said) == 1
    assert "gives no token ids" in client.said[0]
    again = client.sampler()
    again.sample(prompts, params, 4)
    assert (again.report.from_journal, again.report.retokenised) == (30, 30)


def test_an_answer_ends_at_its_first_end_token(server: FaultyServer, client: Client) -> None:
    def go_on(reply: dict[str, Any]) -> dict[str, Any]:  # a server that does not know all of the target's end tokens
        choice = reply["choices"][0]
        if isinstance(choice["token_ids"], list):
            choice["token_ids"] = [*choice["token_ids"][:2], server.end, *choice["token_ids"][2:-1]]
        return reply

    server.settings.change = go_on
    (result,) = client.sampler().sample([[5]], [SamplingParams(max_new_tokens=40)], 1)
    expected = server.expect([5], SamplingParams(max_new_tokens=40)).token_ids
    assert (result.token_ids, result.finished) == ([*expected[:2], server.end], True)


def test_the_end_token_that_the_server_names_is_added(server: FaultyServer, client: Client) -> None:
    server.settings.gives_end = False
    other = server.letters[0] + 1

    def name(reply: dict[str, Any]) -> dict[str, Any]:
        reply["choices"][0] |= {"token_ids": [7, 8], "finish_reason": "stop", "matched_stop": other}
        del reply["choices"][0]["stop_reason"]
        return reply

    server.settings.change = name
    config = ServerConfig(base_url=server.url)
    sampler = ServerSampler(
        config, client.tokenizer, frozenset([server.end, other]), MAX_LENGTH, client.journal, "", client.said.append
    )
    (result,) = sampler.sample([[5]], [SamplingParams(max_new_tokens=9)], 1)
    assert (result.token_ids, result.finished) == ([7, 8, other], True)


def test_equal_requests_are_asked_once(server: FaultyServer, client: Client) -> None:
    same = SamplingParams(0.8, seed=3, max_new_tokens=30)
    results = client.sampler().sample([[5], [5], [6]], [same, same, same], 3)
    assert results == right(server, [[5], [5], [6]], [same] * 3)
    assert len(server.requests) == 2


def test_no_prompts(server: FaultyServer, client: Client) -> None:
    server.stop()
    assert client.sampler().sample([], [], 4) == []


@pytest.mark.parametrize(("prompt", "tokens"), [([], 5), ([5], 0), ([5] * 250, 7)])
def test_prompts_that_do_not_fit(server: FaultyServer, client: Client, prompt: list[int], tokens: int) -> None:
    with pytest.raises(DataError, match=r"prompt 1 has .* at most 256 together"):
        client.sampler().sample([[5], prompt], [SamplingParams(max_new_tokens=n) for n in (5, tokens)], 1)


# ---- faults ----------------------------------------------------------------------------------------------------------

BUSY_NOW = Fault("status", 503, b'{"error":{"message":"loading"}}')
FAULTS = {
    "500": Fault("status", 500, b"Internal Server Error"),
    "half an answer": Fault("half"),
    "connection cut": Fault("cut"),
    "garbage": Fault("body", 200, b"<html>it works</html>"),
    "deep garbage": Fault("body", 200, b"[" * 100_000),
    "not an object": Fault("body", 200, b"[1]"),
    "no choices": Fault("body", 200, b'{"object":"text_completion"}'),
    "fewer choices": Fault("body", 200, b'{"choices":[]}'),
    "no text": Fault("body", 200, b'{"choices":[{"finish_reason":"stop"}]}'),
    "an error with 200": Fault("body", 200, b'{"error":{"message":"engine died"}}'),
    "nothing": Fault("body", 200, b""),
    "not UTF-8": Fault("body", 200, b"\xff\xfe"),
    "aborted": Fault("body", 200, b'{"choices":[{"text":"","finish_reason":"abort","token_ids":[]}]}'),
    "ids are no numbers": Fault(
        "body", 200, b'{"choices":[{"text":"","finish_reason":"stop","token_ids":["a",true]}]}'
    ),
    "ids are missing": Fault("body", 200, b'{"choices":[{"text":"","finish_reason":"stop"}]}'),
    "too few ids": Fault("body", 200, b'{"choices":[{"text":"","finish_reason":"length","token_ids":[7]}]}'),
    "too many ids": Fault(
        "body", 200, json.dumps({"choices": [{"text": "", "finish_reason": "length", "token_ids": [7] * 99}]}).encode()
    ),
    "a stop string": Fault(
        "body", 200, b'{"choices":[{"text":"","finish_reason":"stop","stop_reason":"\\n","token_ids":[7]}]}'
    ),
    "stop reason of no use": Fault("body", 200, b'{"choices":[{"text":"","finish_reason":[],"stop_reason":[]}]}'),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_asked_again(server: FaultyServer, client: Client, name: str) -> None:
    server.settings.fault = lambda number, body: FAULTS[name] if number in (1, 2) else Fault()
    prompts, params = work(server, 4)
    sampler = client.sampler(retries=2)
    assert sampler.sample(prompts, params, 1) == right(server, prompts, params)
    # A connection that was used before may just have been idle for too long: the first cut does not count.
    assert (len(server.requests), sampler.report.retries) == (6, 1 if name == "connection cut" else 2)


@pytest.mark.parametrize("name", ["500", "half an answer", "garbage", "too few ids"])
def test_retries_are_bounded(server: FaultyServer, client: Client, name: str) -> None:
    prompts, params = work(server, 4)
    server.settings.fault = lambda number, body: FAULTS[name] if body["prompt"] == prompts[2] else Fault()
    with pytest.raises(DataError, match=r"completions failed 4 times in a row, .*retries: 3; the last time: .+\. What"):
        client.sampler(retries=3).sample(prompts, params, 1)
    assert Counter(tuple(body["prompt"]) for body in server.requests)[tuple(prompts[2])] == 4
    assert threads() == 0


def test_slow_answers_time_out(server: FaultyServer, client: Client) -> None:
    server.settings.fault = lambda number, body: Fault(delay_s=1.0 if number == 0 else 0.0)
    prompts, params = work(server, 2)
    sampler = client.sampler(timeout_s=0.2)
    assert sampler.sample(prompts, params, 1) == right(server, prompts, params)
    assert sampler.report.retries == 1
    server.settings.fault = lambda number, body: Fault(delay_s=1.0)
    with pytest.raises(DataError, match=r"no answer within timeout_s: 0\.2"):
        client.sampler(timeout_s=0.2, retries=1).sample([[9]], params[:1], 1)


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_honoured(server: FaultyServer, client: Client, date: bool) -> None:
    times: list[float] = []
    # A date has whole seconds, so that the wait is up to one second shorter.
    after = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2)) if date else "1"

    def fault(number: int, body: dict[str, Any]) -> Fault:
        times.append(time.monotonic())
        return Fault("status", 429, b'{"message":"slow down"}', (("Retry-After", after),)) if number == 0 else Fault()

    server.settings.fault = fault
    prompts, params = work(server, 3)
    sampler = client.sampler(retries=0)  # to be told to wait is no failure
    assert sampler.sample(prompts, params, 1) == right(server, prompts, params)
    assert 0.9 < times[1] - times[0] < 2.5
    assert len(times) == 4
    assert "429: slow down" in client.said[0]
    assert "answers again" in client.said[1]


def test_a_wait_that_is_too_long(server: FaultyServer, client: Client) -> None:
    server.settings.fault = lambda number, body: Fault("status", 429, b"{}", (("Retry-After", "3600"),))
    start = time.monotonic()
    with pytest.raises(DataError, match="asks to wait 3600 s, expected it back within give_up_after_s: 5"):
        client.sampler().sample([[5]], [ONE], 1)
    assert time.monotonic() - start < 2


def test_a_server_that_loads_is_waited_for(server: FaultyServer, client: Client) -> None:
    server.settings.fault = lambda number, body: BUSY_NOW if number < 9 else Fault()
    prompts, params = work(server, 6)
    sampler = client.sampler(retries=0)
    assert sampler.sample(prompts, params, 3) == right(server, prompts, params)
    assert sampler.report.outages >= 1
    assert "503: loading" in client.said[0]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (
            400,
            r"refused the request \(400: Token id 9 is out of vocabulary\); expected it to take prompts as token ids",
        ),
        (403, r"\(403: .*name the environment variable that holds it in api_key_env"),
        (404, r"\(404: .*expected base_url to end in /v1"),
        (307, r"\(307: .*set base_url to where it leads"),
    ],
)
def test_what_will_not_get_better_is_an_error_at_once(
    server: FaultyServer, client: Client, status: int, said: str
) -> None:
    message = b'{"error":{"message":"Token id 9 is\\n out of vocabulary"}}'
    server.settings.fault = lambda number, body: Fault("status", status, message)
    with pytest.raises(DataError, match=said):
        client.sampler().sample([[5]], [ONE], 1)
    assert len(server.requests) == 1


def test_the_server_is_gone_for_a_while(server: FaultyServer, client: Client) -> None:
    prompts, params = work(server, 60)
    server.settings.fault = lambda number, body: Fault(delay_s=0.02)

    def outage() -> None:
        while len(server.answered) < 10:
            time.sleep(0.005)
        server.stop()
        time.sleep(0.5)
        server.start()

    other = threading.Thread(target=outage)
    other.start()
    sampler = client.sampler()
    results = sampler.sample(prompts, params, 8)
    other.join()
    assert results == right(server, prompts, params)
    assert sampler.report.outages == 1
    assert len(client.said) == 2
    assert "does not answer" in client.said[0]
    assert "answers again, after" in client.said[1]
    # What was answered before is not asked again, but for what was under way when it went.
    assert len(server.answered) <= 60 + 8


def test_a_server_that_stays_away_costs_no_answer(server: FaultyServer, client: Client) -> None:
    prompts, params = work(server, 20)
    port = server.port
    server.settings.fault = lambda number, body: Fault(delay_s=0.02)

    def leave(count: int) -> None:
        if len(server.answered) >= 5:
            server.stop()

    start = time.monotonic()
    with pytest.raises(DataError, match=rf"127\.0\.0\.1:{port}/v1 has not answered for 0 s .*give_up_after_s: 0\.3"):
        client.sampler(give_up_after_s=0.3).sample(prompts, params, 2, leave)
    assert time.monotonic() - start < 5
    assert threads() == 0
    kept = len(client.journal.read_text().splitlines())
    assert kept >= 5
    server.start()
    server.answered.clear()
    sampler = client.sampler()
    assert sampler.sample(prompts, params, 2) == right(server, prompts, params)
    assert sampler.report.from_journal == kept
    assert len(server.answered) == 20 - kept


def test_nobody_there_at_the_start(server: FaultyServer, client: Client) -> None:
    server.stop()
    with pytest.raises(DataError, match=r"\(Connection refused\), expected it back within give_up_after_s: 0\.2"):
        client.sampler(give_up_after_s=0.2).sample([[5]], [ONE], 1)
    assert "Connection refused" in client.said[0]


def test_an_idle_connection_that_the_server_closed_is_no_failure(server: FaultyServer, client: Client) -> None:
    from sstf.data.server_client import ServerClient

    asker = ServerClient(ServerConfig(base_url=server.url, retries=0), client.said.append)
    connection, stop = asker.connect(), threading.Event()
    for _ in range(3):
        models = asker.ask(connection, "models", None, lambda reply: reply["data"][0]["id"], stop)
        assert models == "tiny"
        server.stop()  # closes the connection
        server.start()
    connection.close()
    assert (asker.retries, asker.outages, client.said) == (0, 0, [])


def test_seeds_are_refused(server: FaultyServer, client: Client) -> None:
    server.settings.takes_seeds = False
    prompts, params = work(server, 12)
    sampler = client.sampler()
    assert sampler.sample(prompts, params, 4) == right(server, prompts, params)
    assert not sampler.report.seeds
    assert len(client.said) == 1
    assert "takes no seeds (torch.Generator: per-request seed is not supported" in client.said[0]
    assert sum("seed" in body for body in server.requests) <= 4  # those that were under way at once
    # Told beforehand, it is not even tried.
    server.requests.clear()
    client.said.clear()
    client.sampler(Path(f"{client.journal}.2"), seeds=False).sample(prompts, params, 4)
    assert not any("seed" in body for body in server.requests)
    assert client.said == []


def test_requests_are_paced(server: FaultyServer, client: Client) -> None:
    times: list[float] = []

    def fault(number: int, body: dict[str, Any]) -> Fault:
        times.append(time.monotonic())
        return Fault()

    server.settings.fault = fault
    prompts, params = work(server, 11)
    client.sampler(requests_per_second=20.0).sample(prompts, params, 8)
    assert times[-1] - times[0] > 9.5 / 20


CHAOS = [*FAULTS.values(), BUSY_NOW, Fault(delay_s=0.02), Fault(delay_s=0.4)]


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), slots=st.integers(1, 9))
def test_whatever_happens_the_answers_are_right(
    server: FaultyServer, client: Client, tmp_path: Path, seed: int, slots: int
) -> None:
    """A third of the requests meet a fault, but no request more than three in a row."""
    draw, met = random.Random(seed), Counter[tuple[int, ...]]()

    def fault(number: int, body: dict[str, Any]) -> Fault:
        prompt = tuple(body["prompt"])
        met[prompt] += 1
        return draw.choice(CHAOS) if met[prompt] <= 3 and draw.random() < 0.33 else Fault()

    server.settings.fault = fault
    prompts, params = work(server, 25)
    journal = tmp_path / f"{seed}-{slots}.jsonl"
    sampler = client.sampler(journal, retries=3, timeout_s=0.25)
    assert sampler.sample(prompts, params, slots) == right(server, prompts, params)
    assert max(met.values()) <= 4
    assert sampler.report.answers == 25


# ---- going on --------------------------------------------------------------------------------------------------------


class Crash(Exception):
    pass


def crash_after(answers: int) -> Any:
    left = [answers]

    def on_token(count: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Crash

    return on_token


def test_nothing_is_asked_twice(server: FaultyServer, client: Client) -> None:
    prompts, params = work(server, 30)
    with pytest.raises(Crash):
        client.sampler().sample(prompts, params, 3, crash_after(11))
    assert threads() == 0
    kept = {json.loads(line)["key"] for line in client.journal.read_text().splitlines()}
    assert 11 <= len(kept) < 30  # with what came in before the crash was noticed, however many on a busy machine
    time.sleep(0.1)  # the server finishes what was under way
    server.requests.clear()
    sampler = client.sampler()
    assert sampler.sample(prompts, params, 3) == right(server, prompts, params)
    assert len(server.requests) == 30 - len(kept)
    assert sampler.report.from_journal == len(kept)
    # Another target, or another seed, is another question.
    other = ServerSampler(
        ServerConfig(base_url=server.url),
        client.tokenizer,
        frozenset([server.end]),
        MAX_LENGTH,
        client.journal,
        "another target",
        client.said.append,
    )
    server.requests.clear()
    other.sample(prompts[:2], params[:2], 1)
    assert len(server.requests) == 2


@pytest.fixture
def interruptible() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("gone", [False, True])
def test_an_interrupt_stops_at_once(server: FaultyServer, client: Client, interruptible: None, gone: bool) -> None:
    """While all threads wait for slow answers, or for a server that is gone."""
    server.settings.fault = lambda number, body: Fault(delay_s=20.0 if number > 2 else 0.0)
    prompts, params = work(server, 30)
    sampler = client.sampler(timeout_s=60.0, give_up_after_s=60.0)
    server_client.LONGEST_WAIT_S = 60.0
    sampler.sample(prompts[:1], params[:1], 1)
    if gone:
        server.stop()
        server_client.FIRST_WAIT_S = 60.0  # `_impatient` puts it back
    timer = threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sampler.sample(prompts, params, 8)
    assert time.monotonic() - start < 1.5
    assert threads() == 0


def entry(number: int) -> JournalEntry:
    return JournalEntry(f"key-{number}", [number, 7, 300], bool(number % 2), False)


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "folder" / "journal.jsonl")
    assert journal.read() == ({}, 0)
    for number in range(3):
        journal.append(entry(number))
    whole = journal.path.read_bytes()
    second_end = whole.rfind(b"\n", 0, -1) + 1
    for size in range(second_end, len(whole)):
        journal.path.write_bytes(whole[:size])
        assert journal.read() == ({f"key-{i}": entry(i) for i in range(2)}, 0)
        journal.append(entry(9))
        assert journal.read() == ({f"key-{i}": entry(i) for i in (0, 1, 9)}, 0)


@given(st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_loses_lines_and_alters_none(tmp_path: Path, data: st.DataObject) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.path.unlink(missing_ok=True)
    for number in range(4):
        journal.append(entry(number))
    content = bytearray(journal.path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    journal.path.write_bytes(content)
    found, _ = journal.read()
    assert all(value == entry(int(key.removeprefix("key-"))) for key, value in found.items())
    assert len(found) >= 2  # a line break that is gone costs two


def test_damaged_lines_are_asked_again(server: FaultyServer, client: Client) -> None:
    prompts, params = work(server, 6)
    client.sampler().sample(prompts, params, 1)
    content = client.journal.read_text().replace('"token_ids":[', '"token_ids":[7,', 1)
    client.journal.write_text(content)
    server.requests.clear()
    assert client.sampler().sample(prompts, params, 1) == right(server, prompts, params)
    assert len(server.requests) == 1
    assert "1 damaged lines" in client.said[0]


def test_regeneration_goes_on_within_a_group(server: FaultyServer, client: Client, tmp_path: Path) -> None:
    """Through `regenerate`: killed in the middle of a group, the rest is asked, and the files are those of one run."""
    items = [
        Conversation(f"c{i}", (Message("user", f"Hi {i}"), Message("assistant", "old"), Message("user", "more?")), "t")
        for i in range(8)
    ]
    config = RegenerateAnswers(group_size=4, max_new_tokens=40)

    def run(folder: Path, sampler: Any) -> Any:
        files = GroupFiles(folder, "answers", "target")
        return regenerate(items, client.tokenizer, sampler, config, files, NoProgress(), MAX_LENGTH)

    unbroken = run(tmp_path / "a", client.sampler(tmp_path / "a.jsonl"))

    class Killed:
        """Dies in its third call, in the middle of the second group's answers."""

        def __init__(self, sampler: ServerSampler) -> None:
            self.sampler, self.calls = sampler, 0

        def sample(self, prompts: Any, params: Any, slots: int, on_token: Any = None) -> Any:
            self.calls += 1
            return self.sampler.sample(prompts, params, slots, crash_after(2) if self.calls == 3 else on_token)

    config = config.model_copy(update={"slots": 1})
    with pytest.raises(Crash):
        run(tmp_path / "b", Killed(client.sampler()))
    time.sleep(0.1)
    server.requests.clear()
    assert run(tmp_path / "b", client.sampler()) == unbroken
    # Group 1: two of four first answers were there, or three; then four second ones.
    assert len(server.requests) in (1 + 4, 2 + 4)
    assert (tmp_path / "b/answers-00001.jsonl").read_bytes() == (tmp_path / "a/answers-00001.jsonl").read_bytes()


# ---- the right server ------------------------------------------------------------------------------------------------


def test_another_tokenizer_is_noticed(
    server: FaultyServer, client: Client, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shift(reply: dict[str, Any]) -> dict[str, Any]:
        choice = reply["choices"][0]
        choice["prompt_token_ids"] = [token + 1 for token in choice["prompt_token_ids"]]
        return reply

    server.settings.change = shift
    with pytest.raises(DataError, match=r"serves tiny, which reads a text as \d+ tokens, not all of them ours"):
        client.sampler().sample([[5]], [ONE], 1)
    assert server.requests == []


@pytest.mark.parametrize("form", ["token_ids", "text"])
def test_a_prompt_that_is_added_to_is_noticed(server: FaultyServer, client: Client, form: str) -> None:
    sampler = client.sampler()
    server.settings.form = form
    sampler.sample([[5]], [ONE], 1)
    server.settings.prompt_extra = (1,)
    with pytest.raises(DataError, match="read a prompt of 3 token ids as 4 tokens"):
        sampler.sample([[5, 6, 7]], [ONE], 1)


def test_another_count_of_tokens_is_noticed_without_ids(server: FaultyServer, client: Client) -> None:
    server.settings.form, server.settings.prompt_extra = "text", (1, 1)
    with pytest.raises(DataError, match=r"reads a text as \d+ tokens, expected the \d+ of the target's tokenizer"):
        client.sampler().sample([[5]], [ONE], 1)


def test_models(server: FaultyServer, client: Client) -> None:
    server.settings.models = ({"id": "a"}, {"id": "b"})
    with pytest.raises(DataError, match="serves a, b; expected one model, or the setting model"):
        client.sampler().sample([[5]], [ONE], 1)
    with pytest.raises(DataError, match="serves a, b; expected model: c"):
        client.sampler(model="c").sample([[5]], [ONE], 1)
    sampler = client.sampler(model="b")
    sampler.sample([[5]], [ONE], 1)
    assert sampler.report.model == server.requests[0]["model"] == "b"
    server.settings.models = ({"id": "a", "max_model_len": 200},)
    with pytest.raises(DataError, match="room for 200 tokens, expected max_length: 256"):
        client.sampler().sample([[5]], [ONE], 1)
    server.settings.models = ()
    with pytest.raises(DataError, match="the list of models is empty"):
        client.sampler(retries=1).sample([[5]], [ONE], 1)


# ---- keys and settings -----------------------------------------------------------------------------------------------


def test_the_key_opens_and_is_never_shown(
    server: FaultyServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.settings.key = KEY
    monkeypatch.setenv("SSTF_TEST_KEY", f"{KEY}\n")
    sampler = client.sampler(api_key_env="SSTF_TEST_KEY")
    assert sampler.sample([[5]], [ONE], 1) == right(server, [[5]], [ONE])
    wrong = "sk-wrong.456"
    monkeypatch.setenv("SSTF_TEST_KEY", wrong)
    # The server of these tests repeats the key in its refusal.
    with pytest.raises(DataError, match=r"bad credentials: Bearer \*\*\*.*SSTF_TEST_KEY to hold a key") as refused:
        client.sampler(api_key_env="SSTF_TEST_KEY").sample([[5]], [ONE], 1)
    assert wrong not in f"{refused.value!r}"
    server.settings.key = wrong
    for echo in (
        Fault("status", 500, f"cannot handle Bearer {wrong}".encode()),
        Fault("body", 200, f"{wrong}: not json".encode()),
    ):
        server.settings.fault = lambda number, body, echo=echo: echo  # type: ignore[misc]
        with pytest.raises(DataError) as failed:
            client.sampler(api_key_env="SSTF_TEST_KEY", retries=1).sample([[6]], [ONE], 1)
        assert wrong not in str(failed.value)
        assert "***" in str(failed.value)
    config = ServerConfig(base_url=server.url, api_key_env="SSTF_TEST_KEY")
    everything = f"{client.said} {config!r} {config.model_dump()} {client.journal.read_text()} {sampler.report}"
    assert wrong not in everything
    assert KEY not in everything


@pytest.mark.parametrize(("key", "found"), [(None, "is not set"), ("  ", "is not set"), ("a\nb", "cannot be a key")])
def test_a_key_that_is_none(client: Client, monkeypatch: pytest.MonkeyPatch, key: str | None, found: str) -> None:
    monkeypatch.delenv("SSTF_TEST_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("SSTF_TEST_KEY", key)
    with pytest.raises(ConfigError, match=f"SSTF_TEST_KEY .*{found}") as error:
        client.sampler(api_key_env="SSTF_TEST_KEY")
    assert "a\nb" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://host/v1", "http://", "http://host:0/v1", "http://host:99999/v1", "http://ho st/v1",
     "http://user:hunter2@host/v1", "http://key@host/v1", "https://host/v1?key=1", "http://host/v1#x", "http://host/v1\n"],
)  # fmt: skip
def test_addresses_that_are_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="expected an address") as error:
        ServerConfig(base_url=url)
    assert "hunter2" not in str(error.value)


def test_addresses_that_are_taken() -> None:
    assert (
        ServerConfig(base_url="https://host.example:8443/openai/v1/").base_url == "https://host.example:8443/openai/v1"
    )
    assert ServerConfig(base_url="http://[::1]:8000/v1").base_url == "http://[::1]:8000/v1"


def test_https_to_a_server_without_it(server: FaultyServer, client: Client) -> None:
    sampler = ServerSampler(
        ServerConfig(base_url=server.url.replace("http://", "https://")),
        client.tokenizer,
        frozenset([server.end]),
        MAX_LENGTH,
        client.journal,
        "",
        client.said.append,
    )
    with pytest.raises(DataError, match="no secure connection"):
        sampler.sample([[5]], [ONE], 1)
