"""The measurements behind a plan: two probes of acceptance on a suite, and costs by batch size and context length.

Acceptance is measured greedily, one sequence at a time; it does not depend on the batch. Costs are of this machine and
of this decoder: an engine's differ, which is why a plan is confirmed by `sstf bench`.
"""

from __future__ import annotations

from functools import partial

from pydantic import Field

from sstf.config_loading import Section
from sstf.data.chat_template import render_prompt
from sstf.data.progress import Progress
from sstf.decode import CostModel, SpeculativeDecoder, measure_costs, within
from sstf.errors import ConfigError
from sstf.evaluation import load_suite
from sstf.evaluation.metrics import Record, survival
from sstf.evaluation.rejections import Pass, WatchedDrafter, watch
from sstf.methods.checkpoint import DraftHead
from sstf.targets import Target
from sstf.trees import Chain, DynamicTree
from sstf.tune.plan import Measured, SeenTree, accepted_lengths
from sstf.types import SamplingParams

CHAIN = Chain(depth=8)
TREE = DynamicTree(depth=6, top_k=8, total_tokens=63)
HOST_TOKENS = 12  # decoded by every sequence to measure host work


class TuneConfig(Section):
    """What is measured: `prompts` of a suite for acceptance, and each pair of a batch size and a context length."""

    suite: str = "builtin"
    prompts: int = Field(default=16, ge=1)
    max_new_tokens: int = Field(default=64, ge=8)
    batches: tuple[int, ...] = Field(default=(1, 2, 4, 8), min_length=1)
    contexts: tuple[int, ...] = Field(default=(128,), min_length=1)
    repeats: int = Field(default=2, ge=1)


def measure(target: Target, head: DraftHead, config: TuneConfig, progress: Progress) -> Measured:
    """Measure.

    Raises:
        ConfigError: a batch size or a context length that cannot be measured.
        DataError: the suite cannot be used.
    """
    _check(target, config)
    prompts = load_suite(config.suite, config.prompts)
    encoded = [render_prompt(target.tokenizer, prompt.messages, mode=prompt.mode) for prompt in prompts]
    limits = head.method.limits
    chain = SpeculativeDecoder(target, head, within(limits, CHAIN))
    records, seen = [], []
    with progress.start("acceptance", len(encoded), "prompts") as bar:
        trees = target.takes_trees and limits.trees
        tree = SpeculativeDecoder(target, head, within(limits, TREE)) if trees else None
        watched = WatchedDrafter(tree.drafter) if tree and tree.drafter else None
        if tree:
            tree.drafter = watched
        for ids in encoded:
            made = chain.generate(ids, config.max_new_tokens)
            records.append(Record("", "", made.accepted_lengths[:-1], [], 0.0, 0.0, 0.0))  # the last may be cut
            if tree and watched:
                passes: list[Pass] = []
                tree.generate(ids, config.max_new_tokens, on_step=partial(watch, watched, passes))
                seen += [SeenTree.of(one.tree, one.tokens) for one in passes[:-1] if one.tree and len(one.tree)]
            bar.advance(1)
    costs = {}
    with progress.start("costs", len(config.batches) * len(config.contexts), "measurements") as bar:
        for batch in config.batches:
            host, plain_host = (_host(decoder, encoded[0], batch) for decoder in (chain, SpeculativeDecoder(target)))
            for context in config.contexts:
                found = measure_costs(
                    target, chain.drafter, chain.layers, batch, config.repeats, context, split=chain.split
                )
                costs[batch, context] = CostModel(found.verify_s, found.draft_s, host, plain_host)
                bar.advance(1)
    return Measured(accepted_lengths(survival(records, chain.policy.depth), seen), costs)


def _check(target: Target, config: TuneConfig) -> None:
    if min(config.batches) < 1 or (max(config.batches) > 1 and not target.takes_trees):
        raise ConfigError(
            f"batches is {list(config.batches)}; expected sizes from 1, and 1 alone for {target.spec.name}"
        )
    room = target.context - 2 * TREE.total_tokens
    if min(config.contexts) < 2 or max(config.contexts) > room:
        raise ConfigError(f"contexts is {list(config.contexts)}; expected lengths from 2 to {room} for this target")


def _host(decoder: SpeculativeDecoder, prompt: list[int], batch: int) -> float:
    """Seconds a step that are neither drafting nor the target, with `batch` sequences at once."""
    params = SamplingParams(max_new_tokens=HOST_TOKENS)
    for _ in range(2):  # the first warms up
        # The last one is admitted when all others are: its time holds no other's prefill.
        last = decoder.generate_batch([prompt] * batch, params, slots=batch)[-1]
    return max(0.0, last.timings.host) / max(1, len(last.accepted_lengths))
