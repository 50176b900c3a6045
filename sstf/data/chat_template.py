"""Conversation -> token ids and loss mask, through the target's own chat template.

The mask comes from rendered boundaries, never from searching for role markers in the ids. For every assistant turn k

    prompt = template(messages[:k], add_generation_prompt=True)     what the engine is asked
    full   = template(messages[:k + 1])                             what the engine's history will hold

`prompt` must be a prefix of `full`: what lies between is what the target generates (its reasoning, its text, its tool
calls, and the end-of-turn marker), and all of that is trained. A template that writes something else there (an empty
think block before an answer that has none, no reasoning, no calls) is refused: no mask over its text is right.

Each piece is tokenised by itself, as in serving, where the prompt is tokenised and answer tokens follow one by one:

| piece    | `<im_start>user\\nHi<im_end>\\n<im_start>assistant\\n` | `Hello<im_end>` | `\\n<im_start>user\\n...` |
|---|---|---|---|
| trained  | no | yes, the end token included | no |

With all answers in one sample (`turns: every`), `full` must be a prefix of the next prompt as well. Templates that drop
earlier reasoning break that; `each` and `last` render every trained turn with its own history, as an engine does.

A sample ends with its last answer: what the template writes after it can never be trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from sstf.data.answers import Answer
from sstf.data.config import Turns
from sstf.data.template import TurnEnd, chat_template
from sstf.errors import DataError
from sstf.types import Conversation, Message, Mode, TokenSample

_SENTINEL = "SSTF-USER-TEXT"


@dataclass(frozen=True)
class Segment:
    """Ids of one piece of a conversation: the template's and the user's text, or (`trained`) one answer."""

    token_ids: tuple[int, ...]
    trained: bool


class TurnRenderer:
    """Renders one conversation turn by turn; generation asks, takes an answer, and asks again.

    Usage: `ask(messages before an answer)`, then `take(ids)` or `keep(messages up to the answer)`, repeated.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        tools: Sequence[dict[str, Any]] = (),
        mode: Mode | None = None,
    ) -> None:
        self.segments: list[Segment] = []
        self._tokenizer = tokenizer
        self._template = chat_template(tokenizer)
        self._name, self._tools, self._mode = name, tools, mode
        self._rendered = ""  # the template's text so far
        self._done = 0  # characters of it whose ids are in `segments`
        self._asked = 0  # messages before the current answer
        self._answer: Answer | None = None  # taken, but not yet found in the template's text
        self._unmarked_end: int | None = None

    def ask(self, messages: Sequence[Message]) -> list[int]:
        """Add the context up to the point where the assistant writes; returns all ids so far, the engine's prompt.

        Assistant turns that were neither kept nor taken are context.
        """
        if self._answer is not None:
            self._place(messages[: self._asked + 1], self._answer)
        prompt = self._text(messages, generation_prompt=True)
        self._require_prefix(
            self._rendered,
            prompt,
            f"turn {len(messages)}: the history is not kept when a later turn is added",
            "Use a template that leaves earlier turns as they are, data.turns=each (every answer in a sample of its "
            "own, with the history as an engine renders it), or data.turns=last (the last answer alone)",
        )
        context = _tokenise(self._tokenizer, prompt[self._done :])
        if self._unmarked_end is not None and context[:1] == [self._unmarked_end]:
            # A template without an end-of-turn marker: the role marker that ended the answer opens the next turn.
            context = context[1:]
        self._unmarked_end = None
        self.segments.append(Segment(tuple(context), trained=False))
        self._rendered, self._done, self._asked = prompt, len(prompt), len(messages)
        return self.token_ids()

    def take(self, answer: Answer) -> None:
        """Add a generated answer by its ids."""
        self.segments.append(Segment(answer.token_ids, trained=True))
        # Its place in the text is needed by a next turn only; most conversations have none.
        self._answer = answer

    def keep(self, messages: Sequence[Message]) -> None:
        """Add the answer that ends `messages` by its text, up to and including the end-of-turn marker."""
        prompt = self._rendered
        _, end = self._find(messages)
        self.segments.append(Segment(tuple(_tokenise(self._tokenizer, self._rendered[len(prompt) : end])), True))
        self._done = end

    def token_ids(self) -> list[int]:
        """All ids so far."""
        return [token for segment in self.segments for token in segment.token_ids]

    def loss_mask(self) -> list[bool]:
        """True where the id belongs to an answer."""
        return [segment.trained for segment in self.segments for _ in segment.token_ids]

    def _text(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        try:
            return self._template.text(messages, generation_prompt, self._tools, self._mode)
        except DataError as error:
            raise DataError(f"{self._name}: {error}") from error

    def _turn_end(self, message: Message) -> TurnEnd:
        try:
            return self._template.turn_end(message)
        except DataError as error:
            raise DataError(f"{self._name}: {error}") from error

    def _place(self, messages: Sequence[Message], answer: Answer) -> None:
        text_end, marker_end = self._find(messages)
        # A cut answer has no end token, so the marker is the template's: context, not trained.
        self._done = marker_end if answer.finished else text_end
        if answer.finished and marker_end == text_end:
            self._unmarked_end = answer.token_ids[-1]
        self._answer = None

    def _find(self, messages: Sequence[Message]) -> tuple[int, int]:
        """Advance the text over the answer that ends `messages`: where its own text and its end marker end."""
        prompt, full = self._rendered, self._text(messages, generation_prompt=False)
        self._require_prefix(
            prompt,
            full,
            f"turn {len(messages)}: the prompt is not a prefix of the answered turn",
            "Use a template whose history holds answers as they were generated; where it thinks by default, rows may "
            "say their `mode` (plain or thinking)",
        )
        self._rendered = full
        end = self._turn_end(messages[-1])
        text_end = len(full) - len(end.tail)
        if not full.endswith(end.tail) or text_end < len(prompt):
            raise DataError(
                f"{self._name}, turn {len(messages)}: the chat template ends this turn with {full[-40:]!r}, expected "
                f"{end.tail!r} as after other answers; no end of the answer can be told from it."
            )
        self._check(messages[-1], full[len(prompt) : text_end], len(messages))
        return text_end, text_end + end.marker

    def _check(self, message: Message, written: str, turn_number: int) -> None:
        """The template wrote what the assistant said: nothing is missing, and to plain answers nothing is added."""
        content = self._template.message(message)["content"]
        place = f"{self._name}, turn {turn_number}"
        separate = message.reasoning is not None and content == message.content
        if not message.tool_calls and not separate:
            if written.strip() != content.strip():
                raise DataError(
                    f"{place}: the chat template does not put the answer right after the prompt: expected "
                    f"{content.strip()[:40]!r}, the template wrote {written.lstrip()[:40]!r}. Use a template whose "
                    "history holds answers as they were generated; where it adds an empty think block, rows need "
                    "`mode: plain`."
                )
            return
        parts = [("reasoning", message.reasoning or "")] if separate else []
        parts += [("text", content), *(("call of the tool", call.name) for call in message.tool_calls)]
        position = 0
        for what, part in parts:
            at = written.find(part.strip(), position)
            if at < 0:
                raise DataError(
                    f"{place}: the chat template leaves out the answer's {what} {part.strip()[:40]!r}, which would not "
                    "be trained; use a template that writes it, or leave such conversations out."
                )
            position = at + len(part.strip())

    def _require_prefix(self, shorter: str, longer: str, problem: str, remedy: str) -> None:
        if longer.startswith(shorter):
            return
        pairs = enumerate(zip(shorter, longer, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(shorter), len(longer)))
        raise DataError(
            f"{self._name}, {problem}. The chat template's texts differ at character {at}: "
            f"{shorter[at : at + 40]!r} became {longer[at : at + 40]!r}. No loss mask over them is right. {remedy}."
        )


def render(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    max_length: int | None,
    system_prompt: str | None = None,
    answers: Sequence[Answer | None] | None = None,
) -> TokenSample:
    """Token ids and loss mask of one conversation, all its answers in one sample.

    Args:
        tokenizer: With a chat template.
        conversation: At least one assistant turn.
        max_length: In tokens; the rest is cut off. None keeps all.
        system_prompt: For conversations without one.
        answers: Ids of the assistant turns in order, when they were generated (see `answers`); None for a turn that was
            not, which is context.

    Returns:
        Equal-length ids and mask, ending with the last answer.

    Raises:
        DataError: The template is missing, refuses the conversation, or changes earlier text.
    """
    conversation = with_system_prompt(conversation, system_prompt)
    renderer = _renderer(tokenizer, conversation)
    for turn, answer in _trained_turns(conversation, answers):
        _add(renderer, conversation.messages, turn, answer)
    return TokenSample(conversation.id, renderer.token_ids()[:max_length], renderer.loss_mask()[:max_length])


def render_turns(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    turns: Turns,
    answers: Sequence[Answer | None] | None = None,
) -> list[TokenSample]:
    """The samples of one conversation: one for `every` and `last`, one an answer for `each`.

    Args:
        tokenizer: With a chat template.
        conversation: With its system prompt.
        turns: See `DataConfig`.
        answers: As for `render`.

    Returns:
        Uncut samples; those of `each` are named `<id>#<assistant turn, from 1>`. A conversation without an answer gives
        one empty sample, so that whoever counts samples does not lose it.

    Raises:
        DataError: The template is missing, refuses the conversation, or (`every`) changes earlier text.
    """
    trained = _trained_turns(conversation, answers)
    if turns == "every" or not trained:
        return [render(tokenizer, conversation, None, answers=answers)]
    numbers = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    samples = []
    for turn, answer in trained if turns == "each" else trained[-1:]:
        renderer = _renderer(tokenizer, conversation)
        _add(renderer, conversation.messages, turn, answer)
        name = f"{conversation.id}#{numbers.index(turn) + 1}" if turns == "each" else conversation.id
        samples.append(TokenSample(name, renderer.token_ids(), renderer.loss_mask()))
    return samples


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] = (),
    mode: Mode | None = None,
) -> list[int]:
    """Ids of a request, tokenised whole as a chat server does it: `messages` and the generation prompt."""
    return _tokenise(tokenizer, chat_template(tokenizer).text(messages, True, tools, mode))


