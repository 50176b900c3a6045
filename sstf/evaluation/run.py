"""Run a suite through plain decoding, prompt lookup and a head, interleaved, and summarise.

One arm is one way to decode. Every prompt goes through all arms before the next prompt, so drift of the machine's
speed hits all alike; all run through the same engine. `evaluate` gives the rows, `measure` also what explains them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sstf.data.chat_template import render_prompt
from sstf.data.progress import Progress
from sstf.decode import CostModel, DecodePolicy, SpeculativeDecoder, measure_costs
from sstf.decode.adaptive import tree_policies
from sstf.decode.hybrid import LONGEST
from sstf.decode.limits import within
from sstf.errors import DataError
from sstf.evaluation.config import NGRAM, PLAIN, EvalConfig
from sstf.evaluation.limits import Limits, Shape, limits, tree_oracles
from sstf.evaluation.metrics import (
    ContextBin,
    Record,
    acceptance_rate,
    accepted_length,
    by_context,
    histogram,
    intervals,
    length_bucket,
    repetition,
    survival,
    tokens_per_second,
)
from sstf.evaluation.rejections import Explainer, Pass, Rejections, WatchedDrafter, distributions, rejected, watch
from sstf.evaluation.suites import Prompt, load_suite
from sstf.methods import NgramConfig, build_method
from sstf.methods.checkpoint import DraftHead
from sstf.targets import Target
from sstf.trees import Chain
from sstf.warping import warp

BROKEN_BELOW = 1.05  # an accepted length this near 1 means a broken head or export, not a weak one
REPETITIVE_ABOVE = 0.5
ALL = "all"  # the category of the overall rows, and of prompts that name none
WARM_UP = 4  # tokens that every arm decodes before the clock counts
SAMPLE = 8  # prompts from which limits of drawn text are estimated, at most half of them


@dataclass(frozen=True)
class Row:
    """One arm at one temperature: figures overall (category `all`) or of one category."""

    arm: str
    temperature: float
    category: str
    prompts: int
    accepted_length: float
    accepted_length_ci: tuple[float, float]
    survival: list[float]
    acceptance_rate: list[float | None]
    tokens_per_second: float
    speedup: float
    speedup_ci: tuple[float, float]
    draft_ms: float  # a verify pass
    verify_ms: float  # a verify pass
    host_ms: float  # a verify pass: neither drafting nor the target
    identical: float | None  # share of prompts with the plain row's tokens (greedy only; bf16 near-ties may differ)
    repetition: float
    void: str | None  # why the row must not be quoted


@dataclass(frozen=True)
class PromptFigures:
    """One prompt in one arm at one temperature, all repeats added up: what two reports are compared by."""

    arm: str
    temperature: float
    prompt: str
    category: str
    mode: str
    prompt_tokens: int
    tokens: int
    passes: int
    decode_s: float


@dataclass(frozen=True)
class Distribution:
    """How many tokens passes emitted (1, 2, ...), and the mean by the length of the context."""

    arm: str
    temperature: float
    histogram: list[int]
    by_context: list[ContextBin]


@dataclass(frozen=True)
class Evaluation:
    """All that was measured. `by_mode` and `by_length` are rows whose `category` is a mode or a bucket of prompt
    lengths; empty where all prompts are of one kind. `costs` are seconds of passes by batch size."""

    rows: list[Row]
    by_mode: list[Row]
    by_length: list[Row]
    prompts: list[PromptFigures]
    distributions: list[Distribution]
    limits: list[Limits]
    rejections: Rejections
    costs: dict[int, CostModel]
    seconds: dict[str, float] = field(default_factory=dict)  # of wall clock, see `Clock`


@dataclass(frozen=True)
class Setting:
    """What is run: the prompts as token ids, and the arms."""

    target: Target
    config: EvalConfig
    prompts: list[Prompt]
    encoded: list[list[int]]
    arms: dict[str, SpeculativeDecoder]
    policies: Mapping[str, DecodePolicy]  # of the arms that are no baseline
    seed: int

    @property
    def trained(self) -> set[str]:
        """Arms that draft with a head that was trained."""
        return {name for name in self.policies if (arm := self.arms.get(name)) and arm.head and arm.head.module}

    @property
    def shapes(self) -> dict[str, Shape]:
        """What each arm drafts at most."""
        known = {PLAIN: Shape(0, 0, True), NGRAM: Shape(self.config.ngram_depth, self.config.ngram_depth, True)}
        for name, policy in self.policies.items():
            trees = tree_policies(policy)
            chain = all(isinstance(tree, Chain) and not tree.lookup for tree in trees)
            known[name] = Shape(policy.depth, max(tree.total_tokens for tree in trees), chain)
        return known


class Clock:
    """Seconds of wall clock by what they went into. All but `decoding` is overhead: `preparing` (the suite, and the
    first tokens of every arm), `costs`, `analysis`."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("preparing", "costs", "decoding", "analysis"), 0.0)
        self._last = time.perf_counter()

    def spent_on(self, name: str) -> None:
        """Everything since the last call."""
        now = time.perf_counter()
        self.seconds[name] += now - self._last
        self._last = now


