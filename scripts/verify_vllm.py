"""Measures a running vLLM server for verify_vllm.sh; standard library and `sstf.parity.served` only, so that any
python3 runs it.

Subcommands, in the order in which the shell script calls them:
`requirements` (an installed package's requirements, some left out), `free-port`, `healthy`, `measure` (prompts
against one server, result as JSON), `speculative-config`, `report` (two such results compared).

Accepted length is counted as vLLM counts it, from the counters of its /metrics page:
1 + accepted draft tokens / draft rounds. The 1 is the token that the target itself adds to every verify pass.
vLLM counts before it cuts an answer at its end or limit, so the last pass of an answer may count tokens that nobody
receives; `emitted_per_round` counts received tokens only and lies a little below.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.metadata
import json
import re
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs in vLLM's environment, where sstf is not installed

from sstf.parity.served import MODEL, OPENER, DraftCounters, fetch_counters, free_port, is_healthy, since

WARM_UP_PROMPT = "Say hello."
BROKEN_BELOW = 1.05  # mean accepted length; an untrained head reaches 1.00
NGRAM = 4  # size of the n-grams of `repetition`


class MeasureError(Exception):
    """Something that ends the run in one sentence."""


@dataclass(frozen=True)
class Answer:
    """One prompt's greedy answer. `decode_s` runs from the first token to the last, so `tokens - 1` tokens."""

    id: str
    category: str
    text: str
    token_ids: list[int]
    decode_s: float


@dataclass(frozen=True)
class Measurement:
    """One server over all prompts. `drafts` is None for a server that does not speculate."""

    answers: list[Answer]
    drafts: DraftCounters | None


# --- the environment ---------------------------------------------------------------------------


def requirements(package: str, without: list[str]) -> list[str]:
    """The requirements of an installed package as pip reads them: no extras, and without the named packages."""
    left_out = {canonical(name) for name in without}
    lines = []
    for line in importlib.metadata.requires(package) or []:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if name is None:
            raise MeasureError(f"{package} has a requirement that does not start with a name: {line!r}.")
        if "extra ==" not in line and canonical(name.group()) not in left_out:
            lines.append(line)
    return lines