def user_turn_prefix(tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None) -> list[int]:
    """Ids of the template up to the point where the user's text begins; what follows is a request."""
    request = Conversation("user turn", (Message("user", _SENTINEL),), "")
    messages = with_system_prompt(request, system_prompt).messages
    text, found, _ = chat_template(tokenizer).text(messages, generation_prompt=False).partition(_SENTINEL)
    if not found:
        raise DataError("The chat template does not write the user's text, so the target cannot write requests.")
    return _tokenise(tokenizer, text)


def with_system_prompt(conversation: Conversation, system_prompt: str | None) -> Conversation:
    """Put `system_prompt` first unless it is None or the conversation has a system message of its own."""
    if system_prompt is None or conversation.messages[0].role == "system":
        return conversation
    return replace(conversation, messages=(Message("system", system_prompt), *conversation.messages))


def _renderer(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> TurnRenderer:
    return TurnRenderer(tokenizer, conversation.id, conversation.tools, conversation.mode)


def _trained_turns(
    conversation: Conversation, answers: Sequence[Answer | None] | None
) -> list[tuple[int, Answer | None]]:
    """Where the answers to train stand among the messages, and their ids; without ids their text is trained."""
    turns = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    if answers is None:
        return [(turn, None) for turn in turns]
    return [(turn, answer) for turn, answer in zip(turns, answers, strict=True) if answer is not None]


def _add(renderer: TurnRenderer, messages: Sequence[Message], turn: int, answer: Answer | None) -> None:
    renderer.ask(messages[:turn])
    if answer is None:
        renderer.keep(messages[: turn + 1])
    else:
        renderer.take(answer)


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The template writes special tokens itself. Long texts are cut later, so the length warning would mislead.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
