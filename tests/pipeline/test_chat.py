"""`sstf chat`: real processes with a pipe and with a terminal, the loop with a list of lines, the stream of text."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sstf.chat import Chat, ChatConfig, converse, introduce, open_chat
from sstf.cli import CHAT_OPTIONS, main
from sstf.config_loading import load_options
from sstf.data.chat_template import render_prompt
from sstf.decode import AnyPolicy, Experience, SpeculativeDecoder
from sstf.decode.text_stream import TextStream
from sstf.errors import ConfigError, DecodeError, HeadError
from sstf.formats import find_head
from sstf.methods import Eagle3Config
from sstf.methods.checkpoint import load_head, read_head, save_head
from sstf.methods.eagle3 import Eagle3Method
from sstf.targets import Target, load_target
from sstf.trees import Chain, CostAwareTree
from sstf.types import Message

CONFIG = Eagle3Config(layers=(0, 5), draft_vocab_size=100, ttt_steps=3)
# What is printed must not hang on what a pass costs on this machine.
POLICY = "{kind: chain, depth: 3, lookup: true}"
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"
HEAVY = ("torch", "transformers", "numpy", "datasets", "pydantic")


@pytest.fixture(scope="module")
def folder(tiny_target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`target` with a long context, which writes printable text and never ends by itself; `head` for it."""
    folder = tmp_path_factory.mktemp("chat")
    model = LlamaForCausalLM.from_pretrained(tiny_target_folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_target_folder)
    model.config.max_position_embeddings = 4096
    for token in range(300):
        text = str(tokenizer.decode([token]))
        if token < 3 or not (text.isascii() and text.isprintable()):
            model.lm_head.weight.data[token] = 0  # a logit of 0 is never the largest
    model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    target = load_target(str(folder / "target"), dtype="float32", device="cpu")
    torch.manual_seed(5)
    head = Eagle3Method(CONFIG).build_head(target.spec, target.frozen_head, torch.arange(0, 300, 3))
    save_head(folder / "head", CONFIG, head, target.spec, {})
    return folder


@pytest.fixture(scope="module")
def target(folder: Path) -> Target:
    return load_target(str(folder / "target"), dtype="float32", device="cpu")


def chat(target: Target, folder: Path, system: str | None = None, **settings: object) -> Chat:
    config = ChatConfig.model_validate({"max_new_tokens": 40} | settings)
    head = load_head(folder / "head", target)
    return Chat(SpeculativeDecoder(target, head, Chain(depth=3, lookup=True)), config, system, "tiny head")


def plain_answers(target: Target, messages: Sequence[str], max_new_tokens: int = 40) -> list[str]:
    """What the target alone says, turn by turn."""
    history, answers = [], []
    for message in messages:
        history.append(Message("user", message))
        ids = render_prompt(target.tokenizer, history)
        out = SpeculativeDecoder(target).generate(ids, max_new_tokens)
        answers.append(str(target.tokenizer.decode(out.token_ids, skip_special_tokens=True)))
        history.append(Message("assistant", answers[-1]))
    return answers


def lines(*said: str) -> Callable[[], str | None]:
    rest = iter(said)
    return lambda: next(rest, None)


def talk(chat: Chat, *said: str, interactive: bool = True) -> tuple[str, str]:
    """What was answered, and what was noted beside."""
    out, notes = StringIO(), StringIO()
    converse(chat, lines(*said), Console(file=out), Console(file=notes), interactive)
    return out.getvalue(), notes.getvalue()


# ---- the loop --------------------------------------------------------------------------------------------------------


def test_answers_are_the_targets_own(target: Target, folder: Path) -> None:
    said = ["Hello", "tell me more", "and?"]
    pieces: list[tuple[str, bool]] = []
    one = chat(target, folder)
    answers = [one.ask(message, lambda text, drafted: pieces.append((text, drafted))) for message in said]
    assert [answer.text for answer in answers] == plain_answers(target, said)
    assert "".join(text for text, _ in pieces) == "".join(answer.text for answer in answers)
    assert {drafted for _, drafted in pieces} == {True, False}
    assert all(answer.ended == "length" and answer.figures.tokens == 40 for answer in answers)