Records = dict[str, list[Record]]  # of every arm, in the same order
Watched = dict[str, list[list[Pass]]]  # of every arm of the head, by prompt


def evaluate(
    target: Target, head: DraftHead | None, config: EvalConfig, progress: Progress, seed: int = 0
) -> list[Row]:
    """Rows overall and by category; `head=None` measures the free baselines alone.

    Raises:
        DataError: the suite cannot be used, or its prompts do not fit the target's context.
    """
    return _all_rows(_prepare(target, _one(head, config), config, seed), progress)


def compare_heads(
    target: Target, heads: Mapping[str, DraftHead], config: EvalConfig, progress: Progress, seed: int = 0
) -> list[Row]:
    """`evaluate` of several heads in one run, so that the machine's drift hits all alike. An arm is named
    `head: policy`; a policy that a head's method cannot draft has no row.

    Raises:
        DataError: as `evaluate`.
    """
    arms = {
        f"{name}: {policy}": (head, chosen)
        for name, head in heads.items()
        for policy, chosen in config.policies.items()
        if within(head.method.limits, chosen) == chosen
    }
    return _all_rows(_prepare(target, arms, config, seed), progress)


def _all_rows(setting: Setting, progress: Progress) -> list[Row]:
    clock = Clock()
    rows = []
    for temperature, records, _ in _decode(setting, progress, clock):
        rows += _rows(setting, records, temperature, lambda prompt, _: prompt.category)
    return rows


def measure(
    target: Target, head: DraftHead | None, config: EvalConfig, progress: Progress, seed: int = 0
) -> Evaluation:
    """`evaluate`, with limits, distributions, rejections and the costs of passes.

    Raises:
        DataError: as `evaluate`.
    """
    clock = Clock()
    setting = _prepare(target, _one(head, config), config, seed)
    clock.spent_on("preparing")
    costs = _costs(setting)
    clock.spent_on("costs")
    rows: list[Row] = []
    by_mode: list[Row] = []
    by_length: list[Row] = []
    figures: list[PromptFigures] = []
    shapes: list[Distribution] = []
    bounds: list[Limits] = []
    drafts = _draft_vocabulary(head)
    explainer = Explainer(target, drafts)
    hosts: dict[str, float] = {}  # seconds a pass
    for temperature, records, watched in _decode(setting, progress, clock):
        rows += _rows(setting, records, temperature, lambda prompt, _: prompt.category)
        if len({prompt.mode for prompt in setting.prompts}) > 1:
            by_mode += _rows(setting, records, temperature, lambda prompt, _: prompt.mode or "default")
        if len({length_bucket(len(ids)) for ids in setting.encoded}) > 1:
            by_length += _rows(setting, records, temperature, lambda _, ids: length_bucket(len(ids)))
        figures += _prompt_figures(records, temperature)
        shapes += [
            Distribution(arm, temperature, histogram(made), by_context(made))
            for arm, made in records.items()
            if arm != PLAIN
        ]
        _explain(setting, records, watched, explainer)
        bounds += _limits(setting, records, temperature, drafts)
        for arm, made in records.items():
            passes = sum(len(r.accepted_lengths) for r in made)
            hosts.setdefault(arm, sum(r.host_s for r in made) / max(1, passes))
        clock.spent_on("analysis")
    if costs:
        own, plain = hosts[next(iter(config.policies))], hosts[PLAIN]
        costs = {n: CostModel(c.verify_s, c.draft_s, max(0.0, own), max(0.0, plain)) for n, c in costs.items()}
    found = explainer.rejections()
    clock.spent_on("analysis")
    return Evaluation(rows, by_mode, by_length, figures, shapes, bounds, found, costs, clock.seconds)


