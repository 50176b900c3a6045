"""One server, asked patiently: JSON over HTTP by many threads, with retries, a pace, and a limit to the patience.

What goes wrong falls into three kinds. A server that cannot be reached or is busy (429, 502, 503, 504) is waited for,
up to `give_up_after_s`. An answer that fails (500, timeout, cut off, not what was asked) is asked for again, up to
`retries` times. Anything else (400, 401, 404) will not get better and is an error at once. What requests and answers
mean is up to the caller.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from sstf.config_loading import Section
from sstf.errors import ConfigError, DataError

CONNECT_TIMEOUT_S = 10.0
FIRST_WAIT_S = 0.5  # doubled at each failure in a row, up to:
LONGEST_WAIT_S = 30.0
BUSY = (429, 502, 503, 504)
FAILED = (408, 409)  # and every other status from 500

T = TypeVar("T")


class ServerConfig(Section):
    """A server that serves the target. How many requests it gets at once is `slots` of the answers.

    `base_url` ends in `/v1`. `model` is needed where the server has several. `api_key_env` names the environment
    variable that holds the key. `seeds: false` is for servers that fail on seeds without saying so; those that say so
    are noticed. `timeout_s` is the longest silence while an answer is written, `retries` are those of one failed
    answer, and `give_up_after_s` is how long the server may be gone.
    """

    kind: Literal["server"] = "server"
    base_url: str
    model: str | None = Field(default=None, min_length=1)
    api_key_env: str | None = Field(default=None, min_length=1)
    seeds: bool = True
    requests_per_second: float | None = Field(default=None, gt=0)
    retries: int = Field(default=5, ge=0)
    timeout_s: float = Field(default=600, gt=0)
    give_up_after_s: float = Field(default=600, ge=0)

    @field_validator("base_url")
    @classmethod
    def _is_a_plain_address(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable or not re.fullmatch(r"[!-~]+", url):
            raise ValueError("expected an address such as http://127.0.0.1:8000/v1")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("expected an address without user, password or query; a key goes into api_key_env")
        return url.rstrip("/")


class ServerError(DataError):
    """The server refused a request, or failed it too often; `said` are its own words."""

    def __init__(self, message: str, said: str) -> None:
        super().__init__(message)
        self.said = said


class BadAnswer(Exception):
    """One answer is unusable; another one may be fine."""


class Stopped(Exception):
    """The caller wants no more answers."""


class _Busy(Exception):
    """The server cannot be reached, or does not want to answer now."""

    def __init__(self, why: str, retry_after: float = 0.0) -> None:
        super().__init__(why)
        self.retry_after = retry_after


class ServerClient:
    """What the threads that ask one server share."""

    def __init__(self, config: ServerConfig, notify: Callable[[str], None]) -> None:
        """Does not contact the server.

        Args:
            config: Where it is, and how patient to be.
            notify: Gets a sentence when the server is gone or back; called from any thread that asks.

        Raises:
            ConfigError: The environment variable with the key is missing or holds none.
        """
        self.config = config
        self.retries = 0
        self._key = _read_key(config.api_key_env)
        self._pace = _Pace(config.requests_per_second)
        self._patience = _Patience(config.base_url, config.give_up_after_s, notify)
        self._lock = threading.Lock()

    @property
    def outages(self) -> int:
        """How often the server was gone or busy."""
        return self._patience.outages

    def connect(self) -> Connection:
        """A connection for one thread; it is opened by its first request."""
        return Connection(self.config, self._key)

    def ask(
        self,
        connection: Connection,
        path: str,
        body: dict[str, Any] | None,
        read: Callable[[dict[str, Any]], T],
        stop: threading.Event,
    ) -> T:
        """`read` of the server's answer, asked for as often as the limits allow.

        Args:
            connection: The thread's own.
            path: Below `base_url`.
            body: Of a POST; None is a GET.
            read: Makes something of the JSON object that came back. Its `BadAnswer` counts as a failure of the server.
            stop: Set by another thread to end waiting.

        Raises:
            ServerError: The server refuses the request, or failed it `retries` times more.
            DataError: The server is gone for too long, or can never be reached this way.
            Stopped: `stop` was set.
        """
        failures = denials = 0
        while True:
            self._pace.wait(stop)
            if stop.is_set():
                raise Stopped
            started = time.monotonic()
            try:
                status, retry_after, content = connection.exchange(path, body)
                if not 200 <= status < 300:
                    self._refuse(path, status, retry_after, content)
                result = read(_parse(content))
            except _Busy as busy:
                if stop.is_set():
                    raise Stopped from None
                self._patience.denied(str(busy), busy.retry_after)
                if busy.retry_after:
                    self._pace.hold(busy.retry_after)  # all threads: the others would only be refused as well
                else:
                    stop.wait(_backoff(denials))
                denials += 1
            except BadAnswer as bad:
                if stop.is_set():
                    raise Stopped from None
                failures += 1
                if failures > self.config.retries:
                    raise ServerError(
                        f"{self.config.base_url}/{path} failed {failures} times in a row, expected an answer within "
                        f"retries: {self.config.retries}; the last time: {bad}. What was answered is kept: mend the "
                        "server and run the same command again.",
                        str(bad),
                    ) from None
                with self._lock:
                    self.retries += 1
                stop.wait(_backoff(failures - 1))
            else:
                self._patience.served(started)
                return result

    def _refuse(self, path: str, status: int, retry_after: float, content: bytes) -> None:
        """Raise what an answer other than 2xx means."""
        said = _server_message(content)
        if status in BUSY:
            raise _Busy(f"{status}: {said}", retry_after)
        if status in FAILED or status >= 500:
            raise BadAnswer(f"{status}: {said}")
        config = self.config
        if status in (401, 403) and config.api_key_env:
            how = f"expected the environment variable {config.api_key_env} to hold a key that it knows"
        elif status in (401, 403):
            how = "expected a key: name the environment variable that holds it in api_key_env"
        elif status == 404:
            how = f"expected base_url to end in /v1, {path} to be offered there, and model to be one that it serves"
        elif 300 <= status < 400:
            how = "expected an answer and no other address; set base_url to where it leads"
        else:
            how = "expected it to take prompts as token ids with the usual sampling settings"
        raise ServerError(f"{config.base_url}/{path} refused the request ({status}: {said}); {how}.", said)


class Connection:
    """One keep-alive connection, used by one thread; `abort` may be called by another."""

    def __init__(self, config: ServerConfig, key: str) -> None:
        self._config, self._key = config, key
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._http: http.client.HTTPConnection | None = None
        self._socket: socket.socket | None = None
        self._aborted = False

    def exchange(self, path: str, body: dict[str, Any] | None) -> tuple[int, float, bytes]:
        """Send a request: status, seconds of Retry-After (0 if none), and content.

        Raises:
            _Busy: The server cannot be reached.
            BadAnswer: It was reached, and did not answer wholly or in time.
            DataError: It can never be reached this way.
        """
        used_before = self._http is not None
        try:
            return self._exchange(path, body)
        except TimeoutError:
            self.close()
            raise BadAnswer(f"no answer within timeout_s: {self._config.timeout_s:g}") from None
        except (OSError, http.client.HTTPException) as error:
            self.close()
            if not used_before or not isinstance(error, ConnectionError):
                raise BadAnswer(self._clean(f"the connection broke ({_reason(error)})")) from None
        # A server closes connections that were idle for some seconds. That is no failure.
        return self.exchange(path, body)

    def _exchange(self, path: str, body: dict[str, Any] | None) -> tuple[int, float, bytes]:
        connection = self._http or self._open()
        where = f"{urlsplit(self._config.base_url).path}/{path}"
        data = None if body is None else json.dumps(body).encode()
        connection.request("GET" if data is None else "POST", where, data, self._headers)
        response = connection.getresponse()
        content = response.read()
        if response.will_close:
            self.close()
        retry_after = _seconds(response.headers.get("Retry-After", ""))
        return response.status, retry_after, self._clean(content.decode(errors="replace")).encode()

    def _open(self) -> http.client.HTTPConnection:
        url = urlsplit(self._config.base_url)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(url.hostname or "", url.port, timeout=CONNECT_TIMEOUT_S)
        try:
            connection.connect()
        except ssl.SSLError as error:
            connection.close()
            raise DataError(
                f"{self._config.base_url}: no secure connection ({_reason(error)}); expected a valid certificate, or "
                "an address with http:// for a server without one."
            ) from None
        except OSError as error:
            raise _Busy(_reason(error)) from None
        connection.sock.settimeout(self._config.timeout_s)
        self._http, self._socket = connection, connection.sock
        if self._aborted:
            self.close()
            raise _Busy("stopped")
        return connection

    def _clean(self, text: str) -> str:
        """Without the key, should the server repeat it: what it says is shown."""
        return text.replace(self._key, "***") if self._key else text

    def abort(self) -> None:
        """End the wait of the thread that uses it, for good. The server sees it, and may stop writing the answer."""
        self._aborted = True
        opened = self._socket
        if opened is not None:
            with suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close it; the next request opens it again."""
        if self._http is not None:
            self._http.close()
        self._http = self._socket = None


