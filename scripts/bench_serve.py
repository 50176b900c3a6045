"""What `sstf serve` keeps of the decoder's own speed at concurrency 1, as JSON lines.

    python scripts/bench_serve.py runs/demo [--prompts 8] [--new-tokens 128] [--repeats 3]

A server in a process of its own and the same decoder in this one answer the same prompts greedily, in turn. Each pair
must be the same tokens; its ratio is of tokens a second after the first token. The figure is the median of the ratios.
The policy is a fixed chain, so that neither learns its way to other trees than the other's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import openai

from sstf.data.chat_template import render_prompt
from sstf.data.config import DataConfig, KeepAnswers, SampleSource
from sstf.data.conversations import read_conversations
from sstf.decode import SpeculativeDecoder
from sstf.evaluation import hardware
from sstf.opening import open_decoder
from sstf.trees import Chain
from sstf.types import Conversation


@dataclass(frozen=True)
class Timed:
    """Token ids, and seconds from the request to the first and the last token."""

    token_ids: list[int]
    first: float
    last: float

    @property
    def tokens_per_second(self) -> float:
        return (len(self.token_ids) - 1) / (self.last - self.first)


def ask_server(client: openai.OpenAI, model: str, prompt: list[int], new_tokens: int) -> Timed:
    started, times, ids = time.perf_counter(), list[float](), list[int]()
    for chunk in client.completions.create(
        model=model,
        prompt=prompt,
        temperature=0,
        max_tokens=new_tokens,
        stream=True,
        extra_body={"return_token_ids": True},
    ):
        if new := (chunk.choices[0].model_extra or {}).get("token_ids"):
            ids += new
            times.append(time.perf_counter() - started)
    return Timed(ids, times[0], times[-1])


def ask_decoder(decoder: SpeculativeDecoder, prompt: list[int], new_tokens: int) -> Timed:
    started, times = time.perf_counter(), list[float]()
    found = decoder.generate(prompt, new_tokens, on_step=lambda _: times.append(time.perf_counter() - started))
    return Timed(found.token_ids, times[0], times[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("head")
    parser.add_argument("--target")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--depth", type=int, default=4)
    args = parser.parse_args()
    command = [sys.executable, "-m", "sstf", "serve", args.head, "--port", "0", "--slots", str(args.slots)]
    command += ["--policy", f"{{kind: chain, depth: {args.depth}}}"]
    server = subprocess.Popen(
        command + (["--target", args.target] if args.target else []), stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stderr is not None
        url = next(line.split()[-1] for line in server.stderr if line.startswith("listening on"))
        decoder = open_decoder(args.head, Chain(depth=args.depth), args.target).decoder
        conversations = read_conversations(
            DataConfig(source=SampleSource(), answers=KeepAnswers(), max_conversations=args.prompts)
        ).conversations
        prompts = [
            render_prompt(decoder.target.tokenizer, c.messages[:1])
            for c in conversations
            if isinstance(c, Conversation)
        ]
        client = openai.OpenAI(base_url=url, api_key="none", timeout=600)
        model = decoder.target.spec.name
        ask_server(client, model, prompts[0], 8)
        ask_decoder(decoder, prompts[0], 8)
        ratios, firsts = [], []
        for repeat in range(args.repeats):
            for prompt in prompts:
                turns = [
                    lambda prompt=prompt: ask_server(client, model, prompt, args.new_tokens),
                    lambda prompt=prompt: ask_decoder(decoder, prompt, args.new_tokens),
                ]
                order = (0, 1) if repeat % 2 == 0 else (1, 0)  # neither is always first
                found = {which: turns[which]() for which in order}
                served, alone = found[0], found[1]
                if len(alone.token_ids) < 8:
                    continue
                ratios.append(served.tokens_per_second / alone.tokens_per_second)
                firsts.append(served.first - alone.first)
                print(
                    json.dumps(
                        {
                            "tokens": len(alone.token_ids),
                            "same_tokens": served.token_ids == alone.token_ids,
                            "served_tokens_per_second": round(served.tokens_per_second, 2),
                            "decoder_tokens_per_second": round(alone.tokens_per_second, 2),
                            "ratio": round(ratios[-1], 3),
                        }
                    ),
                    flush=True,
                )
        summary = {
            "median_ratio": round(statistics.median(ratios), 3),
            "first_token_later_by_s": round(statistics.median(firsts), 4),
            "pairs": len(ratios),
            "slots": args.slots,
            "policy": f"chain of {args.depth}",
            "target": model,
            "dtype": decoder.target.spec.dtype,
            "hardware": hardware(),
        }
        print(json.dumps(summary))
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
