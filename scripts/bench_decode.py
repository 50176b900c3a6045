"""Where the time of speculative decoding goes on this machine, and what others reach on it. JSON lines.

    python scripts/bench_decode.py [--head FOLDER] [--quick]

`overhead`: with drafts that are always right, the share of a plain step that goes to neither target nor head.
`size`: for n rows a pass, T_verify(n), T_draft and T_host over T_target, and the speedup of a chain of n - 1 drafts
that are always right, as the cost model predicts it and as measured.
`decoder`: tokens per second of plain decoding, prompt lookup, assisted generation and the head's policies, here and
in other libraries, on the same target and prompts.
`batch`: tokens per second of several sequences at once.

Contestants run in turn, prompt by prompt, so a slow moment hits all alike; every ratio is taken within the run.
Without `--head` a new head stands in: its arithmetic is that of a trained one, its drafts are worth nothing.
`scripts/verify_vllm.sh` prints vLLM's plain rate on the same prompts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sstf.data.chat_template import render_prompt
from sstf.decode import AnyPolicy, BanditPolicy, Experience, Generation, SpeculativeDecoder, measure_costs
from sstf.decode.cost import KNOTS, CostModel
from sstf.evaluation import hardware, load_suite
from sstf.evaluation.metrics import bootstrap
from sstf.methods import Drafter, Eagle3Config, NgramConfig, build_method
from sstf.methods.base import News, ShallowPasses
from sstf.methods.checkpoint import DraftHead, load_head
from sstf.methods.ngram import chain
from sstf.targets import Target, load_target
from sstf.trees import AnyTree, Chain, CostAwareTree, DraftContext, DynamicTree, StaticTree
from sstf.types import DraftTree, SamplingParams

SIZES = (*range(1, 17), 20, 24, 28, 32, 40, 48, 56, 64)


def emit(**figures: object) -> None:
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}), flush=True)


# ---- drafts that are always right ------------------------------------------------------------------------------------


@dataclass
class Oracle:
    """Proposes what the target said before; with `inner`, a real drafter does its work first, for its cost."""

    answer: list[int]  # the prompt from its second token on, and the continuation
    inner: Drafter | None = None
    seen: int = 0

    @property
    def levels(self) -> int:
        return self.inner.levels if self.inner else 0

    def start(self, slots: int, capacity: int, passes: ShallowPasses | None = None) -> None:
        self.seen = 0
        if self.inner:
            self.inner.start(slots, capacity, passes)

    def restart(self, slot: int) -> None:
        self.seen = 0
        if self.inner:
            self.inner.restart(slot)

    def propose(self, news: Sequence[News], policy: AnyTree, context: DraftContext) -> list[DraftTree]:
        if self.inner:
            self.inner.propose(news, policy, context)
        self.seen += len(news[0].tokens)
        depth = min(policy.depth, context.depth)
        return [chain(self.answer[self.seen : self.seen + depth], torch.device("cpu"))]


def with_oracle(
    target: Target, head: DraftHead, prompt: list[int], answer: list[int], real: bool, depth: int
) -> SpeculativeDecoder:
    """A decoder whose drafts are right. In bf16 a pass over several rows rounds otherwise than a plain step, so a near
    tie may turn the text: the oracle then learns the text as this size of pass says it."""
    decoder = SpeculativeDecoder(target, head, Chain(depth=depth))
    free = Oracle([*prompt[1:], *answer])
    inner, decoder.drafter = decoder.drafter, free
    for _ in range(8):
        made = decoder.generate(prompt, len(answer))
        if made.accepted_length > 0.9 * min(depth + 1, len(answer) - 1):
            break
        free.answer = [*prompt[1:], *made.token_ids]
    decoder.drafter = Oracle(free.answer, inner if real else None)
    return decoder


def long_answers(
    target: Target, prompts: list[list[int]], tokens: int, count: int
) -> list[tuple[list[int], list[int]]]:
    """Prompts whose answer does not end before `tokens`, with the answer."""
    plain = SpeculativeDecoder(target)
    found = []
    for prompt in prompts:
        made = plain.generate(prompt, tokens)
        if len(made.token_ids) == tokens:
            found.append((prompt, made.token_ids))
        if len(found) == count:
            return found
    sys.exit(f"only {len(found)} prompts have an answer of {tokens} tokens; lower --max-new-tokens")


def seconds_a_token(made: Generation) -> float:
    return made.timings.decode / sum(made.accepted_lengths)


def bench_overhead(target: Target, head: DraftHead, texts: list[tuple[list[int], list[int]]], repeats: int) -> None:
    """T_host is everything of a step that is neither the target's pass nor drafting."""
    plain = SpeculativeDecoder(target)
    for real, depth in ((False, 3), (False, 7), (False, 15), (True, 3), (True, 7)):
        shares, rates = [], []
        for prompt, answer in texts:
            oracle = with_oracle(target, head, prompt, answer, real, depth)
            for _ in range(repeats):
                base = plain.generate(prompt, len(answer))
                made = oracle.generate(prompt, len(answer))
                passes = len(made.accepted_lengths)
                shares.append(made.timings.host / passes / seconds_a_token(base))
                rates.append(made.accepted_length)
        emit(
            bench="overhead", draft="head, made right" if real else "oracle", depth=depth,
            accepted_length=statistics.mean(rates), t_host_over_plain_step=statistics.median(shares),
        )  # fmt: skip