def test_figures_are_the_decoders(target: Target, folder: Path) -> None:
    one = chat(target, folder)
    first, second = one.ask("Hello").figures, one.ask("Hi").figures
    fresh = chat(target, folder).decoder
    expected = fresh.generate(render_prompt(target.tokenizer, [Message("user", "Hello")]), 40)
    assert first.accepted_length == expected.accepted_length > 1
    assert first.passes == len(expected.accepted_lengths)
    assert first.accepted == sum(expected.accepted_lengths) - first.passes  # a pass: the accepted and the bonus token
    assert one.figures.accepted_length == 78 / (first.passes + second.passes)
    assert one.figures.tokens_per_second == pytest.approx(78 / (first.seconds + second.seconds))


def test_the_loop_says_what_happened(target: Target, folder: Path) -> None:
    one = chat(target, folder)
    out, notes = talk(one, "Hello", "", "/stats", "/reset", "Hello", "/help", "/nonsense", "/etc/motd?", "/quit", "Hi")
    first, again, path = out.splitlines()
    assert first == again == plain_answers(target, ["Hello"])[0]
    assert path == plain_answers(target, ["Hello", "/etc/motd?"])[1]
    figure = r"40 tokens · [\d.]+ tokens/s · accepted length \d\.\d\d \(chat \d\.\d\d\) · cut at 40 tokens"
    assert len(re.findall(f"^{figure}$", notes, re.M)) == 3
    stats = r"^1 answer · 40 tokens · .* · accepted length .* · \d+% of the tokens were drafted · context \d+ of 4096$"
    assert re.search(stats, notes, re.M)
    assert "the conversation is forgotten" in notes and "/quit   end (also" in notes
    assert "/nonsense is no command; /help lists them" in notes


def test_an_answer_that_was_stopped_is_kept_as_far_as_it_went(target: Target, folder: Path) -> None:
    one = chat(target, folder)
    asked = iter([False] * 9 + [True])
    answer = one.ask("Hello", stopped=lambda: next(asked))
    assert answer.ended == "stopped" and answer.figures.passes == 9
    whole = plain_answers(target, ["Hello"])[0]
    assert whole.startswith(answer.text) and 0 < len(answer.text) < len(whole)
    # What was interrupted leaves nothing behind in the decoder.
    follow_up = render_prompt(target.tokenizer, [*one.history, Message("user", "and?")])
    expected = SpeculativeDecoder(target).generate(follow_up, 40).token_ids
    assert one.ask("and?").text == target.tokenizer.decode(expected)


def test_without_drafting_no_accepted_length_is_claimed(target: Target) -> None:
    one = Chat(SpeculativeDecoder(target), ChatConfig(max_new_tokens=5))
    _, notes = talk(one, "Hello")
    assert re.fullmatch(r"5 tokens · [\d.]+ tokens/s · cut at 5 tokens\n", notes)


