"""Looks through rendered samples, source by source, for what spoils the training of a head, and says what to do.

Every check counts something among samples, answers or tokens; its share gives the verdict by the limits beside it in
`CHECKS`. An answer is a run of trained tokens. Only what the token ids and the mask can tell is looked at: whether the
answers are the target's own, or belong to the evaluation, is up to other checks.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from sstf.data.filters import trained_runs
from sstf.data.minhash import NearDuplicates
from sstf.data.preview import special_ids, visible
from sstf.data.repetition import repetition
from sstf.types import TokenSample

Verdict = Literal["fine", "warning", "error"]

# Outside of it the mask is wrong, not the data: a prompt and an answer were both rendered, or neither.
TRAINED_SHARE = (0.01, 0.99)
# Of trained text. Answers shorter than this are often the same with good reason ("Yes, that is correct.").
NEAR_DUPLICATE = 0.7
NEAR_DUPLICATE_TOKENS = 32
EXAMPLES = 3  # sample ids with each finding
TRAINED, OUTSIDE = "trained share", "ids outside the vocabulary"


@dataclass(frozen=True)
class Check:
    """What is counted among what, and the shares ABOVE which it is a warning, or an error (None: never)."""

    name: str
    among: Literal["samples", "answers", "tokens"]
    warning: float | None
    error: float | None
    advice: str


_OUTSIDE = Check(
    OUTSIDE,
    "tokens",
    # Embedding a single one of them ends the run.
    warning=None,
    error=0.0,
    advice="The tokenizer belongs to another target; use the one that comes with it.",
)
_UNKNOWN = Check(
    "unknown tokens",
    "tokens",
    # A byte-level tokenizer has none at all; in others a rare sign is normal and a script that it cannot write is not.
    warning=0.0,
    error=0.01,
    advice="The tokenizer cannot write this text; leave the source out, or check that the tokenizer is the target's.",
)
_NOTHING_TRAINED = Check(
    "nothing trained",
    "samples",
    # Each costs a forward pass for nothing; if most are so, the answers lie beyond max_length.
    warning=0.0,
    error=0.5,
    advice="Raise max_length above the prompts, or min_trained_tokens to 1 or more.",
)
_CUT = Check(
    "as long as max_length",
    "samples",
    # These were cut, barring chance. Endings and late positions are then seldom trained.
    warning=0.1,
    error=None,
    advice="Raise max_length if the device allows, at best to the length that is served.",
)
_SAME = Check(
    "exact duplicates",
    "samples",
    # A percent is chance, or short greetings; half is the same file given twice.
    warning=0.01,
    error=0.4,
    advice="Remove the copies: they are trained twice and make held-out figures too good.",
)
_SIMILAR = Check(
    "near duplicates of an answer",
    "samples",
    warning=0.05,
    error=None,
    advice="Remove prompts that ask the same, or draw answers at a higher temperature.",
)
_UNFINISHED = Check(
    "answers without an end token",
    "answers",
    # Cut at max_new_tokens they are usable text; if nearly all are, the mask itself leaves the end token out.
    warning=0.1,
    error=0.95,
    advice="Raise max_new_tokens; if no answer ends at all, check that the mask covers the end-of-turn token.",
)
_END_INSIDE = Check(
    "end of a turn inside an answer",
    "answers",
    # The text may quote the marker. More than that, and what is trained goes on into the next turn.
    warning=0.0,
    error=0.01,
    advice="Look at these samples with --preview: the mask runs over the end of a turn, or the data quotes the marker.",
)
_SPECIAL_INSIDE = Check(
    "special tokens inside an answer",
    "answers",
    # Some templates mark tool calls by special tokens, which is right.
    warning=0.0,
    error=None,
    advice="Right for tool calls; else clean the data: text that spells a special token becomes one.",
)
_LOOPING = Check(
    "answers stuck in a loop",
    "answers",
    # They raise the accepted length of a head that has learned nothing else.
    warning=0.01,
    error=0.25,
    advice="Drop them, or raise the temperature of regeneration.",
)
CHECKS = (
    _OUTSIDE,
    _UNKNOWN,
    _NOTHING_TRAINED,
    _CUT,
    _SAME,
    _SIMILAR,
    _UNFINISHED,
    _END_INSIDE,
    _SPECIAL_INSIDE,
    _LOOPING,
)
TRAINED_SHARE_ADVICE = (
    "Nothing, or everything, is trained: look at the samples with --preview, the chat template or the roles are wrong."
)


@dataclass(frozen=True)
class SourceFigures:
    """How much of a source there is. `trained_share` is trained tokens over all tokens."""

    source: str
    samples: int
    answers: int
    tokens: int
    trained_tokens: int
    trained_share: float


@dataclass(frozen=True)
class Finding:
    """`count` of `total` samples, answers or tokens of a source; `examples` are the first few sample ids.

    `advice` is empty if the verdict is `fine`.
    """

    source: str
    check: str
    verdict: Verdict
    count: int
    total: int
    among: str
    examples: tuple[str, ...]
    advice: str


@dataclass(frozen=True)
class LintReport:
    """Figures of each source and the finding of each check on it, those that are fine included."""

    sources: tuple[SourceFigures, ...]
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst one."""
        found = {finding.verdict for finding in self.findings}
        return "error" if "error" in found else "warning" if "warning" in found else "fine"

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return {"verdict": self.verdict, **asdict(self)}