# ---- decoding --------------------------------------------------------------------------------------------------------


Arms = dict[str, tuple[DraftHead, DecodePolicy]]


def _one(head: DraftHead | None, config: EvalConfig) -> Arms:
    return {name: (head, policy) for name, policy in config.policies.items()} if head else {}


def _prepare(target: Target, drafting: Arms, config: EvalConfig, seed: int) -> Setting:
    prompts = load_suite(config.suite, config.prompts, config.categories)
    encoded = [render_prompt(target.tokenizer, prompt.messages, mode=prompt.mode) for prompt in prompts]
    longest = max(len(ids) for ids in encoded) + config.max_new_tokens
    if longest > target.spec.max_position_embeddings:
        raise DataError(
            f"suite {config.suite}: a prompt and max_new_tokens need {longest} tokens, the target's context has "
            f"{target.spec.max_position_embeddings}; lower eval.max_new_tokens"
        )
    ngram = DraftHead(NGRAM, build_method(NgramConfig()))
    arms = {
        PLAIN: SpeculativeDecoder(target, None),
        NGRAM: SpeculativeDecoder(target, ngram, Chain(depth=config.ngram_depth)),
    }
    arms |= {name: SpeculativeDecoder(target, head, policy) for name, (head, policy) in drafting.items()}
    policies = {name: policy for name, (_, policy) in drafting.items()}
    return Setting(target, config, prompts, encoded, arms, policies, seed)


def _decode(setting: Setting, progress: Progress, clock: Clock) -> Iterator[tuple[float, Records, Watched]]:
    """One temperature after the other. The passes of the first repeat of greedy decoding are watched."""
    config, arms = setting.config, setting.arms
    watching = {}
    shortest = min(setting.encoded, key=len)
    for name, decoder in arms.items():
        decoder.generate(shortest, WARM_UP)  # first calls allocate and pick kernels
        if decoder.drafter and name != NGRAM:
            decoder.drafter = watching[name] = WatchedDrafter(decoder.drafter)
    clock.spent_on("preparing")
    total = len(config.temperatures) * config.repeats * len(setting.prompts)
    with progress.start("evaluation", total, "prompts") as bar:
        for temperature in config.temperatures:
            records: Records = {name: [] for name in arms}
            watched: Watched = {name: [] for name in watching} if temperature == 0 else {}
            for repeat in range(config.repeats):
                _forget_texts(setting, watching)
                for index, (prompt, ids) in enumerate(zip(setting.prompts, setting.encoded, strict=True)):
                    for name, decoder in arms.items():
                        on_step = None
                        if name in watched and repeat == 0:
                            watched[name].append([])
                            on_step = partial(watch, watching[name], watched[name][-1])
                        clock.spent_on("analysis")
                        made = decoder.generate(
                            ids,
                            config.max_new_tokens,
                            temperature,
                            config.top_p,
                            seed=setting.seed + repeat * 7919 + index,
                            on_step=on_step,
                        )
                        clock.spent_on("decoding")
                        t = made.timings
                        records[name].append(
                            Record(
                                prompt.id,
                                prompt.category,
                                made.accepted_lengths,
                                made.token_ids,
                                t.decode,
                                t.draft,
                                t.verify,
                                prompt.mode or "default",
                                len(ids),
                            )
                        )
                    bar.advance(1)
            yield temperature, records, watched


def _forget_texts(setting: Setting, watching: dict[str, WatchedDrafter]) -> None:
    """The prompts come again. A drafter that looks into earlier answers would find these very ones."""
    for name, decoder in setting.arms.items():
        if decoder.head and decoder.head.module is None:
            decoder.forget_texts()
            if decoder.drafter and name in watching:
                watching[name].drafter = decoder.drafter
                decoder.drafter = watching[name]


# ---- rows ------------------------------------------------------------------------------------------------------------