def test_what_the_model_writes_is_no_markup_and_no_command_to_the_terminal(
    target: Target, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = chat(target, folder, max_new_tokens=1)
    evil = "[red]x[/] :car:\t\x1b]0;title\x07\r " + "long " * 40
    monkeypatch.setattr(TextStream, "push", lambda self, tokens: evil)
    assert talk(one, "Hello")[0] == evil + "\n"  # a file gets what was written
    shown = StringIO()
    terminal = Console(file=shown, force_terminal=True, width=20)
    converse(one, lines("Hello"), terminal, Console(file=StringIO()))
    assert shown.getvalue() == "[red]x[/] :car:\t␛]0;title␇␍ " + "long " * 40 + "\n"


@pytest.mark.parametrize(("settings", "coloured"), [({}, True), ({"no_color": True}, False)])
def test_colour(target: Target, folder: Path, settings: dict[str, bool], coloured: bool) -> None:
    one, shown = chat(target, folder), StringIO()
    terminal = Console(file=shown, force_terminal=True, color_system="standard", **settings)
    introduce(one, terminal, terminal, interactive=True)
    converse(one, lines("Hello"), terminal, terminal)
    assert (GREEN in shown.getvalue()) is coloured
    assert ("drafted and accepted" in shown.getvalue()) is coloured
    assert "tiny head" in shown.getvalue() and "{kind: chain, lookup: true, depth: 3}, greedy" in shown.getvalue()


def test_the_seed_moves_on(target: Target, folder: Path) -> None:
    """A chat can be repeated, but within it the same question gets another draw."""
    said = ["Hello", "/reset", "Hello"]
    first, again = (talk(chat(target, folder, temperature=1.5, seed=3), *said)[0] for _ in range(2))
    assert first == again
    answers = [chat(target, folder, temperature=1.5, seed=seed).ask("Hello").text for seed in (3, 4)]
    assert first == "".join(f"{answer}\n" for answer in answers)
    assert answers[0] != answers[1]


# ---- the context -----------------------------------------------------------------------------------------------------


@pytest.fixture
def narrow(target: Target, monkeypatch: pytest.MonkeyPatch) -> Target:
    monkeypatch.setattr(target, "spec", replace(target.spec, max_position_embeddings=160))
    return target


def test_the_oldest_turns_are_forgotten(narrow: Target, folder: Path) -> None:
    one = chat(narrow, folder)
    said = ["a" * 30, "b" * 30, "c" * 30]
    out, notes = talk(one, *said)
    assert "the oldest turn was forgotten: the context of 160 tokens is full" in notes
    assert [message.content for message in one.history if message.role == "user"] == ["b" * 30, "c" * 30]
    assert out.splitlines()[2] == chat(narrow, folder).decoder.target.tokenizer.decode(
        SpeculativeDecoder(narrow).generate(render_prompt(narrow.tokenizer, one.history[:-1]), 40).token_ids
    )


def test_an_answer_ends_with_the_context(narrow: Target, folder: Path) -> None:
    answer = chat(narrow, folder, max_new_tokens=1000).ask("Hello")
    assert answer.ended == "length"
    assert answer.limit == answer.figures.tokens < 160


def test_a_message_that_cannot_fit(narrow: Target, folder: Path) -> None:
    one = chat(narrow, folder)
    out, notes = talk(one, "Hello", "x" * 200, "Hi")
    assert len(out.splitlines()) == 2  # the chat goes on
    assert re.search(r"error: the message has 2\d\d tokens with the chat template, and 120 fit into", notes)
    assert [message.content for message in one.history if message.role == "user"] == ["Hello", "Hi"]
    with pytest.raises(DecodeError, match="shorten it"):  # a script has to know
        talk(one, "x" * 200, interactive=False)
    with pytest.raises(DecodeError, match="the message and the system text have"):
        chat(narrow, folder, system="x" * 200).warm_up()


# ---- processes -------------------------------------------------------------------------------------------------------


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    return {**kept, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", **changes}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "sstf", "chat", *map(str, arguments)]


def test_piped(folder: Path, target: Target, tmp_path: Path) -> None:
    said = ["Hello", "tell me more"]
    options = ["--target", folder / "target", "--policy", POLICY, "--max-new-tokens", 40]
    experience = tmp_path / "experience.json"
    ended = subprocess.run(
        command(folder / "head", *options, "--experience", experience),
        input="\n".join(said).encode() + b"\n/stats\n\xff\n",  # the last line is no text, which is nobody's fault here
        env=environment(),
        capture_output=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    assert ended.stdout.decode().splitlines() == plain_answers(target, [*said, "\N{REPLACEMENT CHARACTER}"])
    notes = ended.stderr.decode().splitlines()
    assert notes[0] == f"target (float32, cpu), drafted for by {folder / 'head'} (eagle3)"
    assert notes[1] == "policy {kind: chain, lookup: true, depth: 3}, greedy"
    assert notes[2] == "> Hello"
    assert [line.split(" · ")[0] for line in notes[3:]] == [
        "40 tokens", "> tell me more", "40 tokens", "2 answers", "> \N{REPLACEMENT CHARACTER}", "40 tokens",
    ]  # fmt: skip
    assert Experience.load(experience)


@dataclass
class Terminal:
    """A process that believes it talks to somebody."""

    process: subprocess.Popen[bytes]
    fd: int
    seen: str = ""

    def until(self, pattern: str, timeout: float = 120) -> str:
        """Wait for a pattern; what came up to its end."""
        deadline = time.monotonic() + timeout
        while not (found := re.search(pattern, self.seen, re.S)):
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self.fd], [], [], left)[0], f"no {pattern!r} in {self.seen!r}"
            self.seen += os.read(self.fd, 65536).decode(errors="replace")
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def leave(self) -> int:
        """Ctrl-C at the prompt, and the exit code. Python's readline shows the prompt before it waits for keys: a
        Ctrl-C in between is seen with the next one."""
        for _ in range(3):
            self.type("\x03")
            try:
                return self.process.wait(20)  # long enough to end, where a second one would kill
            except subprocess.TimeoutExpired:
                continue
        raise AssertionError(f"it goes on: {self.seen!r}")


# Makes the terminal its own, so that Ctrl-C reaches it, also where CI starts us with SIGINT ignored.
LAUNCH = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)


