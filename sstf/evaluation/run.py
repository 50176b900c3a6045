"""Run a suite through plain decoding, prompt lookup and a head, interleaved, and summarise.

One arm is one way to decode. Every prompt goes through all arms before the next prompt, so drift of the machine's
speed hits all alike; all run through the same engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from sstf.data.chat_template import render_prompt
from sstf.data.progress import Progress
from sstf.decode import SpeculativeDecoder
from sstf.errors import DataError
from sstf.evaluation.config import NGRAM, PLAIN, EvalConfig
from sstf.evaluation.metrics import (
    Record,
    acceptance_rate,
    accepted_length,
    bootstrap,
    repetition,
    survival,
    tokens_per_second,
)
from sstf.evaluation.suites import Prompt, load_suite
from sstf.methods import NgramConfig, build_method
from sstf.methods.checkpoint import DraftHead
from sstf.targets import Target
from sstf.trees import Chain

BROKEN_BELOW = 1.05  # an accepted length this near 1 means a broken head or export, not a weak one
REPETITIVE_ABOVE = 0.5
ALL = "all"  # the category of the overall rows, and of prompts that name none


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
    identical: float | None  # share of prompts with the plain row's tokens (greedy only; bf16 near-ties may differ)
    repetition: float
    void: str | None  # why the row must not be quoted


def evaluate(
    target: Target, head: DraftHead | None, config: EvalConfig, progress: Progress, seed: int = 0
) -> list[Row]:
    """Measure; `head=None` measures the free baselines alone.

    Raises:
        DataError: the suite cannot be used, or its prompts do not fit the target's context.
    """
    prompts = load_suite(config.suite, config.prompts)
    encoded = [render_prompt(target.tokenizer, prompt.messages) for prompt in prompts]
    longest = max(len(ids) for ids in encoded) + config.max_new_tokens
    if longest > target.spec.max_position_embeddings:
        raise DataError(
            f"suite {config.suite}: a prompt and max_new_tokens need {longest} tokens, the target's context has "
            f"{target.spec.max_position_embeddings}; lower eval.max_new_tokens"
        )
    arms = _arms(target, head, config)
    depths = {PLAIN: 0, NGRAM: config.ngram_depth} | {name: policy.depth for name, policy in config.policies.items()}
    for decoder in arms.values():  # warm-up: first calls allocate and pick kernels
        decoder.generate(encoded[0], 8)
    rows: list[Row] = []
    with progress.start("evaluation", len(config.temperatures) * config.repeats * len(prompts), "prompts") as bar:
        for temperature in config.temperatures:
            records: dict[str, list[Record]] = {name: [] for name in arms}
            for repeat in range(config.repeats):
                for index, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
                    for name, decoder in arms.items():
                        made = decoder.generate(
                            ids, config.max_new_tokens, temperature, config.top_p, seed=seed + repeat * 7919 + index
                        )
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
                            )
                        )
                    bar.advance(1)
            rows += _summarise(
                records, prompts, temperature, depths, trained=head is not None and head.module is not None
            )
    return rows


def _arms(target: Target, head: DraftHead | None, config: EvalConfig) -> dict[str, SpeculativeDecoder]:
    ngram = DraftHead(NGRAM, build_method(NgramConfig()))
    arms = {
        PLAIN: SpeculativeDecoder(target, None),
        NGRAM: SpeculativeDecoder(target, ngram, Chain(depth=config.ngram_depth)),
    }
    if head is not None:
        arms |= {name: SpeculativeDecoder(target, head, policy) for name, policy in config.policies.items()}
    return arms


def _summarise(
    records: dict[str, list[Record]],
    prompts: Sequence[Prompt],
    temperature: float,
    depths: dict[str, int],
    trained: bool,
) -> list[Row]:
    rows = []
    categories = dict.fromkeys([ALL, *(prompt.category for prompt in prompts)])
    for arm, made in records.items():
        for category in categories:
            picked = [i for i, r in enumerate(made) if category in (ALL, r.category)]
            plain = [records[PLAIN][i] for i in picked]
            row = _row(arm, temperature, category, [made[i] for i in picked], plain, depths[arm])
            why = None if arm == PLAIN else _void(row, has_head=trained and arm != NGRAM)
            rows.append(replace(row, void=why))
    return rows


def _row(arm: str, temperature: float, category: str, made: list[Record], plain: list[Record], depth: int) -> Row:
    names = list(dict.fromkeys(r.prompt for r in made))
    by_prompt = [[i for i, r in enumerate(made) if r.prompt == name] for name in names]

    def pick(records: list[Record], drawn: Sequence[int]) -> list[Record]:
        return [records[i] for prompt in drawn for i in by_prompt[prompt]]

    def speedup(drawn: Sequence[int]) -> float:
        base = tokens_per_second(pick(plain, drawn))
        return tokens_per_second(pick(made, drawn)) / base if base else 0.0

    tau = accepted_length(made)
    passes = max(1, sum(len(r.accepted_lengths) for r in made))
    # Lookup branches may reach deeper than the policy.
    survived = survival(made, max([depth, *(length - 1 for r in made for length in r.accepted_lengths)]))
    ratio = speedup(range(len(names)))
    loops = sum(repetition(r.token_ids) for r in made) / len(made)
    same = sum(a.token_ids == b.token_ids for a, b in zip(made, plain, strict=True)) / len(made)
    return Row(
        arm=arm,
        temperature=temperature,
        category=category,
        prompts=len(names),
        accepted_length=tau,
        accepted_length_ci=bootstrap(lambda drawn: accepted_length(pick(made, drawn)), len(names)),
        survival=survived,
        acceptance_rate=acceptance_rate(survived),
        tokens_per_second=tokens_per_second(made),
        speedup=ratio,
        speedup_ci=bootstrap(speedup, len(names)),
        draft_ms=1e3 * sum(r.draft_s for r in made) / passes,
        verify_ms=1e3 * sum(r.verify_s for r in made) / passes,
        identical=same if temperature == 0 else None,
        repetition=loops,
        void=None,
    )


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


def rows_to_json(rows: Sequence[Row]) -> list[dict[str, object]]:
    """For the report."""
    return [asdict(row) for row in rows]
