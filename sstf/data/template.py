"""One target's chat template: renders it, and finds out by rendering probes where an assistant turn ends.

Templates are programs; what they do with an answer is asked of them, not guessed from their source. Three probes:

1. an answer: what follows it is the tail of a turn, and the first special token of the tail ends generation
   (`Hello<|im_end|>\\n`: the tail is `<|im_end|>\\n`, the marker `<|im_end|>`);
2. a tool call: the same, but the template may close its own brackets and tags before the marker, and some of those are
   special tokens; so the marker is the one that ends answers, or the tokenizer's end token, wherever it comes first;
3. an answer with reasoning: whether a field carries it, and what the template writes around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from sstf.data.rows import REASONING_KEYS
from sstf.data.tool_calls import call_to_json
from sstf.errors import DataError
from sstf.types import Message, Mode, ToolCall

_REQUEST = {"role": "user", "content": "SSTF-REQUEST"}
_ANSWER = "SSTF-ANSWER"
_REASONING = "SSTF-REASONING"
# Nine letters and digits: Mistral's templates accept no other identity of a call.
_CALL = ToolCall("sstf_function", {"sstf_argument": _ANSWER}, "sstfcall1")
_TOOL = {
    "type": "function",
    "function": {
        "name": _CALL.name,
        "description": "A function.",
        "parameters": {
            "type": "object",
            "properties": {"sstf_argument": {"type": "string", "description": "A text."}},
            "required": ["sstf_argument"],
        },
    },
}


@dataclass(frozen=True)
class TurnEnd:
    """How the template ends a turn: `tail` follows what was said, its first `marker` characters end generation."""

    tail: str
    marker: int


@dataclass(frozen=True)
class ReasoningFrame:
    """What surrounds reasoning in generated text: `opening` (empty if the prompt ends with it), then `closing`."""

    opening: str
    closing: str


def chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The template of a tokenizer, probed once.

    Raises:
        DataError: There is none.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"The tokenizer of {tokenizer.name_or_path or 'the target'} has no chat template; use an instruction-tuned "
            "target, or put its chat_template.jinja beside the tokenizer files."
        )
    return _probed(tokenizer, str(tokenizer.chat_template))


class ChatTemplate:
    """Get one from `chat_template(tokenizer)`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        self._tokenizer = tokenizer
        self._source = source
        self._special = special_strings(tokenizer)
        self._frames: dict[Mode | None, ReasoningFrame | None] = {}

    def text(
        self,
        messages: Sequence[Message],
        generation_prompt: bool,
        tools: Sequence[dict[str, Any]] = (),
        mode: Mode | None = None,
    ) -> str:
        """The template's text of `messages`.

        Raises:
            DataError: The template refuses them.
        """
        return self._apply([self.message(m) for m in messages], generation_prompt, tools, mode)

    def message(self, message: Message) -> dict[str, Any]:
        """A message as templates expect it: OpenAI's form, with arguments as objects.

        Raises:
            DataError: It has reasoning, and the template has no place for it.
        """
        chat: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning is not None:
            if self.reasoning_key is not None:
                chat[self.reasoning_key] = message.reasoning
            elif "</think>" in self._source:
                # Such a template takes reasoning as part of the content, or drops it, which the caller finds out.
                chat["content"] = f"<think>\n{message.reasoning}\n</think>\n\n{message.content}"
            else:
                raise DataError(
                    "An answer carries reasoning, and the chat template has no place for it: the target does not "
                    "think before it answers. Use answers.kind=regenerate on rows without reasoning, or another target."
                )
        if message.tool_calls:
            chat["tool_calls"] = [call_to_json(call) for call in message.tool_calls]
        if message.tool_call_id is not None:
            chat["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            chat["name"] = message.name
        return chat

    def turn_end(self, message: Message) -> TurnEnd:
        """How the template ends this assistant message."""
        return self._call_end if message.tool_calls else self._answer_end

    def split_reasoning(self, text: str, mode: Mode | None) -> Message:
        """A generated text as the message that an engine would put into the history.

        A text that was cut while the target was thinking is all reasoning. Where the template takes reasoning as part
        of the content, the text stays whole.
        """
        frame = self._frame(mode)
        body = text.lstrip()
        if frame is None or not body.startswith(frame.opening):
            return Message("assistant", text)
        thought, _, answer = body.removeprefix(frame.opening).partition(frame.closing)
        return Message("assistant", answer.lstrip("\n"), reasoning=thought.strip() or None)

    @cached_property
    def reasoning_key(self) -> str | None:
        """The field in which the template takes reasoning; None when it knows no such field."""
        for key in REASONING_KEYS:
            answer = {"role": "assistant", "content": _ANSWER, key: _REASONING}
            if _REASONING in self._apply([_REQUEST, answer], generation_prompt=False):
                return key
        return None

    @cached_property
    def _answer_end(self) -> TurnEnd:
        answer = {"role": "assistant", "content": _ANSWER}
        _, found, tail = self._apply([_REQUEST, answer], generation_prompt=False).rpartition(_ANSWER)
        if not found:
            raise DataError("The chat template does not write the assistant's text; use the target's own template.")
        # The FIRST special token after the content is where generation stops; a template may write more after it.
        at, marker = self._first(tail, self._special)
        return TurnEnd(tail, at + len(marker))

    @cached_property
    def _call_end(self) -> TurnEnd:
        call = {"role": "assistant", "content": "", "tool_calls": [call_to_json(_CALL)]}
        _, found, tail = self._apply([_REQUEST, call], generation_prompt=False, tools=[_TOOL]).rpartition(_ANSWER)
        if not found:
            raise DataError(
                "The chat template does not write tool calls, so the target was not made for them; leave such "
                "conversations out, or use a target whose template has tool calls."
            )
        answer_end = self._answer_end
        ends = [s for s in self._special if s == self._tokenizer.eos_token or s in answer_end.tail[: answer_end.marker]]
        at, marker = self._first(tail, ends)
        if not marker:
            # A marker of its own for calls (Llama's `<|eom_id|>`, gpt-oss' `<|call|>`): nothing special comes after it.
            at, marker = max(((tail.rfind(s), s) for s in self._special if s in tail), default=(len(tail.rstrip()), ""))
        return TurnEnd(tail[at:], len(marker))

    def _frame(self, mode: Mode | None) -> ReasoningFrame | None:
        if mode not in self._frames:
            self._frames[mode] = self._probe_frame(mode)
        return self._frames[mode]

    def _probe_frame(self, mode: Mode | None) -> ReasoningFrame | None:
        if self.reasoning_key is None:
            return None
        answer = {"role": "assistant", "content": _ANSWER, self.reasoning_key: _REASONING}
        prompt = self._apply([_REQUEST], generation_prompt=True, mode=mode)
        full = self._apply([_REQUEST, answer], generation_prompt=False, mode=mode)
        if not full.startswith(prompt):
            return None  # this mode does not think
        opening, _, rest = full[len(prompt) :].partition(_REASONING)
        closing, found, _ = rest.partition(_ANSWER)
        return ReasoningFrame(opening.strip(), closing.strip()) if found and closing.strip() else None

    def _first(self, text: str, markers: Sequence[str]) -> tuple[int, str]:
        """Where the first of the markers begins, and which it is: the longest of those that begin there."""
        found = [(text.find(marker), -len(marker), marker) for marker in markers if marker in text]
        at, _, marker = min(found, default=(0, 0, ""))
        return at, marker

    def _apply(
        self,
        chat: list[dict[str, Any]],
        generation_prompt: bool,
        tools: Sequence[dict[str, Any]] = (),
        mode: Mode | None = None,
    ) -> str:
        variables: dict[str, Any] = {} if mode is None else {"enable_thinking": mode == "thinking"}
        try:
            text = self._tokenizer.apply_chat_template(
                chat, tools=list(tools) or None, tokenize=False, add_generation_prompt=generation_prompt, **variables
            )
        except (TemplateError, TypeError, ValueError) as error:  # the latter two from expressions in the template
            roles = ", ".join(message["role"] for message in chat)
            raise DataError(f"The chat template refuses the turns ({roles}): {error}") from error
        assert isinstance(text, str)
        return text


def special_strings(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of every special token, end-of-turn markers among them, without repeats."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


@lru_cache(maxsize=4)
def _probed(tokenizer: PreTrainedTokenizerBase, source: str) -> ChatTemplate:
    return ChatTemplate(tokenizer, source)