def lint(
    samples: Sequence[TokenSample],
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    vocab_size: int,
    unmasked: Collection[str] = (),
) -> LintReport:
    """Check all samples.

    Args:
        samples: As they are trained, cut at `max_length`.
        sources: The source of each sample.
        tokenizer: The target's.
        max_length: In tokens.
        vocab_size: Of the target: ids at or above it have no embedding.
        unmasked: Sources of which everything may be trained: plain text, and token ids with a mask of their own.
    """
    special = special_ids(tokenizer)
    end = _end_token(samples, special)
    unknown = _unknown_token(tokenizer)
    found: dict[str, dict[Check, _Count]] = defaultdict(lambda: {check: _Count() for check in CHECKS})
    answers: Counter[str] = Counter()
    members: dict[str, list[TokenSample]] = defaultdict(list)
    seen: set[bytes] = set()
    near = NearDuplicates(NEAR_DUPLICATE)
    for sample, source in zip(samples, sources, strict=True):
        counts, ids = found[source], sample.input_ids
        own = list(trained_runs(sample))
        answers[source] += len(own)
        members[source].append(sample)
        cut = len(ids) >= max_length
        last_is_cut = cut and bool(sample.loss_mask) and sample.loss_mask[-1]
        ends = [tokens[-1] for tokens in own]

        counts[_OUTSIDE].add(sample.id, sum(not 0 <= token < vocab_size for token in ids))
        if unknown is not None:  # an answer may end with it, where it is the end-of-text token as well
            counts[_UNKNOWN].add(sample.id, ids.count(unknown) - ends.count(unknown))
        counts[_NOTHING_TRAINED].add(sample.id, not own)
        counts[_CUT].add(sample.id, cut)
        counts[_UNFINISHED].add(sample.id, sum(token not in special for token in (ends[:-1] if last_is_cut else ends)))
        counts[_END_INSIDE].add(sample.id, sum(end in tokens[:-1] for tokens in own))
        counts[_SPECIAL_INSIDE].add(sample.id, sum(bool(special & {*tokens[:-1]} - {end}) for tokens in own))
        counts[_LOOPING].add(sample.id, sum(repetition(tokens) is not None for tokens in own))

        key = hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=16).digest()
        counts[_SAME].add(sample.id, key in seen)
        trained = [token for tokens in own for token in tokens if 0 <= token < len(tokenizer)]
        if key not in seen and len(trained) >= NEAR_DUPLICATE_TOKENS:
            text = tokenizer.decode(trained, skip_special_tokens=True)
            counts[_SIMILAR].add(sample.id, near.add(str(text)) is not None)
        seen.add(key)
    figures = [_figures(source, those, answers[source]) for source, those in members.items()]
    findings = [
        finding
        for own in figures
        for finding in (*_trained_share(own, own.source in unmasked), *_judge(own, found[own.source]))
    ]
    return LintReport(tuple(figures), tuple(findings))