def _rows(
    setting: Setting, records: Records, temperature: float, group: Callable[[Prompt, list[int]], str]
) -> list[Row]:
    """Of every arm, over all prompts (category `all`) and over each group of them."""
    groups = [group(prompt, ids) for prompt, ids in zip(setting.prompts, setting.encoded, strict=True)]
    shapes = setting.shapes
    return _summarise(
        records, groups, temperature, {arm: shapes[arm].depth for arm in records}, trained=setting.trained
    )


def _summarise(
    records: Records, groups: Sequence[str], temperature: float, depths: dict[str, int], trained: set[str]
) -> list[Row]:
    """`groups` has one name a prompt; the records go through them once a repeat."""
    rows = []
    for arm, made in records.items():
        for name in dict.fromkeys([ALL, *groups]):
            picked = [i for i in range(len(made)) if name in (ALL, groups[i % len(groups)])]
            plain = [records[PLAIN][i] for i in picked]
            row = _row(arm, temperature, name, [made[i] for i in picked], plain, depths[arm])
            why = None if arm == PLAIN else _void(row, has_head=arm in trained)
            rows.append(replace(row, void=why))
    return rows


def _row(arm: str, temperature: float, category: str, made: list[Record], plain: list[Record], depth: int) -> Row:
    names = list(dict.fromkeys(r.prompt for r in made))
    place = {name: i for i, name in enumerate(names)}
    sums = np.zeros(
        (len(names), 5)
    )  # of each prompt: tokens, passes, seconds, and tokens and seconds of plain decoding
    for own, base in zip(made, plain, strict=True):
        passes = len(own.accepted_lengths)
        sums[place[own.prompt]] += (own.decoded, passes, own.decode_s, base.decoded, base.decode_s)
    tau = accepted_length(made)
    passes = max(1, sum(len(r.accepted_lengths) for r in made))
    # Lookup branches may reach deeper than the policy.
    survived = survival(made, max([depth, *(length - 1 for r in made for length in r.accepted_lengths)]))
    base_rate = tokens_per_second(plain)
    loops = sum(repetition(r.token_ids) for r in made) / len(made)
    same = sum(a.token_ids == b.token_ids for a, b in zip(made, plain, strict=True)) / len(made)
    return Row(
        arm=arm,
        temperature=temperature,
        category=category,
        prompts=len(names),
        accepted_length=tau,
        accepted_length_ci=intervals(sums, lambda total: _divide(total[:, 0], total[:, 1])),
        survival=survived,
        acceptance_rate=acceptance_rate(survived),
        tokens_per_second=tokens_per_second(made),
        speedup=tokens_per_second(made) / base_rate if base_rate else 0.0,
        speedup_ci=intervals(
            sums, lambda total: _divide(_divide(total[:, 0], total[:, 2]), _divide(total[:, 3], total[:, 4]))
        ),
        draft_ms=1e3 * sum(r.draft_s for r in made) / passes,
        verify_ms=1e3 * sum(r.verify_s for r in made) / passes,
        host_ms=1e3 * sum(r.host_s for r in made) / passes,
        identical=same if temperature == 0 else None,
        repetition=loops,
        void=None,
    )


