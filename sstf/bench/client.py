"""One server: found, asked, and its streamed answers timed.

A token's time is that of the event that brings its text. Events without text (the role, the usage, an empty piece) are
not tokens: the time to the first token is when something can be read. An answer's error is kept as a sentence, since a
benchmark goes on after it; whether the whole server is gone is for `alive` to say.
"""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx

from sstf.bench.requests import Request
from sstf.errors import ConfigError

CONNECT_TIMEOUT_S = 10.0
# Servers close idle connections, uvicorn after 5 s; one that is closed while it is chosen would be a false failure.
KEEP_ALIVE_S = 2.0
LONGEST_EVENT = 1 << 24  # bytes


@dataclass(frozen=True)
class Answer:
    """What came back, in seconds from when the request was due. A failed one has an `error`, and no figure counts it.

    `gaps_s` lie between events with text, each of one token or, from a server that speculates, of several. `tokens`
    are the server's own count, None where it gives none.
    """

    request: str
    late_s: float  # between when it was due and when it was sent
    ttft_s: float = 0.0
    gaps_s: tuple[float, ...] = ()
    e2e_s: float = 0.0  # to the last event with text
    text: str = ""
    tokens: int | None = None
    finish: str | None = None
    error: str | None = None
    lost: bool = False  # the connection failed


class BadAnswer(Exception):
    """What came is no streamed completion."""


@dataclass
class Stream:
    """Reads the server-sent events of one completion as their bytes arrive."""

    times: list[float] = field(default_factory=list)  # of events with text
    pieces: list[str] = field(default_factory=list)
    tokens: int | None = None
    finish: str | None = None
    ended: bool = False
    _rest: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes, now: float) -> None:
        """Take bytes that arrived at time `now`.

        Raises:
            BadAnswer: an event is no JSON object, reports an error, or never ends.
        """
        self._rest += data
        *lines, rest = bytes(self._rest).split(b"\n")
        if len(rest) > LONGEST_EVENT:
            raise BadAnswer(f"an event is longer than {LONGEST_EVENT:,} bytes")
        self._rest = bytearray(rest)
        for line in lines:
            if line.startswith(b"data:"):  # all else are comments, names and the blank lines between events
                self._event(line[5:].strip(), now)

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.ended = True
            return
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            raise BadAnswer(f"an event is not JSON: {data[:60].decode(errors='replace')!r}") from None
        if not isinstance(event, dict) or event.get("error"):
            raise BadAnswer(said(data))
        usage, choices = event.get("usage"), event.get("choices")
        if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
            self.tokens = usage["completion_tokens"]
        if not isinstance(choices, list) or not choices:
            return
        if not isinstance(choices[0], dict):
            raise BadAnswer(f"an event holds no choice: {data[:60].decode(errors='replace')!r}")
        text = _text(choices[0])
        if text:
            self.times.append(now)
            self.pieces.append(text)
        if isinstance(choices[0].get("finish_reason"), str):
            self.finish = choices[0]["finish_reason"]

    def take_whole(self, content: bytes, now: float) -> None:
        """Take an answer that is not streamed: one object, all of whose text comes at its end, at time `now`.

        Raises:
            BadAnswer: it is no completion.
        """
        try:
            reply = json.loads(content)
            choice, usage = reply["choices"][0], reply.get("usage")
            text, self.finish = _text({**choice, "delta": choice.get("message")}), choice.get("finish_reason")
        except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
            raise BadAnswer(f"the answer is no completion: {said(content)[:80]}") from None
        self.tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        self.ended = True
        if text:
            self.times.append(now)
            self.pieces.append(text)

    def answer(self, request: str, due: float, sent: float) -> Answer:
        """All that was read.

        Raises:
            BadAnswer: the answer is not whole.
        """
        if not (self.ended or self.finish):
            raise BadAnswer(
                "the stream ended before the answer" if self.pieces else "the answer is no stream of events"
            )
        if not self.times:
            raise BadAnswer("the answer holds no text")
        gaps = tuple(now - then for then, now in pairwise(self.times))
        first, last = self.times[0] - due, self.times[-1] - due
        return Answer(request, sent - due, first, gaps, last, "".join(self.pieces), self.tokens, self.finish)


def _text(choice: dict[str, Any]) -> str:
    """What an event adds to be read: of a text completion, or of a chat with its reasoning and calls."""
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return str(choice.get("text") or "")
    text = str(delta.get("reasoning_content") or delta.get("reasoning") or "") + str(delta.get("content") or "")
    for call in delta.get("tool_calls") or []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            text += str(function.get("name") or "") + str(function.get("arguments") or "")
    return text


def refusal(status: int, content: bytes) -> str:
    """A failed request in a line."""
    return f"{status}: {said(content)}"


def said(content: bytes) -> str:
    """A server's own words, in one line. vLLM and OpenAI, SGLang, and FastAPI each have another place for them."""
    text = content[:10_000].decode(errors="replace")
    with suppress(ValueError, RecursionError):
        reply = json.loads(content)
        if isinstance(reply, dict):
            error = reply.get("error")
            found = error.get("message") if isinstance(error, dict) else error
            text = str(found or reply.get("message") or reply.get("detail") or text)
    return " ".join(text.split())[:300] or "it gave no reason"


