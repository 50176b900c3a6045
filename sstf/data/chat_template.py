"""Conversation -> token ids and loss mask, through the target's own chat template.

The mask comes from rendered boundaries, never from searching for role markers in the ids. For every assistant turn k

    prompt = template(messages[:k], add_generation_prompt=True)     what the engine is asked
    full   = template(messages[:k + 1])                             what the engine's history will hold

`prompt` must be a prefix of `full`, and `full` a prefix of the next prompt. A template that breaks this (it drops
earlier reasoning, or puts an empty think block before an answer) is refused: no mask over its text is right.

Each piece is tokenised by itself, as in serving, where the prompt is tokenised and answer tokens follow one by one:

| piece    | `<im_start>user\\nHi<im_end>\\n<im_start>assistant\\n` | `Hello<im_end>` | `\\n<im_start>user\\n...` |
|---|---|---|---|
| trained  | no | yes, the end token included | no |

A sample ends with its last answer: what the template writes after it can never be trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from sstf.data.answers import Answer
from sstf.errors import DataError
from sstf.types import Conversation, Message, TokenSample

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

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.segments: list[Segment] = []
        self._tokenizer = tokenizer
        self._name = name
        self._rendered = ""  # the template's text so far
        self._done = 0  # characters of it whose ids are in `segments`
        self._answer: Answer | None = None  # taken, but not yet found in the template's text
        self._unmarked_end: int | None = None

    def ask(self, messages: Sequence[Message]) -> list[int]:
        """Add the context up to the point where the assistant writes; returns all ids so far, the engine's prompt."""
        if self._answer is not None:
            self._place(messages, self._answer)
        prompt = _apply(self._tokenizer, messages, generation_prompt=True)
        self._require_prefix(
            self._rendered, prompt, f"turn {len(messages)}: the history is not kept when a later turn is added"
        )
        context = _tokenise(self._tokenizer, prompt[self._done :])
        if self._unmarked_end is not None and context[:1] == [self._unmarked_end]:
            # A template without an end-of-turn marker: the role marker that ended the answer opens the next turn.
            context = context[1:]
        self._unmarked_end = None
        self.segments.append(Segment(tuple(context), trained=False))
        self._rendered, self._done = prompt, len(prompt)
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

    def _place(self, messages: Sequence[Message], answer: Answer) -> None:
        last = max(i for i, message in enumerate(messages) if message.role == "assistant")
        content_end, marker_end = self._find(messages[: last + 1])
        # A cut answer has no end token, so the marker is the template's: context, not trained.
        self._done = marker_end if answer.finished else content_end
        if answer.finished and marker_end == content_end:
            self._unmarked_end = answer.token_ids[-1]
        self._answer = None

    def _find(self, messages: Sequence[Message]) -> tuple[int, int]:
        """Advance the text over the answer that ends `messages`: where its content and its end marker end."""
        turn_number = len(messages)
        prompt, full = self._rendered, _apply(self._tokenizer, messages, generation_prompt=False)
        self._require_prefix(prompt, full, f"turn {turn_number}: the prompt is not a prefix of the answered turn")
        self._rendered = full
        turn = full[len(prompt) :]
        content = messages[-1].content
        body = content.strip()
        start = len(turn) - len(turn.lstrip())
        if not turn.startswith(body, start):
            raise DataError(
                f"{self._name}, turn {turn_number}: the chat template does not put the answer right after the prompt: "
                f"expected {body[:40]!r}, the template wrote {turn[start : start + 40]!r}. "
                "Use a template whose history holds answers as they were generated."
            )
        content_end = start + len(body)
        trailing = content[len(content.rstrip()) :]
        if turn.startswith(trailing, content_end):
            content_end += len(trailing)
        marker_end = _first_special_end(self._tokenizer, turn, content_end)
        return len(prompt) + content_end, len(prompt) + (content_end if marker_end is None else marker_end)

    def _require_prefix(self, shorter: str, longer: str, problem: str) -> None:
        if longer.startswith(shorter):
            return
        pairs = enumerate(zip(shorter, longer, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(shorter), len(longer)))
        raise DataError(
            f"{self._name}, {problem}. The chat template's texts differ at character {at}: "
            f"{shorter[at : at + 40]!r} became {longer[at : at + 40]!r}. No loss mask over them is right; use a "
            "template that leaves earlier turns as they are."
        )


def render(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    max_length: int | None,
    system_prompt: str | None = None,
    answers: Sequence[Answer] | None = None,
) -> TokenSample:
    """Token ids and loss mask of one conversation.

    Args:
        tokenizer: With a chat template.
        conversation: At least one assistant turn.
        max_length: In tokens; the rest is cut off. None keeps all.
        system_prompt: For conversations without one.
        answers: Ids of the assistant turns in order, when they were generated; see `answers`.

    Returns:
        Equal-length ids and mask, ending with the last answer.

    Raises:
        DataError: The template is missing, refuses the conversation, or changes earlier text.
    """
    messages = with_system_prompt(conversation, system_prompt).messages
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    renderer = TurnRenderer(tokenizer, conversation.id)
    for turn, answer in zip(turns, answers if answers is not None else [None] * len(turns), strict=True):
        renderer.ask(messages[:turn])
        if answer is None:
            renderer.keep(messages[: turn + 1])
        else:
            renderer.take(answer)
    return TokenSample(conversation.id, renderer.token_ids()[:max_length], renderer.loss_mask()[:max_length])


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Ids of a request, tokenised whole as a chat server does it: `messages` and the generation prompt."""
    return _tokenise(tokenizer, _apply(tokenizer, messages, generation_prompt=True))


def user_turn_prefix(tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None) -> list[int]:
    """Ids of the template up to the point where the user's text begins; what follows is a request."""
    request = Conversation("user turn", (Message("user", _SENTINEL),), "")
    messages = with_system_prompt(request, system_prompt).messages
    text, found, _ = _apply(tokenizer, messages, generation_prompt=False).partition(_SENTINEL)
    if not found:
        raise DataError("The chat template does not write the user's text, so the target cannot write requests.")
    return _tokenise(tokenizer, text)


def with_system_prompt(conversation: Conversation, system_prompt: str | None) -> Conversation:
    """Put `system_prompt` first unless it is None or the conversation has a system message of its own."""
    if system_prompt is None or conversation.messages[0].role == "system":
        return conversation
    messages = (Message("system", system_prompt), *conversation.messages)
    return Conversation(conversation.id, messages, conversation.source)


def special_strings(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of every special token, end-of-turn markers among them, without repeats."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def _first_special_end(tokenizer: PreTrainedTokenizerBase, turn: str, start: int) -> int | None:
    # The FIRST special token after the content is where generation stops; a template may write more after it.
    found = [(turn.find(text, start), -len(text)) for text in special_strings(tokenizer)]
    at, negative_length = min(((i, n) for i, n in found if i >= 0), default=(-1, 0))
    return None if at < 0 else at - negative_length


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation_prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise DataError(
            f"The tokenizer of {tokenizer.name_or_path or 'the target'} has no chat template; use an instruction-tuned "
            "target, or put its chat_template.jinja beside the tokenizer files."
        )
    chat = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation_prompt)
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise DataError(f"The chat template refuses the turns ({roles}): {error}") from error
    assert isinstance(text, str)
    return text


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The template writes special tokens itself. Long texts are cut later, so the length warning would mislead.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