@pytest.fixture
def terminal(folder: Path) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    settings = termios.tcgetattr(theirs)
    settings[3] |= termios.NOFLSH  # or Ctrl-C throws away what was written and not yet read
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    options = ["--target", folder / "target", "--policy", POLICY, "--max-new-tokens", 3000]
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *command(folder / "head", *options)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(TERM="xterm-256color"),
        start_new_session=True,
    )
    os.close(theirs)
    yield Terminal(process, ours)
    process.kill()
    process.wait()
    os.close(ours)


def test_terminal(terminal: Terminal, target: Target, folder: Path) -> None:
    opening = terminal.until("> ")
    assert f"{GREEN}drafted and accepted{PLAIN} · the target's own" in opening
    assert "/help lists the commands, Ctrl-C stops an answer" in opening

    # In the middle of an answer Ctrl-C stops that answer.
    terminal.type("Hello\n")
    streamed = terminal.until("Hello\r\n.{300}")
    terminal.type("\x03")
    streamed += terminal.until(r"\d+ tokens · [^\n]* · stopped[^\n]*\n")
    answer, _, status = streamed.partition("Hello\r\n")[2].rpartition("\r\n")[0].rpartition("\r\n")
    count = int(re.search(r"(\d+) tokens", status)[1])  # type: ignore[index]
    assert 10 < count < 2900

    # What was accepted is green and nothing else is.
    pieces: list[tuple[str, bool]] = []
    expected = chat(target, folder, max_new_tokens=count).ask("Hello", lambda *piece: pieces.append(piece))
    shown = re.sub(r"\x1b\[\?2004[hl]\r?", "", answer).replace("^C", "")  # what the line editor and the terminal add
    assert shown == "".join(f"{GREEN}{text}{PLAIN}" if drafted else text for text, drafted in pieces)
    assert shown.count(GREEN) >= 3 and expected.figures.accepted >= 3

    # The chat goes on with what was said, and ends at the prompt.
    terminal.until("> ")
    terminal.type("/stats\n")
    assert f"1 answer · {count} tokens" in terminal.until("of 4096")
    terminal.until("> ")
    assert terminal.leave() == 0


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom sstf.cli import main\n"
        "try:\n    main(['chat', '--help'])\nexcept SystemExit as ended:\n    assert ended.code == 0\n"
        f"assert not [name for name in {HEAVY!r} if name in sys.modules], 'slow imports'"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "example: sstf chat runs/demo" in ended.stdout


def test_the_help_tells_the_true_defaults() -> None:
    for option, _, text in CHAT_OPTIONS[1:]:
        default = text.rpartition("(default: ")[2].rstrip(")")
        assert float(default) == getattr(ChatConfig(), option.removeprefix("--").replace("-", "_"))
    assert load_options(ChatConfig, {}) == ChatConfig()


