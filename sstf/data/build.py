"""The data stage: source -> conversations -> answers -> token ids and loss mask, with a report of all that was lost.

Written to the stage's folder: `tokens.safetensors` and `tokens.json` (see `tokens`), `conversations.jsonl` (the final
texts, readable, and a source for other runs), `report.json`, and the groups that generation resumes from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sstf.data.answers import AnsweredConversation, conversation_to_json
from sstf.data.atomic import jsonl_bytes, write_bytes_atomic, write_json_atomic
from sstf.data.chat_template import render, with_system_prompt
from sstf.data.config import DataConfig, KeepAnswers, SelfWrittenSource
from sstf.data.conversations import ReadReport, read_conversations
from sstf.data.groups import GroupFiles, fingerprint, tokenizer_fingerprint
from sstf.data.progress import Progress
from sstf.data.regenerate import regenerate
from sstf.data.sampler import LazySampler, Sampler
from sstf.data.self_written import write_prompts
from sstf.data.tokens import TokenStore
from sstf.errors import DataError
from sstf.types import Conversation, TokenSample

TOO_FEW = "fewer than min_trained_tokens within max_length"
MASK_SHARE_LIMITS = (0.01, 0.99)


@dataclass
class DataReport:
    """What the data stage read, kept, cut and dropped. `mask_share` is trained tokens over all tokens."""

    read: ReadReport
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    mask_share: float = 0.0
    cut_at_max_length: int = 0
    unfinished_answers: int = 0
    dropped: dict[str, int] = field(default_factory=dict)


def build(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    sampler_factory: Callable[[], Sampler],
    folder: Path,
    progress: Progress,
    target_name: str = "",
) -> DataReport:
    """Run the data stage in `folder`; run again after an interruption, it goes on where it was.

    Args:
        config: The `data` section.
        tokenizer: The target's, with a chat template.
        sampler_factory: Loads the target; called only if something must be generated.
        folder: Where everything is written.
        progress: Shows the steps.
        target_name: Tells generated groups of one target from those of another with the same tokenizer.

    Returns:
        The report, which is also `report.json`.

    Raises:
        DataError: The source, the chat template or the resulting mask cannot be used.
        DamagedDataError: A group in `folder` was altered.
    """
    made_from = fingerprint(target_name, tokenizer_fingerprint(tokenizer))
    sampler = LazySampler(sampler_factory)
    conversations, read = _conversations(config, tokenizer, sampler, folder, made_from, progress)
    report = DataReport(read)
    kept: list[Conversation] = []
    samples: list[TokenSample] = []
    answered = _answered(config, conversations, tokenizer, sampler, folder, made_from, progress)
    with progress.start("render", len(answered), "conversations") as task:
        for item in answered:
            whole = render(tokenizer, item.conversation, None, answers=item.answers)
            sample = _cut(whole, config.max_length)
            task.advance()
            report.cut_at_max_length += item.cut or len(whole.input_ids) > config.max_length
            trained = sum(sample.loss_mask)
            if trained < config.min_trained_tokens:
                report.dropped[TOO_FEW] = report.dropped.get(TOO_FEW, 0) + 1
                continue
            report.unfinished_answers += sum(not answer.finished for answer in item.answers or ())
            report.tokens += len(sample.input_ids)
            report.trained_tokens += trained
            kept.append(item.conversation)
            samples.append(sample)
    report.kept = len(samples)
    _check(report, config)
    TokenStore(folder).write(samples)
    write_bytes_atomic(folder / "conversations.jsonl", jsonl_bytes([conversation_to_json(c) for c in kept]))
    write_json_atomic(folder / "report.json", asdict(report))
    return report


def _conversations(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    sampler: Sampler,
    folder: Path,
    made_from: str,
    progress: Progress,
) -> tuple[list[Conversation], ReadReport]:
    if isinstance(config.source, SelfWrittenSource):
        source = config.source
        if config.max_conversations is not None:
            source = source.model_copy(update={"conversations": min(source.conversations, config.max_conversations)})
        files = GroupFiles(folder, "prompts", made_from)
        written = write_prompts(tokenizer, sampler, source, files, progress, config.system_prompt)
        conversations = written.conversations
        read = ReadReport(written.drawn, len(conversations), written.dropped)
    else:
        found = read_conversations(config)
        conversations, read = found.conversations, found.report
    return [with_system_prompt(c, config.system_prompt) for c in conversations], read


def _answered(
    config: DataConfig,
    conversations: list[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    sampler: Sampler,
    folder: Path,
    made_from: str,
    progress: Progress,
) -> list[AnsweredConversation]:
    if isinstance(config.answers, KeepAnswers):
        return [AnsweredConversation(conversation, answers=None) for conversation in conversations]
    files = GroupFiles(folder, "answers", made_from)
    return regenerate(conversations, tokenizer, sampler, config.answers, files, progress, config.max_length)


def _cut(sample: TokenSample, max_length: int) -> TokenSample:
    return TokenSample(sample.id, sample.input_ids[:max_length], sample.loss_mask[:max_length])


def _check(report: DataReport, config: DataConfig) -> None:
    if not report.kept:
        raise DataError(
            f"No conversation has {config.min_trained_tokens} trained tokens within max_length={config.max_length}; "
            "raise max_length or lower min_trained_tokens."
        )
    report.mask_share = report.trained_tokens / report.tokens
    low, high = MASK_SHARE_LIMITS
    if not low <= report.mask_share <= high:
        raise DataError(
            f"{report.mask_share:.1%} of the tokens are trained, expected {low:.0%} to {high:.0%}: the chat template "
            "or the data is not what it seems. Look at conversations and template before training on them."
        )