def canonical(name: str) -> str:
    """A package name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


# --- the server --------------------------------------------------------------------------------


def seconds_until(end: float) -> float:
    """What is left of the time limit that ends at monotonic time `end`; raises when nothing is."""
    left = end - time.monotonic()
    if left <= 0:
        raise MeasureError("the prompts took longer than --run-timeout allows.")
    return left


def answer(url: str, row: PromptRow, max_tokens: int, end: float) -> Answer:
    """Streams one greedy chat completion and times it; `end` is the monotonic time at which it gives up.

    The server sends its first event together with the first token (the prefill's), so prefill and queueing stay
    out of `decode_s`.
    """
    body = {
        "model": MODEL,
        "messages": row.messages,
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    text = ""
    token_ids: list[int] = []
    first = last = None
    with OPENER.open(request, timeout=seconds_until(end)) as reply:
        for raw in reply:
            seconds_until(end)
            line = raw.decode().strip()
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise MeasureError(f"the server refused prompt {row.id}: {event['error']}.")
            last = time.perf_counter()
            first = first or last
            for choice in event["choices"]:
                text += choice["delta"].get("content") or ""
                token_ids += choice.get("token_ids") or []
    if first is None or last is None or not token_ids:
        raise MeasureError(f"the server sent no tokens for prompt {row.id}.")
    return Answer(row.id, row.category, text, token_ids, last - first)


# --- prompts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptRow:
    """One request: the turns up to and including the last user turn."""

    id: str
    category: str
    messages: list[dict[str, str]]


def read_prompts(path: Path, limit: int) -> list[PromptRow]:
    """The first `limit` rows of a JSON-lines file whose rows hold "prompt" or "messages"."""
    rows: list[PromptRow] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if len(rows) == limit:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise MeasureError(f"{path} line {number} is not JSON: {error}.") from error
        if isinstance(row, dict) and isinstance(row.get("prompt"), str):
            messages = [{"role": "user", "content": row["prompt"]}]
        elif isinstance(row, dict) and isinstance(row.get("messages"), list):
            try:
                messages = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
            except (KeyError, TypeError) as error:
                raise MeasureError(f'{path} line {number}: each message wants "role" and "content".') from error
            while messages and messages[-1]["role"] != "user":
                messages.pop()
        else:
            raise MeasureError(f'{path} line {number} holds neither a "prompt" string nor a "messages" list.')
        if not messages:
            raise MeasureError(f"{path} line {number} holds no user turn.")
        rows.append(PromptRow(str(row.get("id", f"line-{number}")), str(row.get("category", "")), messages))
    if not rows:
        raise MeasureError(f"{path} holds no prompts.")
    return rows


# --- measuring and reporting -------------------------------------------------------------------


def measure(url: str, rows: list[PromptRow], max_tokens: int, time_limit_s: float) -> Measurement:
    """Answers all prompts one after the other (batch 1), after one warm-up request that is not counted."""
    end = time.monotonic() + time_limit_s
    warm_up = PromptRow("warm-up", "", [{"role": "user", "content": WARM_UP_PROMPT}])
    answer(url, warm_up, max_tokens, end)
    before = fetch_counters(url)
    answers = [answer(url, row, max_tokens, end) for row in rows]
    return Measurement(answers, since(before, fetch_counters(url)))


def load_measurement(path: Path) -> Measurement:
    """Reads what `measure --json` wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    drafts = None if data["drafts"] is None else DraftCounters(**data["drafts"])
    return Measurement([Answer(**row) for row in data["answers"]], drafts)


def decode_speed(answers: list[Answer]) -> float:
    """Decode tokens per second: sum of tokens after the first / sum of seconds after the first."""
    seconds = sum(row.decode_s for row in answers)
    return sum(len(row.token_ids) - 1 for row in answers) / seconds if seconds > 0 else 0.0


def repetition(answers: list[Answer]) -> float:
    """Share of n-grams of tokens that already occurred in the same answer. Loops inflate accepted length."""
    seen = repeated = 0
    for row in answers:
        ngrams = [tuple(row.token_ids[i : i + NGRAM]) for i in range(len(row.token_ids) - NGRAM + 1)]
        seen += len(ngrams)
        repeated += len(ngrams) - len(set(ngrams))
    return repeated / seen if seen else 0.0


def compare(plain: Measurement, speculative: Measurement, depth: int) -> dict[str, object]:
    """All figures of the report, under the names of the project's glossary."""
    drafts = speculative.drafts
    if drafts is None or drafts.rounds == 0:
        raise MeasureError("the server counted no draft rounds: it did not speculate.")
    survival = [count / drafts.rounds for count in drafts.accepted_at]
    reached = [drafts.rounds, *drafts.accepted_at]
    rates = [count / of if of else None for count, of in zip(drafts.accepted_at, reached, strict=False)]
    accepted_length = 1 + drafts.accepted / drafts.rounds
    plain_speed, speculative_speed = decode_speed(plain.answers), decode_speed(speculative.answers)
    speedup = speculative_speed / plain_speed if plain_speed else 0.0
    pairs = list(zip(plain.answers, speculative.answers, strict=True))
    emitted = sum(len(row.token_ids) - 1 for row in speculative.answers)  # without the prefill's token
    warnings = []
    if accepted_length < BROKEN_BELOW:
        warnings.append(
            f"broken: accepted length {accepted_length:.3f} is what an untrained or wrongly exported head gives."
        )
    if speedup > accepted_length:
        warnings.append("void: speedup > accepted length cannot be; the plain run was slowed by something else.")
    return {
        "accepted_length": accepted_length,
        "emitted_per_round": emitted / drafts.rounds,
        "depth": depth,
        "survival": survival,
        "acceptance_rate": rates,
        "draft_rounds": drafts.rounds,
        "drafted_tokens": drafts.drafted,
        "accepted_tokens": drafts.accepted,
        "plain_tokens_per_s": plain_speed,
        "speculative_tokens_per_s": speculative_speed,
        "speedup": speedup,
        "prompts": len(pairs),
        "identical_texts": sum(a.text == b.text for a, b in pairs) / len(pairs),
        "repetition": repetition(speculative.answers),
        "warnings": warnings,
    }


def render(figures: dict[str, object]) -> str:
    """The figures as lines of text, each with its formula."""

    def per_position(key: str) -> str:
        values = figures[key]
        assert isinstance(values, list)
        return " ".join("-" if value is None else f"{value:.3f}" for value in values)

    lines = [
        f"{'accepted length':<24}{figures['accepted_length']:.3f}"
        f"   1 + accepted / rounds = 1 + {figures['accepted_tokens']:.0f} / {figures['draft_rounds']:.0f};"
        f" range 1 .. {figures['depth']} + 1",
        f"{'emitted per round':<24}{figures['emitted_per_round']:.3f}"
        "   received tokens after the first / rounds; cut at the limit, else the same",
        f"{'survival':<24}{per_position('survival')}   accepted at position i / rounds",
        f"{'acceptance rate':<24}{per_position('acceptance_rate')}   accepted at i / accepted at i-1",
        f"{'plain tokens/s':<24}{figures['plain_tokens_per_s']:.2f}   decode only, batch 1",
        f"{'speculative tokens/s':<24}{figures['speculative_tokens_per_s']:.2f}   decode only, batch 1",
        f"{'speedup':<24}{figures['speedup']:.3f}"
        "   speculative tokens/s / plain tokens/s; one run each, not interleaved",
        f"{'identical texts':<24}{figures['identical_texts']:.2f}"
        f"   share of {figures['prompts']} greedy answers; bf16 near-ties may differ",
        f"{'repetition':<24}{figures['repetition']:.3f}"
        f"   repeated {NGRAM}-grams / {NGRAM}-grams; loops inflate accepted length",
    ]
    warnings = figures["warnings"]
    assert isinstance(warnings, list)
    return "\n".join(lines + [f"WARNING {warning}" for warning in warnings])


# --- command line ------------------------------------------------------------------------------


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; each subcommand is described at the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("requirements")
    command.add_argument("package")
    command.add_argument("--without", nargs="*", default=[])
    commands.add_parser("free-port")
    command = commands.add_parser("healthy")
    command.add_argument("--url", required=True)
    command = commands.add_parser("measure")
    command.add_argument("--url", required=True)
    command.add_argument("--prompts", type=Path, required=True)
    command.add_argument("--limit", type=int, required=True)
    command.add_argument("--max-tokens", type=int, required=True)
    command.add_argument("--time-limit", type=float, required=True)
    command.add_argument("--json", type=Path, required=True)
    command = commands.add_parser("speculative-config")
    command.add_argument("--head", required=True)
    command.add_argument("--depth", type=int, required=True)
    command = commands.add_parser("report")
    command.add_argument("--plain", type=Path, required=True)
    command.add_argument("--speculative", type=Path, required=True)
    command.add_argument("--target", required=True)
    command.add_argument("--head", required=True)
    command.add_argument("--depth", type=int, required=True)
    command.add_argument("--engine", required=True)
    command.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Runs one subcommand and returns its exit status."""
    if options.command == "requirements":
        print("\n".join(requirements(options.package, options.without)))
    elif options.command == "free-port":
        print(free_port())
    elif options.command == "healthy":
        return 0 if is_healthy(options.url) else 1
    elif options.command == "measure":
        rows = read_prompts(options.prompts, options.limit)
        measured = measure(options.url, rows, options.max_tokens, options.time_limit)
        options.json.write_text(json.dumps(asdict(measured)), encoding="utf-8")
    elif options.command == "speculative-config":
        print(json.dumps({"method": "eagle3", "model": options.head, "num_speculative_tokens": options.depth}))
    elif options.command == "report":
        plain, speculative = load_measurement(options.plain), load_measurement(options.speculative)
        figures = compare(plain, speculative, options.depth)
        print(render(figures))
        if options.json is not None:
            answers = [
                {
                    "id": a.id,
                    "category": a.category,
                    "plain": a.text,
                    "speculative": b.text,
                    "identical": a.text == b.text,
                }
                for a, b in zip(plain.answers, speculative.answers, strict=True)
            ]
            where = {"engine": options.engine, "dtype": "bfloat16", "target": options.target, "head": options.head}
            options.json.write_text(
                json.dumps({**where, **figures, "answers": answers}, indent=2, ensure_ascii=False) + "\n",
                encoding="utf-8",
            )
    return 0


def main() -> int:
    """Entry point: errors that a user can cause end in one sentence."""
    try:
        return run(parse_arguments(sys.argv[1:]))
    except (MeasureError, urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        print(f"verify_vllm: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