def bench_sizes(
    target: Target, head: DraftHead, texts: list[tuple[list[int], list[int]]], repeats: int, sizes: Sequence[int]
) -> None:
    """The cost model's terms from passes timed on their own, its prediction, and decoding itself."""
    drafter = head.method.drafter(head.module, target.device)
    layers = head.method.feature_spec(target.spec).layers
    split = SpeculativeDecoder(target, head).split
    cost = measure_costs(target, drafter, layers, repeats=3 * repeats, split=split)
    plain = SpeculativeDecoder(target)
    for rows in sizes:
        measured, hosts, plain_hosts, bases = [], [], [], []
        for prompt, text in texts:
            # Whole passes only: a last one that the limit cuts short drafts less than the model is asked about.
            answer = text[: 1 + rows * ((len(text) - 1) // rows)]
            right = with_oracle(target, head, prompt, answer, True, rows - 1) if rows > 1 else plain
            for _ in range(repeats):
                base = plain.generate(prompt, len(answer))
                done = right.generate(prompt, len(answer))
                measured.append((seconds_a_token(base) / seconds_a_token(done), done.accepted_length))
                hosts.append(done.timings.host / len(done.accepted_lengths))
                plain_hosts.append(base.timings.host / len(base.accepted_lengths))
                bases.append(seconds_a_token(base))
        tau = statistics.mean(length for _, length in measured)
        host, plain_host = statistics.median(hosts), statistics.median(plain_hosts)
        model = CostModel(cost.verify_s, cost.draft_s, host, plain_host)
        predicted = model.speedup(tau, rows - 1, rows - 1)
        speedup = statistics.median(ratio for ratio, _ in measured)
        emit(
            bench="size", rows=rows, t_verify_over_t_target=model.verify(rows) / model.verify(1),
            t_draft_over_t_target=model.draft_s / model.verify(1), t_host_over_t_target=host / model.verify(1),
            accepted_length=tau, speedup_predicted=predicted, speedup_measured=speedup,
            measured_over_predicted=speedup / predicted, plain_ms=1e3 * statistics.median(bases),
        )  # fmt: skip


# ---- decoders side by side -------------------------------------------------------------------------------------------


@dataclass
class Made:
    tokens: list[int]
    decoded: int  # after the first token or first chunk
    seconds: float
    passes: int | None = None
    draft_s: float = 0.0
    verify_s: float = 0.0


@dataclass
class Clock:
    """A transformers streamer that notes when tokens come; the prompt comes first."""

    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.counts.append(value.numel())

    def end(self) -> None:
        pass


def ours(decoder: SpeculativeDecoder) -> Callable[[list[int], int], Made]:
    def run(prompt: list[int], tokens: int) -> Made:
        made = decoder.generate(prompt, tokens)
        t = made.timings
        return Made(made.token_ids, sum(made.accepted_lengths), t.decode, len(made.accepted_lengths), t.draft, t.verify)

    return run


def transformers(target: Target, **options: Any) -> Callable[[list[int], int], Made]:
    def run(prompt: list[int], tokens: int) -> Made:
        clock = Clock()
        ids = torch.tensor([prompt])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = target.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, streamer=clock,
                pad_token_id=target.tokenizer.pad_token_id, **options,
            )  # fmt: skip
        made = out[0, len(prompt) :].tolist()
        first = clock.counts[1] if len(clock.counts) > 1 else 0
        return Made(made, len(made) - first, clock.times[-1] - clock.times[1])

    return run


def flashspec(target: Target) -> Callable[[list[int], int], Made] | None:
    """flashspec's engine with its prompt lookup, over the same loaded model."""
    try:
        from flashspec import BanditConfig, FlashSpecConfig, SamplingConfig, SpeculativeEngine
        from flashspec.engine import NgramDrafter, TargetModel
    except ImportError:
        emit(bench="note", text="flashspec is not installed (pip install flashspec): left out")
        return None
    device = torch.device("cpu")
    config = FlashSpecConfig(
        device="cpu", drafter_strategy="bandit", bandit=BanditConfig(n_arms=1), sampling=SamplingConfig(temperature=0.0)
    )
    model = TargetModel(target.spec.name, device, target.dtype, model=target.model)
    engine = SpeculativeEngine(config, [NgramDrafter()], model)

    def run(prompt: list[int], tokens: int) -> Made:
        ids = torch.tensor([prompt])
        started = time.perf_counter()
        engine.generate(ids, max_new_tokens=1)
        first = time.perf_counter() - started
        started = time.perf_counter()
        result = engine.generate(ids, max_new_tokens=tokens)
        seconds = time.perf_counter() - started - first  # without the prefill, as everywhere here
        made = result.output_ids[0, : result.n_tokens_generated].tolist()
        return Made(made, len(made) - 1, seconds)

    return run


def contestants(
    target: Target, head: DraftHead | None, prompt_lookup: int
) -> dict[str, Callable[[list[int], int], Made]]:
    ngram = DraftHead("ngram", build_method(NgramConfig()))
    found: dict[str, Callable[[list[int], int], Made]] = {
        "plain": ours(SpeculativeDecoder(target)),
        "transformers plain": transformers(target),
        "n-gram": ours(SpeculativeDecoder(target, ngram, Chain(depth=prompt_lookup))),
        "transformers prompt lookup": transformers(target, prompt_lookup_num_tokens=prompt_lookup),
        "transformers assisted (early exit)": transformers(
            target,
            assistant_early_exit=target.spec.num_layers // 3,
            num_assistant_tokens=4,
            num_assistant_tokens_schedule="constant",
        ),
    }
    other = flashspec(target)
    if other:
        found["flashspec prompt lookup"] = other
    if head:
        policies: dict[str, AnyPolicy] = {
            "chain of 2": Chain(depth=2),
            "chain of 3": Chain(depth=3),
            "static 4-2-1": StaticTree.full(4, 2, 1),
            "dynamic": DynamicTree(depth=3, top_k=4, total_tokens=15),
            "dynamic calibrated": DynamicTree(depth=3, top_k=4, total_tokens=15, calibrated=True),
            "cost-aware": CostAwareTree(depth=6, top_k=6, total_tokens=32),
            "dynamic + lookup": DynamicTree(depth=3, top_k=4, total_tokens=15, lookup=True),
            "cost-aware + lookup": CostAwareTree(depth=6, top_k=6, total_tokens=32, lookup=True),
        }
        arms = {
            "tree": CostAwareTree(depth=6, top_k=6, total_tokens=32, lookup=True),
            "small": DynamicTree(depth=2, top_k=4, total_tokens=8, lookup=True),
            "chain": Chain(depth=2, lookup=True),
        }
        policies["bandit (Thompson)"] = BanditPolicy(arms=arms)
        policies["bandit (UCB)"] = BanditPolicy(arms=arms, algorithm="ucb")
        for name, policy in policies.items():
            found[name] = ours(SpeculativeDecoder(target, head, policy, experience=Experience()))
    return found


def bench_decoders(target: Target, head: DraftHead | None, prompts: list[list[int]], tokens: int, repeats: int) -> None:
    runs = contestants(target, head, 4)
    made: dict[str, list[Made]] = {name: [] for name in runs}
    for name in list(runs):  # warm-up; a library that cannot run this target is reported and left out
        try:
            runs[name](prompts[0], 8)
        except Exception as error:  # whatever another library raises
            emit(bench="note", text=f"{name} does not run: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
            del runs[name], made[name]
    for _ in range(repeats):
        for prompt in prompts:
            for name, run in runs.items():
                made[name].append(run(prompt, tokens))
    base = made["plain"]

    def rate(records: list[Made], drawn: Sequence[int]) -> float:
        # all repeats of a prompt stay together
        picked = [records[i + r * len(prompts)] for i in drawn for r in range(repeats)]
        return sum(m.decoded for m in picked) / sum(m.seconds for m in picked)

    everything = range(len(prompts))
    for name, records in made.items():
        low, high = bootstrap(lambda drawn, r=records: rate(r, drawn) / rate(base, drawn), len(prompts))
        passes = sum(m.passes or 0 for m in records)
        figures: dict[str, object] = {}
        if passes:
            decoded, seconds = sum(m.decoded for m in records), sum(m.seconds for m in records)
            draft, verify = sum(m.draft_s for m in records), sum(m.verify_s for m in records)
            figures = dict(
                accepted_length=decoded / passes, draft_ms=1e3 * draft / passes, verify_ms=1e3 * verify / passes,
                host_ms=1e3 * (seconds - draft - verify) / passes,
            )  # fmt: skip
        same = sum(m.tokens == b.tokens for m, b in zip(records, base, strict=True)) / len(base)
        emit(
            bench="decoder", name=name, tokens_per_second=rate(records, everything),
            speedup=rate(records, everything) / rate(base, everything), interval=[round(low, 3), round(high, 3)],
            same_text_as_plain=same, **figures,
        )  # fmt: skip


def bench_batches(
    target: Target, head: DraftHead | None, prompts: list[list[int]], tokens: int, batches: Sequence[int]
) -> None:
    for batch in batches:
        chosen = (prompts * batch)[: max(batch, 8)]
        params = SamplingParams(max_new_tokens=tokens)
        arms: dict[str, SpeculativeDecoder] = {"plain": SpeculativeDecoder(target)}
        if head:
            arms["chain of 2"] = SpeculativeDecoder(target, head, Chain(depth=2))
            arms["cost-aware + lookup"] = SpeculativeDecoder(
                target, head, CostAwareTree(depth=6, top_k=6, total_tokens=32, lookup=True)
            )
        rates = {}
        for name, decoder in arms.items():
            decoder.generate_batch(chosen[:batch], SamplingParams(max_new_tokens=4), batch)
            started = time.perf_counter()
            made = decoder.generate_batch(chosen, params, batch)
            rates[name] = sum(len(m.token_ids) for m in made) / (time.perf_counter() - started)
        emit(bench="batch", slots=batch, note="prefills included", **{f"{n} tokens/s": r for n, r in rates.items()})


def new_head(target: Target) -> DraftHead:
    method = build_method(Eagle3Config())
    torch.manual_seed(0)
    module = method.build_head(target.spec, target.frozen_head, torch.arange(8192))  # type: ignore[attr-defined]
    return DraftHead("new", method, module.to(target.dtype).eval().requires_grad_(False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--head", type=Path, help="a head folder that `sstf train` wrote")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=("overhead", "size", "decoder", "batch"), help="some parts only")
    parser.add_argument("--quick", action="store_true", help="a fraction of the work: figures are rougher")
    args = parser.parse_args()
    parts = set(args.only or ("overhead", "size", "decoder", "batch"))
    target = load_target(args.target, args.dtype)
    head = load_head(args.head, target) if args.head else None
    emit(bench="machine", target=target.spec.name, dtype=target.spec.dtype, head=str(args.head or "new"), **hardware())
    prompts = [render_prompt(target.tokenizer, p.messages) for p in load_suite("builtin", None)]
    stand_in = head or new_head(target)
    tokens = args.max_new_tokens
    repeats = args.repeats
    if parts & {"overhead", "size"}:
        texts = long_answers(target, prompts, 1 + 96, 1 if args.quick else 2)
        if "overhead" in parts:
            bench_overhead(target, stand_in, texts, repeats)
        if "size" in parts:
            bench_sizes(target, stand_in, texts, repeats, KNOTS if args.quick else SIZES)
    some = prompts[: 4 if args.quick else args.prompts]
    if "decoder" in parts:
        bench_decoders(target, head, some, tokens, repeats)
    if "batch" in parts:
        bench_batches(target, head, some, tokens // 2, (1, 4) if args.quick else (1, 2, 4, 8, 16))


if __name__ == "__main__":
    main()
