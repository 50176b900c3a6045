"""What in a plan will go wrong or disappoint, each in a sentence with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator

from sstf.config import RunConfig
from sstf.data.config import RegenerateAnswers
from sstf.data.lint import TRAINED_SHARE
from sstf.planning.known_runs import known_runs, reached, tier_of
from sstf.planning.plan import Advice, Plan
from sstf.planning.volume import Volume
from sstf.targets import TargetSpec

# Held-out trained tokens from which checkpoints can be told apart: with about 2,000 anchors of a standard deviation
# near 1, the simulated accepted length is known to 0.02.
HELD_OUT_TOKENS = 2000
CUT_SHARE = 0.05  # of the conversations, cut at max_length
GIB = 2**30


def advise(plan: Plan, config: RunConfig, spec: TargetSpec, draft_vocab: int | None) -> Iterator[Advice]:
    """Everything worth saying.

    Args:
        plan: With all its figures.
        config: The run's.
        spec: Of the target.
        draft_vocab: Tokens that the head will propose; None without a head.
    """
    yield from _room(plan, config)
    if plan.data is not None and draft_vocab is not None:
        yield from _data(plan.data, config, spec)
        yield from _training(plan.data, config, draft_vocab)


def _room(plan: Plan, config: RunConfig) -> Iterator[Advice]:
    needed = plan.disk_needed
    if needed is not None and needed.high > plan.disk_free:
        smallest = min((f for f in plan.forms if f.bytes_per_token), key=lambda f: f.bytes_per_token or 0, default=None)
        how = "set output_dir to a larger disk"
        if smallest is not None and not plan.online:
            how += f", extract.codec={smallest.codec} to write less, or extract.online=true to store nothing"
        yield Advice(
            "error",
            f"The disk is too small: up to {needed.high / GIB:,.1f} GiB will be written under {plan.folder}, "
            f"{plan.disk_free / GIB:,.1f} GiB are free; {how}.",
        )
    for stage in plan.memory:
        if plan.spread or stage.bytes <= plan.memory_available:
            continue
        yield Advice(
            "error",
            f"Memory is too small for {stage.stage}: it needs about {stage.bytes / GIB:,.1f} GiB, {plan.device} has "
            f"{plan.memory_available / GIB:,.1f} GiB; {_less(plan, config, stage.stage)}.",
        )


def _less(plan: Plan, config: RunConfig, stage: str) -> str:
    """What to lower for a stage that does not fit."""
    answers = config.data.answers
    if stage == "regeneration" and isinstance(answers, RegenerateAnswers):
        if plan.slots_that_fit:
            return f"lower data.answers.slots from {answers.slots} to {plan.slots_that_fit}, or data.max_length"
        return "not even one slot fits; take another device, or spread the target with target.device_map"
    # The trainer has already taken the smallest micro-batch where it was free to.
    smaller = "data.max_length, method.ttt_steps or method.draft_vocab_size"
    training = smaller if config.train.batch_tokens == "auto" else "train.batch_tokens"
    setting = {
        "extraction": "extract.batch_tokens and extract.shard_tokens",
        "training": training,
        "rollouts": "on_policy.slots",
    }
    return f"lower {setting.get(stage, 'eval.max_new_tokens')}, or take a device with more memory"


def _data(data: Volume, config: RunConfig, spec: TargetSpec) -> Iterator[Advice]:
    most = config.data.max_length
    context = config.serving_context or spec.max_position_embeddings
    if most > spec.max_position_embeddings:
        yield Advice(
            "error",
            f"data.max_length is {most:,}, target {spec.name} has a context of {spec.max_position_embeddings:,}; lower "
            "it, or extraction will stop.",
        )
    low, high = TRAINED_SHARE
    if not low <= data.mask_share <= high:
        yield Advice(
            "error",
            f"{data.mask_share:.1%} of the tokens are trained, expected {low:.0%} to {high:.0%}; look at the "
            "conversations and the chat template (sstf data --preview).",
        )
    if most < context:
        yield Advice(
            "warning",
            f"data.max_length is {most:,} and the serving context {context:,}: beyond what it was trained on a head's "
            "acceptance falls; raise data.max_length, or set serving_context to what you serve.",
        )
    if data.cut_share > CUT_SHARE:
        yield Advice(
            "warning",
            f"{data.cut_share:.0%} of the conversations are cut at data.max_length {most:,}; raise it.",
        )
    if data.conversations is None:
        yield Advice(
            "warning",
            "The source does not say how many conversations it holds, so disk and hours are unknown; set "
            "data.max_conversations to plan for that many.",
        )
    tokens = data.tokens
    if tokens is not None and tier_of(tokens.middle) == "smoke":
        smoke, prod = reached(known_runs(), "smoke"), reached(known_runs(), "prod")
        yield Advice(
            "warning",
            f"{tokens.middle:,.0f} tokens are smoke-sized: known runs of this size reached an accepted length of "
            f"{smoke[0]:.2f} to {smoke[1]:.2f}, those on 100 million tokens and more {prod[0]:.2f} to {prod[1]:.2f}; "
            "use more conversations for a head worth serving.",
        )


def _training(data: Volume, config: RunConfig, draft_vocab: int) -> Iterator[Advice]:
    train = config.train
    by_count = train.draft_vocab == "frequency"  # by mass, tokens get in that were never trained
    if by_count and data.distinct_trained is not None and draft_vocab > data.distinct_trained:
        about = "" if data.exact else "about "
        yield Advice(
            "warning",
            f"The draft vocabulary has {draft_vocab:,} tokens, the data trains {about}{data.distinct_trained:,.0f} "
            "different ones: the others get in by their number alone; lower method.draft_vocab_size, set "
            "train.draft_vocab=mass, or use more data.",
        )
    if data.longest > train.step_tokens:
        yield Advice(
            "warning",
            f"The longest conversation has {data.longest:,} tokens, train.step_tokens is {train.step_tokens:,}: such "
            "a conversation is a batch of its own, larger than asked for; memory is planned for it.",
        )
    if train.validation_conversations == 0:
        yield Advice(
            "warning",
            "train.validation_conversations is 0: the last head is kept, not the best, and nothing warns of "
            "overtraining; hold some conversations out.",
        )
    elif data.conversations is not None:
        held_out = min(train.validation_conversations, data.conversations // 4)
        trained = held_out * data.trained_each.middle
        if trained < HELD_OUT_TOKENS:
            yield Advice(
                "warning",
                f"{held_out} held-out conversations have about {trained:,.0f} trained tokens: too few to tell "
                f"checkpoints apart; raise train.validation_conversations until they have {HELD_OUT_TOKENS:,}.",
            )