def _read_key(variable: str | None) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    # http.client would show a key that no header can hold.
    if not re.fullmatch(r"[!-~]+", key):
        found = "holds something that cannot be a key" if key else "is not set"
        raise ConfigError(f"api_key_env: the environment variable {variable} {found}; expected the server's key in it.")
    return key


def _parse(content: bytes) -> dict[str, Any]:
    try:
        reply = json.loads(content)
    except (ValueError, RecursionError):
        raise BadAnswer(f"the answer is not JSON: {content[:60].decode(errors='replace')!r}") from None
    if not isinstance(reply, dict):
        raise BadAnswer(f"the answer is a JSON {type(reply).__name__}, expected an object")
    return reply


def _server_message(content: bytes) -> str:
    """The server's own words, in one line. vLLM and OpenAI, SGLang, and FastAPI each have another place for them."""
    text = content.decode(errors="replace")
    with suppress(ValueError, RecursionError):
        reply = json.loads(text)
        if isinstance(reply, dict):
            error = reply.get("error")
            found = error.get("message") if isinstance(error, dict) else error
            text = str(found or reply.get("message") or reply.get("detail") or text)
    return " ".join(text.split())[:300] or "it gave no reason"


def _reason(error: Exception) -> str:
    if isinstance(error, http.client.IncompleteRead):
        return f"cut off after {len(error.partial)} bytes"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _seconds(retry_after: str) -> float:
    """Retry-After holds seconds or a date."""
    if re.fullmatch(r"\d{1,9}(\.\d*)?", retry_after):
        return float(retry_after)
    with suppress(ValueError, TypeError, IndexError):
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    return 0.0


