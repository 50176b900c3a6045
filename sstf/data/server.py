"""The target's answers through a server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp.

One request a prompt goes to `/completions`, the prompt as token ids, never as text: the chat template is ours. Ids come
back in one of three forms; at the first contact the best that the server offers is chosen:

| form        | who                                       | where in `choices[0]` |
|---|---|---|
| `token_ids` | vLLM, SGLang (`return_token_ids`)          | `token_ids` |
| `logprobs`  | older vLLM (`return_tokens_as_token_ids`)  | `logprobs.tokens`, each `"token_id:123"` |
|             | llama.cpp                                  | `logprobs.content`, each with an `id` |
| `text`      | others                                     | `text`, tokenised here; `answers` says what that loses |

Every sampling setting is sent, also those that are off: a server takes what is missing from the model's
`generation_config.json`, and the answers would follow a distribution that nobody asked for.

Asked again, a server may give another answer even at temperature 0 or with the same seed: what shares its batch changes
the rounding. So answers are kept as they come (`journal`), and a run that goes on does not ask for them again.

Is it the right model? At the first contact the server must read a text as the same token ids as our tokenizer, and
each prompt as the ids that were sent. That finds another vocabulary, an added BOS, and prompts that are cut. It does
NOT find another model with the same vocabulary (the base model, another size, a quantised copy): only the target itself
can tell, when features are extracted. There, what was written at temperature 0 must be the target's own argmax nearly
everywhere.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from sstf.data.groups import fingerprint
from sstf.data.journal import Journal, JournalEntry
from sstf.data.server_client import BadAnswer, Connection, ServerClient, ServerConfig, ServerError
from sstf.errors import DataError
from sstf.types import Sampled, SamplingParams

JOIN_S = 2.0  # an interrupted run waits this long for its threads, which die with the process anyway
# Where tokenizers differ: capitals, digits, spaces, code, accents, scripts, emoji.
PROBE_TEXT = (
    "The Quick (brown) fox - naïve café, 1234567 + 3.14\n\tdef f(x):  return x**2\n漢字かな 한국어 Привет 🙂 end"
)
PROBE_TOKENS = 4

TokenForm = Literal["token_ids", "logprobs", "text"]


@dataclass
class ServerReport:
    """What is worth knowing afterwards. `root` is where the server says that the model came from.

    `retokenised` answers came as text only, so their ids may not be those that the target wrote. Without `seeds` an
    answer that is asked for again may be another one.
    """

    model: str = ""
    root: str = ""
    form: TokenForm = "token_ids"
    seeds: bool = True
    answers: int = 0
    from_journal: int = 0
    retokenised: int = 0
    retries: int = 0
    outages: int = 0


@dataclass(frozen=True)
class _Request:
    """One prompt, and the key of its answer in the journal."""

    key: str
    prompt: list[int]
    params: SamplingParams


class ServerSampler:
    """Implements `data.sampler.Sampler` over HTTP."""

    def __init__(
        self,
        config: ServerConfig,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: frozenset[int],
        max_length: int,
        journal: Path,
        made_from: str,
        notify: Callable[[str], None],
    ) -> None:
        """Does not contact the server yet.

        Args:
            config: Where the server is, and how patient to be.
            tokenizer: The target's.
            end_tokens: Ids after which the target stops; the server is told.
            max_length: The longest prompt and answer together, in tokens; the server must have room for it.
            journal: Where answers are kept, so that a run that was killed does not ask for them again.
            made_from: A fingerprint of what answers depend on beside prompt and parameters: the target.
            notify: Gets a sentence when the server is gone, back, or lacks something; called from several threads.

        Raises:
            ConfigError: The environment variable with the key is missing or holds none.
            DataError: No end token.
        """
        if not end_tokens:
            raise DataError("The target has no end token, so its answers would never end; set eos_token_id in it.")
        self.report = ServerReport(seeds=config.seeds)
        self._config, self._tokenizer, self._end_tokens = config, tokenizer, end_tokens
        self._max_length, self._made_from, self._notify = max_length, made_from, notify
        eos = tokenizer.eos_token_id
        # Where a server leaves the end token out and does not name it.
        self._usual_end: int = eos if isinstance(eos, int) and eos in end_tokens else min(end_tokens)
        self._client = ServerClient(config, notify)
        self._journal = Journal(journal)
        self._known: dict[str, JournalEntry] = {}
        self._introduced = False
        self._lock = threading.Lock()

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        slots: int,
        on_token: Callable[[int], None] | None = None,
    ) -> list[Sampled]:
        """See `Sampler.sample`; `slots` requests are under way at once, `on_token` hears of whole answers.

        Raises:
            DataError: A prompt does not fit, the server serves another model, refuses a request, keeps failing, or is
                gone for too long. The answers that were there are in the journal.
        """
        for index, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
            if not prompt or p.max_new_tokens < 1 or len(prompt) + p.max_new_tokens > self._max_length:
                raise DataError(
                    f"prompt {index} has {len(prompt)} tokens and max_new_tokens {p.max_new_tokens}; expected at least "
                    f"1 each, and at most {self._max_length} together"
                )
        if not prompts:
            return []
        if not self._introduced:
            self._introduce()
        requests = [_Request(self._entry_key(ids, p), list(ids), p) for ids, p in zip(prompts, params, strict=True)]
        missing = {request.key: request for request in requests if request.key not in self._known}
        self.report.from_journal += sum(request.key in self._known for request in requests)
        try:
            self._fetch(list(missing.values()), slots, on_token or (lambda count: None))
        finally:
            self.report.retries, self.report.outages = self._client.retries, self._client.outages
        entries = [self._known[request.key] for request in requests]
        for key in {request.key for request in requests}:
            del self._known[key]  # asked for once; memory does not grow with the data
        self.report.answers += len(entries)
        self.report.retokenised += sum(entry.retokenised for entry in entries)
        return [Sampled(list(entry.token_ids), entry.finished) for entry in entries]

    def _entry_key(self, prompt: Sequence[int], p: SamplingParams) -> str:
        settings = [p.temperature, p.top_p, p.top_k, p.max_new_tokens, p.seed]
        return fingerprint(self._made_from, self.report.model, sorted(self._end_tokens), list(prompt), settings)

    # ---- many requests ----------------------------------------------------------------------------------------------

    def _fetch(self, requests: list[_Request], slots: int, on_token: Callable[[int], None]) -> None:
        """Answer all requests, each kept as soon as it is there; leaves no thread behind, whatever happens."""
        waiting: SimpleQueue[_Request | None] = SimpleQueue()
        answered: SimpleQueue[JournalEntry | Exception] = SimpleQueue()
        stop = threading.Event()
        connections = [self._client.connect() for _ in range(min(slots, len(requests)))]
        threads = [
            threading.Thread(target=self._work, args=(connection, waiting, answered, stop), daemon=True)
            for connection in connections
        ]
        for item in [*requests, *[None for _ in threads]]:
            waiting.put(item)
        try:
            for thread in threads:
                thread.start()
            for _ in requests:
                outcome = answered.get()
                if isinstance(outcome, Exception):
                    raise outcome
                self._keep(outcome)
                on_token(len(outcome.token_ids))
        finally:
            stop.set()
            for connection in connections:
                connection.abort()
            deadline = time.monotonic() + JOIN_S
            for thread in threads:
                if thread.ident is not None:  # it was started
                    thread.join(max(0.0, deadline - time.monotonic()))
            while not answered.empty():  # what came in while something else went wrong
                outcome = answered.get()
                if isinstance(outcome, JournalEntry):
                    self._keep(outcome)

    def _keep(self, entry: JournalEntry) -> None:
        self._journal.append(entry)
        self._known[entry.key] = entry

    def _work(
        self,
        connection: Connection,
        waiting: SimpleQueue[_Request | None],
        answered: SimpleQueue[JournalEntry | Exception],
        stop: threading.Event,
    ) -> None:
        try:
            while (request := waiting.get()) is not None:
                answered.put(self._answer(connection, request, stop))
        except Exception as error:  # of any kind: the main thread waits for something, and raises it
            answered.put(error)
        finally:
            connection.close()

    # ---- one request ------------------------------------------------------------------------------------------------

    def _answer(self, connection: Connection, request: _Request, stop: threading.Event) -> JournalEntry:
        p = request.params
        body = {
            **self._body(request.prompt, p.max_new_tokens),
            "temperature": p.temperature,
            "top_p": p.top_p,
            "top_k": p.top_k or -1,
        }

        def ask(seed: dict[str, int]) -> JournalEntry:
            return self._client.ask(
                connection, "completions", {**body, **seed}, lambda reply: self._read(request, reply), stop
            )

        if not self.report.seeds:
            return ask({})
        try:
            return ask({"seed": p.seed & 0x7FFFFFFF})  # 31 bits of it are what every server can take
        except ServerError as error:
            if not re.search(r"(\b|_)seeds?\b", error.said, re.IGNORECASE):
                raise
            with self._lock:
                first, self.report.seeds = self.report.seeds, False
            if first:
                self._notify(
                    f"The server takes no seeds ({error.said}), so it gets none: answers at a temperature above 0 "
                    "would be others if they were asked for again."
                )
            return ask({})

    def _body(self, prompt: list[int] | str, max_tokens: int) -> dict[str, Any]:
        """What every request holds, greedy."""
        body = {
            "model": self.report.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": sorted(self._end_tokens),
            "skip_special_tokens": False,
            "return_token_ids": True,
        }
        return {**body, "logprobs": 1, "return_tokens_as_token_ids": True} if self.report.form == "logprobs" else body

    def _read(self, request: _Request, reply: dict[str, Any]) -> JournalEntry:
        """The answer in `reply`, up to the first end token, which is added where the server left it out.

        Raises:
            BadAnswer: It is not a whole answer to this request.
            DataError: The server read another prompt than was sent.
        """
        choice, limit = _choice(reply), request.params.max_new_tokens
        read = _prompt_as_read(reply, choice)
        if read not in (None, request.prompt, len(request.prompt)):
            raise DataError(
                f"{self._config.base_url} read a prompt of {len(request.prompt)} token ids as "
                f"{len(read) if isinstance(read, list) else read} tokens, expected the ids that were sent: it adds to "
                "prompts or cuts them, so its answers belong to other texts. Change that setting of the server."
            )
        reason = choice.get("finish_reason")
        stopped_by = choice.get("stop_reason", choice.get("matched_stop"))  # vLLM's and SGLang's names
        if reason not in ("stop", "length"):
            raise BadAnswer(f"finish_reason is {reason!r}, expected stop or length")
        if isinstance(stopped_by, str):
            raise BadAnswer(f"the server stopped at {stopped_by!r}, a text that nobody asked it to stop at")
        ids = _token_ids(choice, self.report.form)
        retokenised = self.report.form == "text"
        if retokenised:
            # A text that is cut inside a character ends in a replacement character, which nobody wrote.
            ids = self._tokenise(choice["text"].rstrip("\ufffd") if reason == "length" else choice["text"])
        if ids is None:
            raise BadAnswer("the answer holds no token ids, unlike the first one")
        end = next((i for i, token in enumerate(ids) if token in self._end_tokens), None)
        if end is not None:
            ids = ids[: end + 1]
        elif reason == "stop":
            end_token = self._usual_end
            if isinstance(stopped_by, int) and stopped_by in self._end_tokens:
                end_token = stopped_by
            ids = [*ids, end_token]
        if retokenised:
            ids = ids[:limit]  # the same text may take more tokens than it was written in
        finished = bool(ids) and ids[-1] in self._end_tokens
        if not retokenised and (len(ids) > limit or (len(ids) < limit and not finished)):
            raise BadAnswer(f"{len(ids)} tokens came with finish_reason {reason}, expected max_tokens: {limit}")
        return JournalEntry(request.key, ids, finished, retokenised)

    def _tokenise(self, text: str, special_tokens: bool = False) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=special_tokens)
        assert isinstance(ids, list)
        return ids

    # ---- the first contact ------------------------------------------------------------------------------------------

    def _introduce(self) -> None:
        """Find the model, how it reads text, and the form in which ids come; read the journal."""
        connection, never = self._client.connect(), threading.Event()
        try:
            self._client.ask(connection, "models", None, self._choose_model, never)
            forms: tuple[TokenForm, ...] = ("token_ids", "logprobs", "text")
            for form in forms:
                self.report.form = form
                body = self._body(PROBE_TEXT, PROBE_TOKENS)
                if self._client.ask(connection, "completions", body, self._probe, never):
                    break
        finally:
            connection.close()
        if self.report.form == "text":
            self._notify(
                f"{self._config.base_url} gives no token ids, so answers are tokenised from their text. Where the "
                "target did not write a word in its usual tokens, a head will learn from others than the target's."
            )
        self._known, damaged = self._journal.read()
        if damaged:
            self._notify(f"{self._journal.path}: {damaged} damaged lines are ignored, and asked for again.")
        self._introduced = True

    def _choose_model(self, reply: dict[str, Any]) -> None:
        listed = reply.get("data")
        cards = [card for card in listed if isinstance(card, dict)] if isinstance(listed, list) else []
        by_name = {card["id"]: card for card in cards if isinstance(card.get("id"), str)}
        if not by_name:
            raise BadAnswer("the list of models is empty")
        name = self._config.model or next(iter(by_name))
        if name not in by_name or (self._config.model is None and len(by_name) > 1):
            expected = f"model: {name}" if self._config.model else "one model, or the setting model to choose one"
            raise DataError(f"{self._config.base_url} serves {', '.join(sorted(by_name))}; expected {expected}.")
        room = by_name[name].get("max_model_len")
        if isinstance(room, int) and room < self._max_length:
            raise DataError(
                f"{self._config.base_url} serves {name} with room for {room} tokens, expected max_length: "
                f"{self._max_length}; start the server with a longer context, or lower max_length."
            )
        self.report.model, self.report.root = name, str(by_name[name].get("root") or "")

    def _probe(self, reply: dict[str, Any]) -> bool:
        """Whether ids come in the form that was asked for; checks how the server reads a text."""
        choice = _choice(reply)
        ours = [self._tokenise(PROBE_TEXT), self._tokenise(PROBE_TEXT, special_tokens=True)]
        read = _prompt_as_read(reply, choice)
        if read not in (None, *ours, *map(len, ours)):
            found = f"{len(read)} tokens, not all of them ours" if isinstance(read, list) else f"{read} tokens"
            raise DataError(
                f"{self._config.base_url} serves {self.report.model}, which reads a text as {found}, expected the "
                f"{len(ours[0])} of the target's tokenizer: it is another model. Serve the target of this run."
            )
        return self.report.form == "text" or bool(_token_ids(choice, self.report.form))


def _choice(reply: dict[str, Any]) -> dict[str, Any]:
    choices = reply.get("choices")
    if not isinstance(choices, list) or len(choices) != 1:
        raise BadAnswer(f"the answer holds {len(choices) if isinstance(choices, list) else 'no'} choices, expected 1")
    choice = choices[0]
    if not isinstance(choice, dict) or not isinstance(choice.get("text"), str):
        raise BadAnswer("the choice in the answer holds no text")
    return choice


def _prompt_as_read(reply: dict[str, Any], choice: dict[str, Any]) -> list[Any] | int | None:
    """The ids of the prompt as the server read it, or only their number, or nothing, whatever it tells."""
    ids, usage = choice.get("prompt_token_ids"), reply.get("usage")
    if isinstance(ids, list):
        return ids
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else None


def _token_ids(choice: dict[str, Any], form: TokenForm) -> list[int] | None:
    """The answer's ids, if they came in this form; see the table at the top."""
    ids: Any = choice.get("token_ids") if form == "token_ids" else None
    logprobs = choice.get("logprobs")
    if form == "logprobs" and isinstance(logprobs, dict):
        tokens, content = logprobs.get("tokens"), logprobs.get("content")
        if isinstance(content, list):
            ids = [token.get("id") for token in content if isinstance(token, dict)]
        elif isinstance(tokens, list):
            named = [re.fullmatch(r"token_id:(\d+)", str(token)) for token in tokens]
            ids = [int(match.group(1)) if match else None for match in named]
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        return None
    return ids