def _divide(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """0 where there is nothing to divide by."""
    quotient: NDArray[np.float64] = np.divide(part, whole, out=np.zeros_like(part), where=whole != 0)
    return quotient


def _void(row: Row, has_head: bool) -> str | None:
    tau, speedup = row.accepted_length, row.speedup
    if tau == 0:
        return "empty: every text ended with its first token, so nothing was verified"
    if speedup > tau * 1.02:  # 2 % for the clock
        return f"impossible: speedup {speedup:.2f} above accepted length {tau:.2f}, so the baseline is depressed"
    if row.repetition > REPETITIVE_ABOVE:
        return f"repetitive: {row.repetition:.0%} of 4-grams are repeats, which inflates accepted length"
    if has_head and tau < BROKEN_BELOW:
        return f"broken: accepted length {tau:.2f} is what a head gives that was trained or loaded wrongly"
    return None


def _prompt_figures(records: Records, temperature: float) -> list[PromptFigures]:
    figures = []
    for arm, made in records.items():
        for name in dict.fromkeys(r.prompt for r in made):
            own = [r for r in made if r.prompt == name]
            figures.append(
                PromptFigures(
                    arm,
                    temperature,
                    name,
                    own[0].category,
                    own[0].mode,
                    own[0].prompt_tokens,
                    sum(r.decoded for r in own),
                    sum(len(r.accepted_lengths) for r in own),
                    sum(r.decode_s for r in own),
                )
            )
    return figures


# ---- what explains them ----------------------------------------------------------------------------------------------


def _draft_vocabulary(head: DraftHead | None) -> Tensor | None:
    """[vocab] bool, the tokens that the head can propose; None where that is all of them."""
    if head is None or head.module is None:
        return None
    return dict(head.module.named_buffers()).get("t2d")  # EAGLE's name, which heads with such a vocabulary keep


@torch.inference_mode()
def _explain(setting: Setting, records: Records, watched: Watched, explainer: Explainer) -> None:
    """Explain the rejections of the first repeat."""
    for index, (prompt, ids) in enumerate(zip(setting.prompts, setting.encoded, strict=True)):
        texts: dict[tuple[int, ...], list[str]] = {}
        for arm in watched:
            texts.setdefault(tuple(records[arm][index].token_ids), []).append(arm)
        for text, arms in texts.items():  # mostly one: greedy arms say the same
            wanted = sorted({r.row for arm in arms for r in rejected(watched[arm][index])})
            for rows, logits in distributions(setting.target, ids, text, wanted):
                for arm in arms:
                    explainer.add(arm, prompt.id, prompt.category, ids, watched[arm][index], rows, logits)


def _sample(setting: Setting) -> list[int]:
    """Prompts that stand for all of them, spread over the suite."""
    count = len(setting.prompts)
    wanted = min(SAMPLE, math.ceil(count / 2))
    return [number * count // wanted for number in range(wanted)]


@torch.inference_mode()
def _vocabulary_cap(setting: Setting, plain: Sequence[Record], temperature: float, drafts: Tensor) -> float:
    """The share of the target's mass that the draft vocabulary `drafts` ([vocab] bool) holds, at the plain texts'
    tokens. Greedy, a token has all of it; drawn text is looked at in a sample."""
    if temperature == 0:
        tokens = torch.tensor([token for r in plain[: len(setting.prompts)] for token in r.token_ids])
        return float(drafts.cpu()[tokens].double().mean())
    inside, count = 0.0, 0
    for index in _sample(setting):
        text = plain[index].token_ids
        for _, logits in distributions(setting.target, setting.encoded[index], text, range(len(text))):
            inside += float(warp(logits, temperature, setting.config.top_p)[:, drafts].sum())
            count += len(logits)
    return inside / count


def _limits(setting: Setting, records: Records, temperature: float, drafts: Tensor | None) -> list[Limits]:
    shapes = {arm: setting.shapes[arm] for arm in records if arm not in (PLAIN, NGRAM)}
    if not shapes:
        return []
    cap = None if drafts is None else _vocabulary_cap(setting, records[PLAIN], temperature, drafts)
    oracles = None
    if temperature > 0:
        contexts = []
        for index in _sample(setting):
            text = records[PLAIN][index].token_ids
            contexts.append([*setting.encoded[index], *text[: 1 + len(text) // 2]])  # from the middle of the text
        oracles = tree_oracles(setting.target, contexts, list(shapes.values()), temperature, setting.config.top_p)
    found = []
    for number, (arm, shape) in enumerate(shapes.items()):
        oracle = oracles[number] if oracles else None
        one = limits(arm, temperature, records[arm], records[PLAIN], shape, cap, oracle)
        found += [one] if one else []
    return found


def _costs(setting: Setting) -> dict[int, CostModel]:
    """Of passes of the first policy's arm at the configured batch sizes, as large as any arm's. Every arm starts from
    them, so that none measures again."""
    arm = next(iter(setting.policies), None)
    if arm is None:
        return {}
    decoder, costs = setting.arms[arm], {}
    trees = [tree for policy in setting.policies.values() for tree in tree_policies(policy)]
    rows = 1 + max(tree.total_tokens + (LONGEST if tree.lookup else 0) for tree in trees)
    for batch in setting.config.batches if setting.target.takes_trees else setting.config.batches[:1]:
        costs[batch] = measure_costs(
            setting.target, decoder.drafter, decoder.layers, batch, repeats=1, rows=rows, split=decoder.split
        )
    if 1 in costs:
        for other in setting.arms.values():
            other.experience.costs[1] = CostModel.from_json(costs[1].to_json())  # each learns on its own
    return costs
