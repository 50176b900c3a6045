"""The data stage: source -> conversations -> answers -> token ids and loss mask, with a report of all that was lost.

Written to the stage's folder: `tokens.safetensors` and `tokens.json` (see `tokens`), `conversations.jsonl` (the final
texts, readable, and a source for other runs), `report.json` and `lint.json`. What the target wrote lies in a folder of
its own, whose name depends on what generation depends on, so another filter or mask generates nothing anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sstf.data.answers import AnsweredConversation, item_to_json
from sstf.data.atomic import jsonl_bytes, write_bytes_atomic, write_json_atomic
from sstf.data.chat_template import with_system_prompt
from sstf.data.config import DataConfig, KeepAnswers, SelfWrittenSource
from sstf.data.conversations import ReadReport, read_conversations
from sstf.data.decontamination import DecontaminationReport, Decontaminator
from sstf.data.filters import (
    CONTAMINATED,
    LOOP,
    NEAR_DUPLICATE,
    loops,
    requests_of,
    texts_of,
    without_near_duplicates,
)
from sstf.data.groups import GroupFiles, fingerprint, tokenizer_fingerprint
from sstf.data.lint import OUTSIDE, TRAINED, LintReport, lint
from sstf.data.minhash import Diversity, diversity
from sstf.data.progress import Progress
from sstf.data.regenerate import regenerate
from sstf.data.rows import Item
from sstf.data.sampler import LazySampler, Sampler
from sstf.data.samples import samples as samples_of
from sstf.data.self_written import write_prompts
from sstf.data.tokens import TokenStore, vocabulary_coverage
from sstf.errors import DataError
from sstf.types import Conversation, TokenSample

TOO_FEW = "fewer than min_trained_tokens within max_length"


@dataclass
class DataReport:
    """What the data stage read, kept, cut and dropped.

    `mask_share` is trained tokens over all tokens. `vocabulary_coverage`: size of a draft vocabulary -> share of the
    trained tokens of every tenth sample that it holds, if it is chosen by frequency from the others. `suites` are those
    whose prompts were looked for.
    """

    read: ReadReport
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    mask_share: float = 0.0
    cut_at_max_length: int = 0
    unfinished_answers: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    suites: list[str] = field(default_factory=list)
    contamination: DecontaminationReport = field(default_factory=DecontaminationReport)
    requests: Diversity | None = None
    vocabulary_coverage: dict[int, float] = field(default_factory=dict)

    def drop(self, reason: str, count: int = 1) -> None:
        """Count what is left out."""
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count


@dataclass(frozen=True)
class DataTarget:
    """The target as the data stage sees it.

    `sampler` loads it and is called only if something must be generated. `identity` tells generated groups of one
    target from those of another with the same tokenizer.
    """

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    sampler: Callable[[], Sampler]
    identity: str = ""

    @property
    def fingerprint(self) -> str:
        """What generated text depends on, beside settings and conversations."""
        return fingerprint(self.identity, tokenizer_fingerprint(self.tokenizer))


def build(
    config: DataConfig,
    target: DataTarget,
    folder: Path,
    generated: Path,
    progress: Progress,
    suites: Mapping[str, Sequence[str]],
) -> DataReport:
    """Run the data stage in `folder`; run again after an interruption, it goes on where it was.

    Args:
        config: The `data` section.
        target: Its tokenizer, and how to let it write.
        folder: Where the results are written.
        generated: Where what the target writes is kept, group by group.
        progress: Shows the steps.
        suites: Texts of the prompts that must not be trained on, by suite.

    Returns:
        The report, which is also `report.json`.

    Raises:
        DataError: The source, the chat template or the resulting mask cannot be used.
        DamagedDataError: A group in `generated` was altered.
    """
    sampler = LazySampler(target.sampler)
    conversations, read = _conversations(config, target, sampler, generated, progress)
    report = DataReport(read, suites=list(suites))
    if config.filters.near_duplicates and not isinstance(config.source, SelfWrittenSource):  # looks while it draws
        found = len(conversations)
        conversations = without_near_duplicates(conversations, config.filters.near_duplicates)
        report.drop(NEAR_DUPLICATE, found - len(conversations))
    kept: list[Item] = []
    samples: list[TokenSample] = []
    sources: list[str] = []
    answered = _answered(config, conversations, target, sampler, generated, progress)
    index = Decontaminator(suites)
    with progress.start("render", len(answered), "conversations") as task:
        for entry in answered:
            task.advance()
            if isinstance(entry, AnsweredConversation):
                item: Item = entry.conversation
                answers, cut = entry.answers, entry.cut
            else:
                item, answers, cut = entry, None, False
            match = index.match_any(texts_of(item))
            report.contamination.add(item.id, match)
            if match is not None:
                report.drop(CONTAMINATED)
                continue
            own: list[TokenSample] = []
            for whole in samples_of(item, target.tokenizer, config.turns, answers):
                sample = _cut(whole, config.max_length)
                if sum(sample.loss_mask) < config.min_trained_tokens:
                    report.drop(TOO_FEW)
                elif config.filters.loops and isinstance(item, Conversation) and loops(sample):
                    report.drop(LOOP)
                else:
                    report.cut_at_max_length += cut or len(whole.input_ids) > config.max_length
                    own.append(sample)
            if own:
                report.unfinished_answers += sum(not answer.finished for answer in answers or () if answer is not None)
                kept.append(item)
                samples += own
                sources += [item.source] * len(own)
    report.kept = len(samples)
    report.tokens = sum(len(sample.input_ids) for sample in samples)
    report.trained_tokens = sum(sum(sample.loss_mask) for sample in samples)
    if not samples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        raise DataError(
            f"No conversation is left to train on; dropped: {reasons}. Raise data.max_length, lower "
            "data.min_trained_tokens, or look at data.filters."
        )
    report.mask_share = report.trained_tokens / report.tokens
    report.requests = diversity([text for item in kept if (text := requests_of(item)) is not None])
    report.vocabulary_coverage = vocabulary_coverage(samples, target.vocab_size)
    unmasked = {item.source for item in kept if not isinstance(item, Conversation)}
    findings = lint(samples, sources, target.tokenizer, config.max_length, target.vocab_size, unmasked)
    write_json_atomic(folder / "lint.json", findings.to_json())
    _check(findings)
    TokenStore(folder).write(samples, sources)
    write_bytes_atomic(folder / "conversations.jsonl", jsonl_bytes([item_to_json(item) for item in kept]))
    write_json_atomic(folder / "report.json", asdict(report))
    return report


def preview_samples(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, limit: int
) -> list[tuple[TokenSample, str]]:
    """The first samples of the source with the answers that it came with, and the source of each; nothing is generated.

    Raises:
        DataError: The source or the chat template cannot be used, or no conversation has an answer.
    """
    if isinstance(config.source, SelfWrittenSource):
        raise DataError("The target has still to write these conversations: run `sstf data` first, then preview them.")
    few = min(limit, config.max_conversations or limit)
    read = read_conversations(config.model_copy(update={"answers": KeepAnswers(), "max_conversations": few}))
    found = []
    for item in read.items:
        if isinstance(item, Conversation):
            item = with_system_prompt(shortened(item, config.max_turns), config.system_prompt)
        found += [(_cut(s, config.max_length), item.source) for s in samples_of(item, tokenizer, config.turns)]
    return found


def _conversations(
    config: DataConfig, target: DataTarget, sampler: Sampler, generated: Path, progress: Progress
) -> tuple[list[Item], ReadReport]:
    conversations: list[Item]
    prompt = config.system_prompt
    if isinstance(config.source, SelfWrittenSource):
        source = config.source
        if config.max_conversations is not None:
            source = source.model_copy(update={"conversations": min(source.conversations, config.max_conversations)})
        files = GroupFiles(generated, "prompts", target.fingerprint)
        repeats = config.filters.near_duplicates
        written = write_prompts(target.tokenizer, sampler, source, files, progress, prompt, repeats)
        conversations = [*written.conversations]
        read = ReadReport(written.drawn, len(conversations), written.dropped)
    else:
        found = read_conversations(config)
        conversations, read = found.items, found.report
    used = [shortened(c, config.max_turns) if isinstance(c, Conversation) else c for c in conversations]
    return [with_system_prompt(c, prompt) if isinstance(c, Conversation) else c for c in used], read


def shortened(conversation: Conversation, max_turns: int | None) -> Conversation:
    """The conversation up to where its request number `max_turns` is answered."""
    requests = [i for i, message in enumerate(conversation.messages) if message.role == "user"]
    if max_turns is None or len(requests) <= max_turns:
        return conversation
    return replace(conversation, messages=conversation.messages[: requests[max_turns]])


def _answered(
    config: DataConfig,
    conversations: list[Item],
    target: DataTarget,
    sampler: Sampler,
    generated: Path,
    progress: Progress,
) -> Sequence[Item | AnsweredConversation]:
    if isinstance(config.answers, KeepAnswers):
        return conversations
    files = GroupFiles(generated, "answers", target.fingerprint)
    asked = [c for c in conversations if isinstance(c, Conversation)]  # all: others are refused when they are read
    length, turns = config.max_length, config.turns
    return regenerate(asked, target.tokenizer, sampler, config.answers, files, progress, length, turns)


def _cut(sample: TokenSample, max_length: int) -> TokenSample:
    return TokenSample(sample.id, sample.input_ids[:max_length], sample.loss_mask[:max_length])


def _check(report: LintReport) -> None:
    """Fail closed where the masks or the ids cannot be right; other findings are for people to weigh."""
    for finding in report.findings:
        if finding.verdict == "error" and finding.check in (TRAINED, OUTSIDE):
            raise DataError(
                f"{finding.source}: {finding.count} of {finding.total} {finding.among} are "
                f"{'trained' if finding.check == TRAINED else finding.check}. {finding.advice}"
            )