def _backoff(attempt: int) -> float:
    """Seconds to wait after failure `attempt` (from 0); random, so that threads do not come back all at once."""
    return min(FIRST_WAIT_S * 2.0 ** min(attempt, 20), LONGEST_WAIT_S) * random.uniform(0.5, 1.0)


class _Pace:
    """Spaces the starts of requests, over all threads."""

    def __init__(self, requests_per_second: float | None) -> None:
        self._interval = 1 / requests_per_second if requests_per_second else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        """Return when a request may start, or `stop` is set."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._interval
        if start > now:
            stop.wait(start - now)

    def hold(self, seconds: float) -> None:
        """No request starts for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


@dataclass
class _Patience:
    """Measures how long the server is gone, over all threads, and says so once."""

    base_url: str
    limit_s: float
    notify: Callable[[str], None]
    outages: int = 0
    _since: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def served(self, started: float) -> None:
        """The server gave a usable answer to a request that was sent at monotonic time `started`."""
        with self._lock:
            since = self._since
            if since is None or started < since:  # an answer that was still under way does not say that it is back
                return
            self._since = None
        self.notify(f"{self.base_url} answers again, after {time.monotonic() - since:.0f} s.")

    def denied(self, why: str, retry_after: float) -> None:
        """The server cannot be used now.

        Raises:
            DataError: It could not be used for too long, or will not be.
        """
        now = time.monotonic()
        with self._lock:
            first = self._since is None
            since = self._since = now if self._since is None else self._since
            self.outages += first
        if now - since > self.limit_s or retry_after > self.limit_s:
            asks = f" and asks to wait {retry_after:.0f} s" if retry_after > self.limit_s else ""
            raise DataError(
                f"{self.base_url} has not answered for {now - since:.0f} s ({why}){asks}, expected it back within "
                f"give_up_after_s: {self.limit_s:g}. What was answered is kept: start the server and run the same "
                "command again."
            ) from None
        if first:
            self.notify(f"{self.base_url} does not answer ({why}); waiting for it, up to {self.limit_s:g} s.")
