"""Checks on the samples of a run: what the linter counts, and whether the chat template keeps what was said.

The limits are the linter's own (`data/lint.py`); of several sources the worst one is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from sstf.data.answers import conversation_from_json
from sstf.data.chat_template import render_turns
from sstf.data.config import Turns
from sstf.data.lint import CHECKS, TRAINED, TRAINED_SHARE, TRAINED_SHARE_ADVICE, Finding, lint
from sstf.doctor.report import Check, Question, Verdict
from sstf.errors import DataError
from sstf.types import TokenSample

LOOKED_AT = 2000  # samples, evenly taken
RENDERED = 500  # conversations

VERDICTS: dict[str, Verdict] = {"fine": "pass", "warning": "warn", "error": "fail"}

MASK = Question(
    "data",
    TRAINED,
    f"{TRAINED_SHARE[0]:.0%} to {TRAINED_SHARE[1]:.0%} of each source's tokens are trained",
    TRAINED_SHARE_ADVICE,
)
TEMPLATE = Question(
    "data",
    "chat template",
    "for every turn the rendered prompt is the beginning of the rendered answer",
    "Use a template that leaves earlier turns as they are, or data.turns=each or last; see the message.",
)


def _limits(warning: float | None, error: float | None, among: str) -> str:
    parts = [] if warning is None else [f"warned above {warning:.0%} of {among}"]
    parts += [] if error is None else [f"failed above {error:.0%}{'' if parts else f' of {among}'}"]
    return ", ".join(parts)


LINTED = tuple(
    Question("data", check.name, _limits(check.warning, check.error, check.among), check.advice) for check in CHECKS
)
QUESTIONS = (MASK, TEMPLATE, *LINTED)


def check_data(
    samples: Sequence[TokenSample],
    sources: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    max_length: int,
    turns: Turns,
) -> list[Check]:
    """All of them.

    Args:
        samples: as they are trained.
        sources: the source of each.
        rows: the conversations that they were rendered from, in the data stage's form.
        tokenizer: the target's.
        vocab_size: of the target.
        max_length: in tokens.
        turns: which answers are trained, see `DataConfig`.
    """
    picked = [i * len(samples) // LOOKED_AT for i in range(LOOKED_AT)] if len(samples) > LOOKED_AT else None
    looked_at = samples if picked is None else [samples[i] for i in picked]
    of = sources if picked is None else [sources[i] for i in picked]
    unmasked = {str(row["source"]) for row in rows if "messages" not in row}
    found = lint(looked_at, of, tokenizer, max_length, vocab_size, unmasked).findings
    by_name = {question.name: question for question in (MASK, *LINTED)}
    linted = [_worst(question, [f for f in found if f.check == name]) for name, question in by_name.items()]
    return [linted[0], check_template(rows, tokenizer, turns), *linted[1:]]


def check_template(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, turns: Turns) -> Check:
    """Render conversations again with the target's template as it is now."""
    conversations = [conversation_from_json(dict(row)) for row in rows if "messages" in row][:RENDERED]
    if not conversations:
        return TEMPLATE.skipped("no conversation to render: the data stage is not done, or its rows are plain text")
    refused = []
    for conversation in conversations:
        try:
            render_turns(tokenizer, conversation, turns)
        except DataError as error:
            refused.append(str(error))
    text = f"{len(refused):,} of {len(conversations):,} conversations are refused"
    figures = {"refused": float(len(refused)), "conversations": float(len(conversations))}
    if refused:
        return TEMPLATE.answer("fail", f"{text}: {refused[0].rstrip('.')}", figures)
    return TEMPLATE.answer("pass", text, figures)


def _worst(question: Question, found: Sequence[Finding]) -> Check:
    if not found:
        return question.skipped("every source is plain text, of which all is trained")
    worst = max(found, key=lambda f: (("fine", "warning", "error").index(f.verdict), f.count / max(1, f.total)))
    share = worst.count / max(1, worst.total)
    text = f"{worst.count:,} of {worst.total:,} {worst.among} ({share:.1%})"
    text += f" of {worst.source}" if len(found) > 1 else ""
    return question.answer(VERDICTS[worst.verdict], text, {"share": share})
