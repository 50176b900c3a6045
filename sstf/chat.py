"""A chat in the terminal that shows speculation at work: what was drafted and accepted is coloured as it streams.

`open_chat` loads a target and a head, `Chat` holds the conversation and answers, `converse` is the loop over lines.
Decoding is left to `decode`, options and exit codes to `cli`.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import yaml
from pydantic import Field
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

from sstf.config_loading import Section
from sstf.data.chat_template import render_prompt
from sstf.decode import DecodePolicy, SpeculativeDecoder, Step
from sstf.decode.text_stream import TextStream
from sstf.errors import DecodeError, SstfError
from sstf.opening import open_decoder
from sstf.types import Message

DRAFTED = Style.parse("green")
PROMPT = "> "
HELP = {
    "/reset": "forget the conversation",
    "/stats": "how fast all answers came, and how full the context is",
    "/help": "this list",
    "/quit": "end (also Ctrl-D, or Ctrl-C at the prompt)",
}
# What a terminal would obey is shown as a picture of the character.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class ChatConfig(Section):
    """How answers are drafted and drawn. `policy` None takes a good one for the drafter."""

    policy: DecodePolicy | None = None
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    max_new_tokens: int = Field(default=512, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**62)


# ---- opening ---------------------------------------------------------------------------------------------------------


def open_chat(
    name: str,
    config: ChatConfig,
    target_name: str | None = None,
    system: str | None = None,
    experience: Path | None = None,
    draft: bool = True,
    notes: Console | None = None,
) -> Chat:
    """Load a target and its head.

    Args:
        name: a head's folder, also a published one's, the folder of a run with one finished head, or a method that
            needs none.
        config: how to decode.
        target_name: in place of the target that the head names.
        system: what stands before the conversation.
        experience: what decoding learned earlier, if the file exists.
        draft: False decodes plainly.
        notes: is told what takes long, and what a user should know.

    Raises:
        SstfError: an option, the head, the target or the experience cannot be used.
    """
    notes = notes or Console(quiet=True)
    with notes.status(Text("loading")) if notes.is_terminal else nullcontext():
        opened = open_decoder(name, config.policy, target_name, experience, draft)
        chat = Chat(opened.decoder, config, system, opened.drafter)
        chat.warm_up()
    for note in opened.notes:
        notes.print(Text(f"note: {note}"), soft_wrap=True)
    return chat


# ---- answering -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """Of one answer or of several. The first token of an answer comes from the prefill: no pass, no time."""

    tokens: int = 0
    answers: int = 0
    passes: int = 0
    accepted: int = 0  # tokens that were drafted
    seconds: float = 0.0

    def __add__(self, other: Figures) -> Figures:
        return Figures(
            self.tokens + other.tokens,
            self.answers + other.answers,
            self.passes + other.passes,
            self.accepted + other.accepted,
            self.seconds + other.seconds,
        )

    @property
    def accepted_length(self) -> float:
        """Tokens per verify pass, the bonus token included; 0 without a pass."""
        return (self.tokens - self.answers) / self.passes if self.passes else 0.0

    @property
    def tokens_per_second(self) -> float:
        """After the first token; 0 without a pass."""
        return (self.tokens - self.answers) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Answer:
    """What `Chat.ask` gave."""

    text: str
    figures: Figures
    ended: Literal["end", "length", "stopped"]
    limit: int  # tokens that it could have had
    forgotten: int  # turns that were dropped for it


class _Stopped(Exception):
    """Leaves `generate` between two passes."""


class Chat:
    """A conversation with one target.

    Args:
        decoder: the target, its head and what decoding learned.
        config: how to draw; its policy is the decoder's affair.
        system: what stands before the conversation.
        drafter: the head, in words.
    """

    def __init__(
        self, decoder: SpeculativeDecoder, config: ChatConfig, system: str | None = None, drafter: str = "a head"
    ) -> None:
        self.decoder, self.config, self.drafter = decoder, config, drafter
        self.system = [Message("system", system)] if system else []
        self.history: list[Message] = []
        self.figures = Figures()
        self.context_used = 0

    def reset(self) -> None:
        """Forget what was said; the figures stay."""
        self.history, self.context_used = [], 0

    def warm_up(self) -> None:
        """Find out now, not at the first message, whether this target can chat and what its passes cost.

        Raises:
            SstfError: the template refuses, the system text is too long, or the target returned no numbers.
        """
        prompt, _ = self._prompt([Message("user", "Hi")])
        self.decoder.generate(prompt, max_new_tokens=1)  # the prefill only: nothing is learned from it

    def ask(
        self,
        message: str,
        show: Callable[[str, bool], None] = lambda text, drafted: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Answer a message; both join the history.

        Args:
            message: the user's.
            show: takes new text and whether it was drafted.
            stopped: asked after every pass; True ends the answer there.

        Raises:
            SstfError: there is no answer, and the message is forgotten.
        """
        prompt, history = self._prompt([*self.history, Message("user", message)])
        target, config = self.decoder.target, self.config
        limit = min(config.max_new_tokens, target.context - len(prompt))
        stream = TextStream(target.tokenizer)
        times: list[float] = []
        said: list[str] = []
        tokens, accepted, drafted = 0, 0, False

        def give(text: str) -> None:
            if text:
                said.append(text)
                show(text, drafted)

        def on_step(step: Step) -> None:
            nonlocal tokens, accepted, drafted
            times.append(time.perf_counter())
            tokens += len(step.tokens)
            accepted += step.accepted
            for part, of_draft in ((step.tokens[: step.accepted], True), (step.tokens[step.accepted :], False)):
                if part:
                    drafted = of_draft
                    give(stream.push(part))
            if stopped():
                raise _Stopped

        ended: Literal["end", "length", "stopped"]
        try:
            seed = config.seed + self.figures.answers  # the same question need not get the same draw
            draw = (config.temperature, config.top_p, config.top_k, seed)
            ended = "end" if self.decoder.generate(prompt, limit, *draw, on_step=on_step).ended == "end" else "length"
        except _Stopped:
            ended = "stopped"
        give(stream.finish())
        passes = max(0, len(times) - 1)
        seconds = times[-1] - times[0] if times else 0.0
        figures = Figures(tokens, min(1, len(times)), passes, accepted, seconds)
        self.figures += figures
        forgotten = sum(turn.role == "user" for turn in self.history) + 1 - sum(turn.role == "user" for turn in history)
        answer = "".join(said)
        if tokens:
            self.history = [*history, Message("assistant", answer)]
            self.context_used = len(prompt) + tokens
        return Answer(answer, figures, ended, limit, forgotten)

    def _prompt(self, messages: list[Message]) -> tuple[list[int], list[Message]]:
        """Ids of the request and the messages in it: without the oldest turns where the context is too small."""
        target = self.decoder.target
        answer = min(self.config.max_new_tokens, target.context // 4)
        while True:
            prompt = render_prompt(target.tokenizer, [*self.system, *messages])
            if len(prompt) + answer <= target.context:
                return prompt, messages
            if len(messages) < 3:
                raise DecodeError(
                    f"the message{' and the system text have' if self.system else ' has'} {len(prompt)} tokens with "
                    f"the chat template, and {target.context - answer} fit into the target's context of "
                    f"{target.context} beside an answer of {answer}; shorten it"
                )
            messages = messages[2:]


# ---- the loop --------------------------------------------------------------------------------------------------------


def converse(
    chat: Chat, read: Callable[[], str | None], out: Console, notes: Console, interactive: bool = True
) -> None:
    """Answer line after line until there is none.

    Args:
        chat: is asked.
        read: the next line; None is the end. A KeyboardInterrupt in it is one too.
        out: takes the answers.
        notes: takes everything else.
        interactive: somebody sits there: Ctrl-C stops an answer, and an error is told and the chat goes on.

    Raises:
        SstfError: not interactive, and a message cannot be answered.
    """
    while True:
        try:
            line = read()
        except KeyboardInterrupt:
            if not interactive:
                raise
            notes.print()
            return
        if line is None or line.strip() == "/quit":
            return
        message = line.strip()
        if not message:
            continue
        if re.fullmatch(r"/[a-z]+", message):
            _command(chat, message, notes)
            continue
        if not interactive:
            _say(notes, PROMPT + message)
        try:
            with _stop_on_interrupt() if interactive else nullcontext(lambda: False) as stopped:
                _answer(chat, message, out, notes, stopped)
        except SstfError as error:
            if not interactive:
                raise
            notes.print(Text.assemble(("error:", "bold red"), " ", str(error)), soft_wrap=True)
        except _Stopped:  # before there was a word
            _say(notes, "stopped; the message is forgotten")


def _answer(chat: Chat, message: str, out: Console, notes: Console, stopped: Callable[[], bool]) -> None:
    def show(text: str, drafted: bool) -> None:
        shown = text.translate(_VISIBLE) if out.is_terminal else text
        # Segments reach the stream as they are; anything else of rich would expand tabs and read markup.
        out.print(Segments([Segment(shown, DRAFTED if drafted else None)]), end="", soft_wrap=True)

    answer = chat.ask(message, show, stopped)
    out.print(Segments([Segment("\n")]), end="", soft_wrap=True)
    if answer.forgotten:
        what = "the oldest turn was" if answer.forgotten == 1 else f"the {answer.forgotten} oldest turns were"
        _say(notes, f"{what} forgotten: the context of {chat.decoder.target.context} tokens is full")
    line = _figures(answer.figures, chat)
    if answer.figures.passes and chat.decoder.head:
        line += f" (chat {chat.figures.accepted_length:.2f})"
    if answer.ended == "length":
        line += f" · cut at {_count(answer.limit, 'token')}"
    elif answer.ended == "stopped":
        line += " · stopped"
    _say(notes, line)


def _command(chat: Chat, command: str, notes: Console) -> None:
    if command == "/help":
        for name, text in HELP.items():
            _say(notes, f"{name:<8}{text}")
    elif command == "/reset":
        chat.reset()
        _say(notes, "the conversation is forgotten")
    elif command == "/stats":
        figures, context = chat.figures, chat.decoder.target.context
        line = f"{_count(figures.answers, 'answer')} · {_figures(figures, chat)}"
        if figures.tokens and chat.decoder.head:
            line += f" · {figures.accepted / figures.tokens:.0%} of the tokens were drafted"
        _say(notes, f"{line} · context {chat.context_used} of {context}")
    else:
        _say(notes, f"{command} is no command; /help lists them")


def introduce(chat: Chat, out: Console, notes: Console, interactive: bool) -> None:
    """Say who answers, and what the colour means."""
    decoder, config = chat.decoder, chat.config
    target = decoder.target
    name = f"{target.spec.name} ({target.spec.dtype}, {target.device})"
    if decoder.head:
        fields = {"kind": decoder.policy.kind} | decoder.policy.model_dump(mode="json", exclude_defaults=True)
        policy = yaml.safe_dump(fields, default_flow_style=True, sort_keys=False, width=10**6).strip()
        _say(notes, f"{name}, drafted for by {chat.drafter}")
        _say(notes, f"policy {policy}, {_drawing(config)}")
    else:
        _say(notes, f"{name}, nothing is drafted, {_drawing(config)}")
    if decoder.head and out.is_terminal and out.color_system and not out.no_color:
        notes.print(Text.assemble(("drafted and accepted", DRAFTED), " · the target's own"), soft_wrap=True)
    if interactive:
        _say(notes, "/help lists the commands, Ctrl-C stops an answer")


def _drawing(config: ChatConfig) -> str:
    if config.temperature == 0:
        return "greedy"
    limits = [f"top-p {config.top_p:g}"] * (config.top_p < 1) + [f"top-k {config.top_k}"] * (config.top_k > 0)
    return ", ".join([f"temperature {config.temperature:g}", *limits])


def _figures(figures: Figures, chat: Chat) -> str:
    parts = [_count(figures.tokens, "token")]
    if figures.passes:
        parts.append(f"{figures.tokens_per_second:.1f} tokens/s")
        if chat.decoder.head:
            parts.append(f"accepted length {figures.accepted_length:.2f}")
    return " · ".join(parts)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _say(notes: Console, text: str) -> None:
    # As `Text`: brackets in it are no markup.
    notes.print(Text(text, style="dim"), soft_wrap=True)


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C is seen after the running pass, which leaves everything whole; a second one does not wait."""
    before = signal.getsignal(signal.SIGINT)
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise _Stopped
        pressed = True

    if before == signal.SIG_IGN:  # a shell's background job: not ours to take up
        yield lambda: False
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
