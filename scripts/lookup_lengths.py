"""Accepted length of lookup without a head, on answers that the embedded target wrote: drafts are held against them, so
no model runs. `python scripts/lookup_lengths.py [ANSWERS]`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoTokenizer

from sstf.data.chat_template import render_prompt
from sstf.data.conversations import SAMPLE
from sstf.data.files import file_rows
from sstf.methods import NgramConfig, SuffixConfig, build_method
from sstf.methods.base import News
from sstf.targets import locate
from sstf.trees import AnyTree, Chain, DraftContext, DynamicTree, children
from sstf.types import Message

ANSWER = 256  # tokens of an answer at most
Texts = list[tuple[list[int], list[int]]]  # prompts and answers


def texts_of(count: int) -> Iterator[tuple[list[int], list[int]]]:
    tokenizer = AutoTokenizer.from_pretrained(locate("smollm2-135m-instruct"))
    for row, _ in zip(file_rows(SAMPLE, "sample"), range(count), strict=False):
        turns = [Message(turn["role"], turn["content"]) for turn in row.value["messages"]]
        last = max(i for i, turn in enumerate(turns) if turn.role == "assistant")
        answer = tokenizer(turns[last].content, add_special_tokens=False).input_ids[:ANSWER]
        if len(answer) > 8:
            yield render_prompt(tokenizer, turns[:last]), answer


def measured(texts: Texts, config: Any, policy: AnyTree) -> str:
    drafter = build_method(config).drafter(None, torch.device("cpu"))
    passes = tokens = nodes = 0
    seconds = 0.0
    for prompt, answer in texts:
        drafter.start(1, len(prompt) + ANSWER + 64)
        new, at = [*prompt[1:], answer[0]], 1
        while at < len(answer):
            started = time.perf_counter()
            news = [News(0, new, torch.empty(len(new), 0))]
            (tree,) = drafter.propose(news, policy, DraftContext(len(answer) - at))
            seconds += time.perf_counter() - started
            drafted, below = tree.tokens.tolist(), children(tree.parents.tolist())
            new, node = [], -1
            while at < len(answer):  # the accepted path and the bonus token
                new.append(answer[at])
                at += 1
                node = next((child for child in below.get(node, ()) if drafted[child] == new[-1]), -2)
                if node == -2:
                    break
            passes, tokens, nodes = passes + 1, tokens + len(new), nodes + len(drafted)
    return f"{tokens / passes:.3f} | {nodes / passes:.1f} | {1000 * seconds / passes:.2f}"


def main() -> None:
    texts = list(texts_of(int(sys.argv[1]) if len(sys.argv) > 1 else 150))
    print(f"{len(texts)} answers, {sum(len(answer) for _, answer in texts):,} tokens\n")
    print("| lookup | policy | accepted length | drafted a pass | ms a pass |\n|---|---|---|---|---|")
    policies = {
        "chain 4": Chain(depth=4),
        "chain 8": Chain(depth=8),
        "tree 8": DynamicTree(depth=8, top_k=4, total_tokens=24),
    }
    for name in ("chain 4", "chain 8"):
        print(f"| ngram | {name} | {measured(texts, NgramConfig(), policies[name])} |")
    for factor in (1.0, 2.0, 4.0):
        for remember in (0, SuffixConfig().remember):
            for name, policy in policies.items():
                config = SuffixConfig(factor=factor, remember=remember)
                label = f"suffix, factor {factor:g}, {'its own text' if not remember else 'and earlier answers'}"
                print(f"| {label} | {name} | {measured(texts, config, policy)} |")


if __name__ == "__main__":
    main()