# ---- finding and refusing --------------------------------------------------------------------------------------------


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a chat that must fail with `code`; returns its message."""
    monkeypatch.setattr("sys.stdin", StringIO("Hello\n"))

    def run(*arguments: str | Path, code: int = 2) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["chat", *map(str, arguments)])
        seen = capsys.readouterr()
        assert ended.value.code == code, seen.err
        message = seen.err[seen.err.index("error: ") :]
        assert message.count("\n") == 1 and seen.out == "" and "Traceback" not in seen.err
        return message

    return run


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--temperature", "-1"], "--temperature: temperature: expected a number of at least 0.0, found -1"),
        (["--temperature", "warm"], '--temperature: temperature: expected a number, found "warm" (text)'),
        (["--top-p", "0"], "--top-p: top_p: expected a number above 0.0, found 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens: max_new_tokens: expected a number of at least 1"),
        (["--policy", "{kind: dynamic"], "--policy: the value is not valid YAML"),
        (["--policy", "dynamic"], "--policy: policy: expected a section, found"),
        (["--policy", "{kind: dinamic}"], '--policy: policy.kind: expected one of chain, static, dynamic'),
        (["--policy", "{depth: 3}"], "--policy: policy.kind: required but missing; expected one of chain"),
        (["--policy", "{kind: dynamic, dept: 3}"], '--policy: policy.dept: unknown key. Did you mean "depth"?'),
        (["--policy", "{kind: chain, depth: 0}"], "--policy: policy.depth: expected a number of at least 1"),
        (["--policy", "{kind: chain}", "--no-draft"], "--no-draft turns off; leave out one of the two"),
        (["--experience", "/nowhere/x.json"], "/nowhere/x.json: cannot be written"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(fails: Callable[..., str], options: list[str], expected: str) -> None:
    assert expected in fails("ngram", *options)


def test_bad_heads(fails: Callable[..., str], folder: Path, tiny_target_folder: Path, tmp_path: Path) -> None:
    assert "nowhere: no head there; expected a head folder that `sstf train` wrote" in fails(tmp_path / "nowhere")
    other = fails(folder / "head", "--target", tiny_target_folder)
    assert "the head was trained for target target (float32" in other and "other weights" in other
    missing = fails(folder / "head", "--target", tmp_path)
    assert "no config.json" in missing and "--target says" not in missing
    broken = shutil.copytree(folder / "head", tmp_path / "broken")
    (broken / "head.safetensors").write_bytes(b"")
    assert "altered or cut off" in fails(broken, "--target", folder / "target", code=3)
    (broken / "head.json").write_text("{")
    assert "unreadable" in fails(broken, code=3)


def test_a_target_that_cannot_chat(fails: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    target = shutil.copytree(folder / "target", tmp_path / "target")
    for path in target.glob("chat_template*"):
        path.unlink()
    assert "has no chat template" in fails("ngram", "--target", target)


def test_a_damaged_experience(fails: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "experience.json"
    path.write_text('{"format": 1')
    assert "what decoding learned cannot be read" in fails("ngram", "--experience", path, code=3)
    assert path.read_text() == '{"format": 1'  # left as it was


def test_a_run_stands_for_its_head(folder: Path, tmp_path: Path) -> None:
    def train(key: str, done: bool = True) -> Path:
        head = shutil.copytree(folder / "head", tmp_path / "train" / key / "head")
        # The head knows the target's name, the configuration beside it the folder.
        (head.parent / "config.yaml").write_text(f"target: {{name: {folder / 'target'}, dtype: float32}}\n")
        if done:
            (head.parent / "done.json").write_text("{}")
        return head

    unfinished = train("a", done=False)
    with pytest.raises(HeadError, match=f"still in training; {unfinished} is the best so far"):
        find_head(str(tmp_path))
    head = train("b")
    assert find_head(str(tmp_path)) == find_head(str(head.parent)) == find_head(str(head)) == head
    assert read_head(head).target.name == "target"
    opened = open_chat(str(tmp_path), ChatConfig())
    assert opened.decoder.target.spec.dtype == "float32"
    assert opened.decoder.policy == CostAwareTree(lookup=True)
    train("c")
    with pytest.raises(HeadError, match=r"holds 2 finished heads; name one: .*b/head, .*c/head"):
        find_head(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "policy"), [("ngram", Chain(depth=8, lookup=True)), ("suffix", CostAwareTree(lookup=True))]
)
def test_methods_that_need_no_head(name: str, policy: AnyPolicy, folder: Path, target: Target) -> None:
    """Chosen by name; drafted as well as the method can."""
    chat = open_chat(name, ChatConfig(max_new_tokens=20), target_name=str(folder / "target"))
    assert chat.decoder.policy == policy and name in chat.drafter
    chat.ask("Hello")
    assert chat.history[-1].content == plain_answers(target, ["Hello"], 20)[0]
    with pytest.raises(HeadError):  # it needs one
        open_chat("medusa", ChatConfig(), target_name=str(folder / "target"))


def test_experience_is_used(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "experience.json"
    options = {"target_name": str(folder / "target"), "experience": path}
    first = open_chat(str(folder / "head"), ChatConfig(max_new_tokens=8), **options)  # type: ignore[arg-type]
    first.ask("Hello")
    first.decoder.experience.save(path)
    second = open_chat(str(folder / "head"), ChatConfig(), **options)  # type: ignore[arg-type]
    saved = json.loads(path.read_text())["costs"]
    assert {str(batch): cost.to_json() for batch, cost in second.decoder.experience.costs.items()} == saved != {}
    with pytest.raises(ConfigError, match="cannot be written"):
        open_chat("ngram", ChatConfig(), experience=tmp_path)
