"""OpenAI's protocol: requests checked and read, answers and errors written.

https://platform.openai.com/docs/api-reference/chat and .../completions. Beside OpenAI's fields, those of vLLM that
`sstf data` sends are taken: `top_k`, `return_token_ids`, `stop_token_ids`, `skip_special_tokens`. What this server
cannot do is refused by name, never left out in silence; null stands for a field that is not there.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sstf.types import Message

ENDPOINTS = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}
Kind = Literal["chat", "completion"]

# Fields that change an answer in ways that are not built here, and the values (as JSON) that ask for nothing.
REFUSED: dict[str, tuple[str, ...]] = {
    "n": ("1",),
    "best_of": ("1",),
    "echo": ("false",),
    "logprobs": ("false",),
    "top_logprobs": (),
    "prompt_logprobs": (),
    "suffix": ('""',),
    "tools": ("[]",),
    "tool_choice": ('"none"', '"auto"'),
    "functions": ("[]",),
    "function_call": ('"none"', '"auto"'),
    "parallel_tool_calls": ("true", "false"),
    "response_format": ('{"type": "text"}',),
    "logit_bias": ("{}",),
    "frequency_penalty": ("0", "0.0"),
    "presence_penalty": ("0", "0.0"),
    "repetition_penalty": ("1", "1.0"),
    "min_p": ("0", "0.0"),
    "min_tokens": ("0",),
    "ignore_eos": ("false",),
    "modalities": ('["text"]',),
}
IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier"})  # say nothing of the answer

Id = Annotated[int, Field(ge=0)]
StopString = Annotated[str, Field(min_length=1, max_length=200)]  # the decoder looks for it at every token


class ApiError(Exception):
    """An answer other than 200, in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# ---- requests --------------------------------------------------------------------------------------------------------


class _Form(BaseModel):
    # Strict: a number in quotes is a mistake that a client should hear of.
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class TextPart(_Form):
    """A part of a message; images and audio are refused."""

    type: Literal["text"]
    text: str


class ChatMessage(_Form):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def message(self) -> Message:
        """As the project's own."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return Message(self.role, text, name=self.name)


class StreamOptions(_Form):
    """`include_usage`: a last chunk with the numbers of tokens."""

    include_usage: bool = False


class GenerateRequest(_Form):
    """What both kinds of request share. Defaults are OpenAI's."""

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)  # 0 and -1 are off
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = False
    stop_token_ids: list[Id] = []
    skip_special_tokens: bool = True

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, neutral in REFUSED.items():
            if data.get(name) is not None and json.dumps(data[name]) not in neutral:
                hint = f" (only {' or '.join(neutral)}, which asks for nothing)" if neutral else ""
                raise ValueError(f"{name} is not supported by this server{hint}; leave it out")
        return {key: value for key, value in data.items() if key not in REFUSED and key not in IGNORED}

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """However many."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatRequest(GenerateRequest):
    """To `/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)


class CompletionRequest(GenerateRequest):
    """To `/v1/completions`. The prompt is a text or token ids, of one prompt."""

    prompt: str | list[Id] | Annotated[list[str], Field(max_length=1)] | Annotated[list[list[Id]], Field(max_length=1)]

    @property
    def text_or_ids(self) -> str | list[int]:
        """Without the list around it."""
        if isinstance(self.prompt, str):
            return self.prompt
        ids = [token for token in self.prompt if isinstance(token, int)]
        return next((inner for inner in self.prompt if not isinstance(inner, int)), ids)


AnyRequest = TypeVar("AnyRequest", ChatRequest, CompletionRequest)


def read_request(form: type[AnyRequest], body: bytes) -> AnyRequest:
    """Check a request.

    Raises:
        ApiError: 400, with what is wrong and where.
    """
    try:
        return form.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        # Where a field has several forms, the one that was meant is the one that was followed furthest.
        first = max((one for one in errors if one["loc"][:1] == errors[0]["loc"][:1]), key=lambda one: len(one["loc"]))
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in _names(form))
        if first["type"] == "json_invalid":
            said = f"the body is no JSON: {first['msg'].removeprefix('Invalid JSON: ')}"
        elif first["type"] == "extra_forbidden":
            where = ".".join(str(part) for part in first["loc"])[:100]
            said = f"{where}: this field is not known here; leave it out"
        else:
            said = first["msg"].removeprefix("Value error, ")
            said = f"{where}: {said}" if where else said
        raise ApiError(400, said, where or None) from None


def _names(form: type[BaseModel]) -> set[str]:
    """Of fields: what else pydantic puts into a place are types."""
    return {*form.model_fields, *ChatMessage.model_fields, *TextPart.model_fields, *StreamOptions.model_fields}


# ---- answers ---------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """Of one request; its chunks and its whole form share an id.

    `prompt_ids` is there if token ids were asked for.
    """

    kind: Kind
    model: str
    prompt_tokens: int
    prompt_ids: list[int] | None = None
    token_ids: list[int] = field(default_factory=list)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, reason: str) -> dict[str, Any]:
        """The answer to a request without `stream`."""
        content: dict[str, Any] = {"text": text}
        if self.kind == "chat":
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        if self.prompt_ids is not None:
            content |= {"prompt_token_ids": self.prompt_ids, "token_ids": self.token_ids}
        return self._head("") | {"choices": [self._choice(content, reason)], "usage": self.usage()}

    def chunk(self, text: str, new_ids: list[int], first: bool = False, reason: str | None = None) -> dict[str, Any]:
        """A piece of a stream."""
        content: dict[str, Any] = {"text": text}
        if self.kind == "chat":
            delta = {"role": "assistant"} if first else {}
            content = {"delta": delta | ({"content": text} if text or first else {})}
        if self.prompt_ids is not None:
            content |= {"token_ids": new_ids} | ({"prompt_token_ids": self.prompt_ids} if first else {})
        return self._head(".chunk") | {"choices": [self._choice(content, reason)]}

    def last_chunk(self) -> dict[str, Any]:
        """The one with the usage alone."""
        return self._head(".chunk") | {"choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens; an end token counts, as one that was written."""
        new = len(self.token_ids)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
        }

    def _head(self, suffix: str) -> dict[str, Any]:
        prefix, name = ("chatcmpl", f"chat.completion{suffix}") if self.kind == "chat" else ("cmpl", "text_completion")
        return {"id": f"{prefix}-{self.id}", "object": name, "created": self.created, "model": self.model}

    @staticmethod
    def _choice(content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": reason}
