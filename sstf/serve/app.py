"""The HTTP side: routes, streams, and who may come in. Decoding is left to `worker`, forms to `protocol`."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sstf.data.chat_template import render_prompt
from sstf.decode import Generation, Step
from sstf.decode.text_stream import TextStream
from sstf.errors import DataError
from sstf.serve.metrics import Metrics
from sstf.serve.protocol import (
    ENDPOINTS,
    Answer,
    ApiError,
    ChatRequest,
    CompletionRequest,
    Kind,
    read_request,
)
from sstf.serve.worker import Failed, Gone, Job, Worker
from sstf.types import SamplingParams

MAX_BODY = 2 * 2**20  # bytes; a context of 128k tokens has less
BODY_S = 30.0  # a client who takes longer to send its body is sent away
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
GONE = 499  # nginx's status for a client that left; nobody receives it

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Piece = tuple[str, list[int], str | None]  # text, its token ids, and why the answer ends if it is the last
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def make_app(
    worker: Worker, metrics: Metrics, keys: tuple[str, ...] = (), longest: int | None = None, loopback: bool = True
) -> Guard:
    """The ASGI application.

    Args:
        worker: decodes; its decoder's target gives the model's name.
        metrics: what `/metrics` tells.
        keys: one of them must be sent as bearer; none is needed if there are none.
        longest: answer, in tokens; None is what the context leaves.
        loopback: a request's Host must name this machine, so that no web page can get in by a name of its own.
    """
    api = _Api(worker, metrics, longest)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # the pages would load scripts from elsewhere
    app.add_api_route("/health", api.health, methods=["GET"])
    app.add_api_route("/metrics", api.metrics, methods=["GET"])
    app.add_api_route("/v1/models", api.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", api.model, methods=["GET"])
    app.add_api_route(ENDPOINTS["chat"], api.chat, methods=["POST"], response_model=None)
    app.add_api_route(ENDPOINTS["completion"], api.completion, methods=["POST"], response_model=None)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_bug)
    return Guard(app, metrics, keys, loopback and not keys, worker.log)


# ---- who may come in -------------------------------------------------------------------------------------------------


class Guard:
    """Around the application: keys, sizes, times, and counting what was answered. A bug goes to `log`, no further."""

    def __init__(
        self, app: FastAPI, metrics: Metrics, keys: tuple[str, ...], check_host: bool, log: Callable[[str], None]
    ) -> None:
        self.app, self.metrics, self.check_host, self.log = app, metrics, check_host, log
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self.paths = {"/health", "/metrics", "/v1/models", *ENDPOINTS.values()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                scope["sstf.client"] = self._client(scope)
                await self.app(scope, _limited(scope, receive), watched)
            except ApiError as error:
                await _error(error)(scope, receive, watched)
        except ClientDisconnect:
            status = GONE
        except Exception:  # it was answered by `_answer_bug`
            self.log(traceback.format_exc())
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, str(status)).inc()

    def _client(self, scope: Scope) -> str:
        """Whose turn a request is: a key's, and an address's. Raises ApiError if it may not come in."""
        headers = dict(scope["headers"])
        address = scope["client"][0] if scope.get("client") else ""
        if self.check_host:
            name = headers.get(b"host", b"").decode("latin-1").lower()
            bare = name if name.endswith("]") else name.rsplit(":", 1)[0]
            if bare not in LOOPBACK_NAMES:
                raise ApiError(403, "this server answers to 127.0.0.1 and localhost only, not to other names of it")
        if not self.digests or scope["path"] == "/health":
            return address
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        known = [hmac.compare_digest(digest, expected) for expected in self.digests]  # all of them, in constant time
        if scheme.lower() != b"bearer" or not any(known):
            raise ApiError(
                401,
                "the API key is missing or wrong; send `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return f"{known.index(True)} {address}"


def _limited(scope: Scope, receive: Receive) -> Receive:
    """`receive` that ends a body which is too long, or too slow, before it is in memory."""
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    too_long = ApiError(413, f"the body is longer than {MAX_BODY:,} bytes; send a shorter prompt")
    if not declared.isdigit() or int(declared[:18]) > MAX_BODY:
        raise too_long
    size, done = 0, False
    deadline = time.monotonic() + BODY_S

    async def limited() -> MutableMapping[str, Any]:
        nonlocal size, done
        if done:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body was not there after {BODY_S:g} seconds; send it in one piece") from None
        size += len(message.get("body", b""))
        done = not message.get("more_body", False)
        if size > MAX_BODY:
            raise too_long
        return message

    return limited


def _error(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, dict(error.headers or {}))


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error(error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    return _error(ApiError(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}"))


async def _answer_bug(request: Request, error: Exception) -> Response:
    return _error(ApiError(500, "the server failed on this request; see its log"))


# ---- routes ----------------------------------------------------------------------------------------------------------


class _Api:
    def __init__(self, worker: Worker, metrics: Metrics, longest: int | None) -> None:
        self.worker, self.counts, self.longest = worker, metrics, longest
        self.target = worker.decoder.target
        self.name, self.started = self.target.spec.name, int(time.time())
        # A long prompt takes long to tokenise; one thread, since tokenizers are not made for several.
        self.tokenising = ThreadPoolExecutor(1, "tokenise")

    async def health(self) -> Response:
        alive = self.worker.alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    async def metrics(self) -> Response:
        return Response(self.counts.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> dict[str, Any]:
        self._check_name(name)
        return self._card()

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "sstf",
            "max_model_len": self.worker.capacity,
        }

    async def chat(self, request: Request) -> Response:
        body = read_request(ChatRequest, await _body(request))
        if body.max_tokens and body.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens are the same; send one of them", "max_tokens")
        limit = body.max_tokens or body.max_completion_tokens
        messages = [message.message() for message in body.messages]
        return await self._answer(request, body, limit, lambda: render_prompt(self.target.tokenizer, messages))

    async def completion(self, request: Request) -> Response:
        body = read_request(CompletionRequest, await _body(request))
        return await self._answer(request, body, body.max_tokens or 16, lambda: self._ids(body.text_or_ids))

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            ids: list[int] = self.target.tokenizer.encode(prompt)
            return ids
        size = self.target.spec.vocab_size
        if prompt and max(prompt) >= size:
            raise ApiError(400, f"prompt: token id {max(prompt)} is not in the vocabulary of {size}", "prompt")
        return prompt

    def _check_name(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404, f"the model {name[:100]!r} does not exist; this server has {self.name}", "model", "model_not_found"
            )

    async def _answer(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        limit: int | None,
        tokenise: Callable[[], list[int]],
    ) -> Response:
        arrived = time.perf_counter()
        self._check_name(body.model)
        if others := set(body.stop_token_ids) - self.target.end_tokens:
            raise ApiError(
                400,
                f"stop_token_ids: {min(others)} does not end this model's answers; expected none but "
                f"{sorted(self.target.end_tokens)}",
                "stop_token_ids",
            )
        try:
            prompt = await asyncio.get_running_loop().run_in_executor(self.tokenising, tokenise)
        except DataError as error:  # the chat template refuses the turns
            raise ApiError(400, str(error), "messages") from None
        params = SamplingParams(
            body.temperature,
            body.top_p,
            max(0, body.top_k),
            self._room(prompt, limit),
            body.seed if body.seed is not None else secrets.randbits(62),
            body.stop_strings,
        )
        job = Job(request.scope["sstf.client"], prompt, params, arrived)
        kind: Kind = "chat" if isinstance(body, ChatRequest) else "completion"
        answer = Answer(kind, self.name, len(prompt), prompt if body.return_token_ids else None)
        stream = TextStream(self.target.tokenizer, params.stop, body.skip_special_tokens)
        if not self.worker.submit(job):
            raise ApiError(
                429,
                f"{self.worker.waiting.limit} requests are waiting already; come back later",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        pieces = self._pieces(request, job, answer, stream)
        if not body.stream:
            async with aclosing(pieces):
                collected = [piece async for piece in pieces]
            text, reason = "".join(text for text, _, _ in collected), collected[-1][2]
            return JSONResponse(answer.whole(text, reason or "stop"))
        try:
            first = await anext(pieces)  # what fails before the first token fails with a status
        except BaseException:
            await pieces.aclose()
            raise
        usage = body.stream_options.include_usage
        return StreamingResponse(_stream(first, pieces, answer, usage), media_type="text/event-stream")

    def _room(self, prompt: list[int], limit: int | None) -> int:
        """How many tokens the answer may have."""
        capacity = self.worker.capacity
        longest = min(self.longest or capacity, capacity - len(prompt))
        if not prompt:
            raise ApiError(400, "the prompt has no tokens; send at least one", "prompt")
        if longest < 1:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens, and the context of {capacity} must also hold an answer; shorten "
                "it",
                code="context_length_exceeded",
            )
        if limit and limit > longest:
            raise ApiError(
                400,
                f"max_tokens is {limit} and the prompt has {len(prompt)} tokens; expected at most {longest} for the "
                f"answer (the context has {capacity})",
                "max_tokens",
                "context_length_exceeded",
            )
        return limit or longest

    async def _pieces(
        self, request: Request, job: Job, answer: Answer, stream: TextStream
    ) -> AsyncGenerator[Piece, None]:
        """Of an answer. Whatever happens, the job is over when they end."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            job.events.put_nowait(Gone())

        watching = asyncio.create_task(watch())
        ends = self.target.end_tokens
        try:
            while True:
                event = await job.events.get()
                if isinstance(event, Step):
                    answer.token_ids += event.tokens
                    # An end token is no text, even where it has one.
                    shown = event.tokens[:-1] if event.tokens[-1] in ends else event.tokens
                    yield stream.push(shown), event.tokens, None
                elif isinstance(event, Generation):
                    reason = "length" if event.ended == "length" else "stop"
                    yield stream.finish(event.ended == "stop"), [], reason
                    return
                elif isinstance(event, Failed):
                    raise ApiError(event.status, event.message)
                else:
                    raise ApiError(GONE, "the client has left")
        finally:
            watching.cancel()
            self.worker.cancel(job)


async def _body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which no web page can send without being allowed to
        raise ApiError(415, "the body must be JSON, with Content-Type: application/json")
    return await request.body()


async def _stream(first: Piece, pieces: AsyncGenerator[Piece, None], answer: Answer, usage: bool) -> AsyncIterator[str]:
    """Server-sent events."""

    def event(data: dict[str, Any]) -> str:
        return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"

    nothing: dict[str, Any] = {"usage": None} if usage else {}
    try:
        text, ids, reason = first
        yield event(answer.chunk(text, ids, True, reason) | nothing)
        async for text, ids, reason in pieces:
            if text or reason or answer.prompt_ids is not None:
                yield event(answer.chunk(text, ids, False, reason) | nothing)
        if usage:
            yield event(answer.last_chunk())
    except ApiError as error:  # too late for a status
        yield event(error.body())
    finally:
        await pieces.aclose()
    yield "data: [DONE]\n\n"