def print_lint(console: Console, report: LintReport) -> None:
    """A table of the sources, and what is not fine."""
    sources = Table("source", title="Samples")
    for name in ("samples", "answers", "tokens", "trained", "share"):
        sources.add_column(name, justify="right")
    for own in report.sources:
        counts = (own.samples, own.answers, own.tokens, own.trained_tokens)
        sources.add_row(Text(visible(own.source)), *(f"{count:,}" for count in counts), f"{own.trained_share:.1%}")
    console.print(sources)
    open_findings = [finding for finding in report.findings if finding.verdict != "fine"]
    # Not a table: at 80 columns its advice would stand in one word a line.
    for finding in sorted(open_findings, key=lambda finding: finding.verdict != "error"):
        share = _share(finding.count, finding.total)
        line = Text(finding.verdict, "bold red" if finding.verdict == "error" else "yellow")
        line.append(f": {visible(finding.source)}: {finding.check}: ", "default")
        line.append(f"{finding.count:,} of {finding.total:,} {finding.among} ({share:.1%})", "default")
        if finding.examples:
            line.append(", as " + ", ".join(visible(name) for name in finding.examples), "dim")
        console.print(line)
        console.print(Text(f"  {finding.advice}"))
    fine = len(report.findings) - len(open_findings)
    console.print(f"{fine} of {len(report.findings)} checks are fine.")


@dataclass
class _Count:
    """How often, and in which samples first."""

    count: int = 0
    examples: tuple[str, ...] = ()

    def add(self, name: str, count: int) -> None:
        self.count += count
        if count and len(self.examples) < EXAMPLES:
            self.examples = (*self.examples, name)


def _end_token(samples: Iterable[TokenSample], special: set[int]) -> int | None:
    """The special token that most answers end with: the template's end of an assistant turn."""
    ends = Counter(tokens[-1] for sample in samples for tokens in trained_runs(sample) if tokens[-1] in special)
    return max(ends, key=lambda token: (ends[token], -token), default=None)


def _unknown_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """None where there is none, or where the same token stands for the beginning or the end as well."""
    unknown: int | None = tokenizer.unk_token_id
    return None if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) else unknown


def _figures(source: str, own: Sequence[TokenSample], answers: int) -> SourceFigures:
    tokens = sum(len(sample.input_ids) for sample in own)
    trained = sum(sum(sample.loss_mask) for sample in own)
    return SourceFigures(source, len(own), answers, tokens, trained, _share(trained, tokens))


def _trained_share(own: SourceFigures, unmasked: bool) -> Iterable[Finding]:
    if unmasked:
        return
    low, high = TRAINED_SHARE
    verdict: Verdict = "fine" if low <= own.trained_share <= high else "error"
    advice = "" if verdict == "fine" else TRAINED_SHARE_ADVICE
    yield Finding(own.source, TRAINED, verdict, own.trained_tokens, own.tokens, "tokens", (), advice)


def _judge(own: SourceFigures, counts: dict[Check, _Count]) -> Iterable[Finding]:
    totals = {"samples": own.samples, "answers": own.answers, "tokens": own.tokens}
    for check, found in counts.items():
        share = _share(found.count, totals[check.among])
        verdict: Verdict = "fine"
        if check.error is not None and share > check.error:
            verdict = "error"
        elif check.warning is not None and share > check.warning:
            verdict = "warning"
        yield Finding(
            own.source,
            check.name,
            verdict,
            found.count,
            totals[check.among],
            check.among,
            found.examples,
            "" if verdict == "fine" else check.advice,
        )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