def address(text: str) -> str:
    """A server's address without its /v1.

    Raises:
        ConfigError: it is no http or https address, or holds a password.
    """
    if "@" in text or "?" in text or "#" in text:
        # Not repeated: it may hold a password.
        raise ConfigError(
            "expected an address without user, password or query; a key goes into an environment variable"
        )
    try:
        parts = urlsplit(text)
        usable = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
            and bool(httpx.URL(text).host)
        )
    except (ValueError, httpx.InvalidURL):
        usable = False
    if not usable or not re.fullmatch(r"[!-~]+", text):
        raise ConfigError(f"{text!r} is no server's address; expected one such as http://127.0.0.1:8000")
    return text.rstrip("/").removesuffix("/v1")


def read_key(variable: str | None) -> str:
    """The API key in an environment variable; "" for no variable.

    Raises:
        ConfigError: the variable is missing, or holds what no header can.
    """
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[!-~]+", key):
        found = "holds something that cannot be a key" if key else "is not set"
        raise ConfigError(f"the environment variable {variable} {found}; expected the server's key in it")
    return key


class Server:
    """A server and its connections. Use as an async context, `introduce` first.

    Args:
        name: baseline or candidate, for messages.
        url: see `address`.
        model: the name to ask for; None for the only one that is served.
        key: sent as a bearer token, never shown.
        timeout_s: the longest silence within an answer.
    """

    def __init__(self, name: str, url: str, model: str | None, key: str, timeout_s: float) -> None:
        self.name, self.url, self.model = name, address(url), model or ""
        self._key, self._timeout_s = key, timeout_s
        # As they come: a proxy or compression would change what is measured.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        self._http = httpx.AsyncClient(
            headers=headers | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_S),
            trust_env=False,
            verify=self.url.startswith("https:"),  # without TLS there is no certificate, and reading all takes 0.1 s
        )

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def introduce(self) -> None:
        """Find the model.

        Raises:
            ConfigError: nothing answers there, it is no OpenAI-compatible server, or it has not this model.
        """
        where = f"{self.name} {self.url}"
        try:
            reply = await self._http.get(f"{self.url}/v1/models")
        except httpx.HTTPError as error:
            raise ConfigError(
                f"{where}: no server answers ({_reason(error)}); start it, or correct the address"
            ) from None
        if reply.status_code in (401, 403):
            raise ConfigError(
                f"{where} wants another key ({self._clean(said(reply.content))}); see --{self.name}-key-env"
            )
        try:
            names = [str(card["id"]) for card in reply.json()["data"]]
        except (ValueError, KeyError, TypeError):
            names = []
        if reply.status_code != 200 or not names:
            found = f"{reply.status_code}: {self._clean(said(reply.content))[:80]}"
            raise ConfigError(f"{where}/v1/models answers {found}; expected the models of an OpenAI-compatible server")
        if self.model not in names and (self.model or len(names) > 1):
            expected = f"has no model {self.model}" if self.model else "serves several models"
            raise ConfigError(f"{where} {expected}; choose one with --{self.name}-model: {', '.join(sorted(names))}")
        self.model = self.model or names[0]

    async def ask(self, request: Request, due: float | None = None) -> Answer:
        """Send a request that was due at `due` (of `time.perf_counter`; None is now), and time its streamed answer."""
        return await self.send(request, {"stream": True, "stream_options": {"include_usage": True}}, due)

    async def send(self, request: Request, extra: dict[str, Any], due: float | None = None) -> Answer:
        """As `ask`, the answer streamed or not as the body with `extra` says."""
        body = {**request.body, "model": self.model, **extra}
        content, stream, whole = json.dumps(body).encode(), Stream(), bytearray()
        sent = time.perf_counter()
        start = sent if due is None else due
        try:
            async with self._http.stream("POST", f"{self.url}/v1/{request.path}", content=content) as reply:
                if reply.status_code != 200:
                    words = refusal(reply.status_code, await reply.aread())
                    return Answer(request.id, sent - start, error=self._clean(words))
                async for data in reply.aiter_raw():
                    if body.get("stream"):
                        stream.feed(data, time.perf_counter())
                    else:
                        whole += data
            if not body.get("stream"):
                stream.take_whole(bytes(whole), time.perf_counter())
            return stream.answer(request.id, start, sent)
        except BadAnswer as error:
            return Answer(request.id, sent - start, error=self._clean(str(error)))
        except httpx.TimeoutException:
            return Answer(request.id, sent - start, error=f"silent for {self._timeout_s:g} s", lost=True)
        except httpx.HTTPError as error:
            return Answer(request.id, sent - start, error=f"the connection failed ({_reason(error)})", lost=True)

    async def forward(self, method: str, path: str, content: bytes, headers: dict[str, str]) -> httpx.Response:
        """Another client's request; the response's body is still to be read, and the response to be closed.

        Raises:
            httpx.HTTPError: it cannot be reached.
        """
        # Of the credentials, its own only where we have none.
        names = ["content-type", "accept", *([] if self._key else ["authorization"])]
        kept = {name: headers[name] for name in names if name in headers}
        request = self._http.build_request(method, f"{self.url}{path}", content=content, headers=kept)
        return await self._http.send(request, stream=True)

    async def metrics(self) -> str:
        """The text of its /metrics page; "" where it has none."""
        with suppress(httpx.HTTPError):
            reply = await self._http.get(f"{self.url}/metrics", timeout=CONNECT_TIMEOUT_S)
            if reply.status_code == 200:
                return reply.text
        return ""

    async def alive(self) -> bool:
        """Whether it still answers at all."""
        with suppress(httpx.HTTPError):
            return (await self._http.get(f"{self.url}/v1/models", timeout=CONNECT_TIMEOUT_S)).status_code < 500
        return False

    def _clean(self, text: str) -> str:
        """Without the key, should the server repeat it."""
        return text.replace(self._key, "***") if self._key else text


def _reason(error: httpx.HTTPError) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
