"""What a head is measured on: a few built-in prompts that the target answers anew each time, and its states there.

Rows are aligned here by hand, from the worked token table of `features/dataset.py` and not through its code: a fault in
the one would be measured with the same fault in the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sstf.data.chat_template import render_prompt
from sstf.data.repetition import repetition as loop
from sstf.decode import SpeculativeDecoder
from sstf.errors import DataError
from sstf.evaluation.metrics import repetition
from sstf.evaluation.run import REPETITIVE_ABOVE
from sstf.evaluation.suites import Prompt, load_suite
from sstf.features import HiddenSignal
from sstf.features.shards import read_features
from sstf.targets import Target
from sstf.targets.sampling import BatchSampler
from sstf.types import FeatureBatch, HiddenTeacher, SamplingParams, TokenSample

PROMPTS = 16
LONGEST_PROMPT = 160  # tokens; the answers are what is measured on
NEW_TOKENS = 64
# As training data is drawn by default; at 0 a small target repeats itself.
TEMPERATURE, TOP_P, TOP_K = 0.8, 0.95, 256
LEAST_ANSWER = 8  # tokens
SHIFTS = (-1, 0, 1)


@dataclass(frozen=True)
class Text:
    """A prompt and the target's answer, which begins at `start`, as token ids."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Probe:
    """The answers that are texts, and what the target computes on them, all of them one after the other.

    A row t of a text is aligned as in training: it has the features of x_t, the token x_{t+1} and the target's
    distribution at h_{t+1}, here at every row. `shifted` has the features of all layers one lower (-1), as named (0)
    and one higher (1); without an entry where there is no such layer.
    """

    texts: list[Text]
    answers: int  # of the target, those left out included
    batch: FeatureBatch
    shifted: dict[int, Tensor]  # [seq, taps]
    answer: Tensor  # [seq] bool, where x_{t+2} is of the answer; never the first or the last row of a text
    truth: Tensor  # [seq] int64, the argmax of the target's own logits at h_{t+1}

    def supervised(self, rows: Tensor, shift: int = 0, features: Tensor | None = None) -> FeatureBatch:
        """The batch with the teacher on some rows only.

        Args:
            rows: [seq] bool.
            shift: each row is taught what `shift` rows later should be (-1: the token that it reads).
            features: [seq, taps] in place of the batch's.
        """
        index = rows.nonzero()[:, 0] + shift
        teacher = self.batch.teacher
        assert isinstance(teacher, HiddenTeacher)
        token = torch.full_like(self.batch.teacher_token, -1)
        token[rows] = self.batch.teacher_token[index]
        return replace(
            self.batch,
            features=self.batch.features if features is None else features,
            teacher=HiddenTeacher(teacher.hidden[index], teacher.lse[index]),
            teacher_token=token,
            loss_mask=rows,
        )

    def part(self, first: int, end: int) -> Probe:
        """The texts `first` to `end` (not included) alone."""
        lengths = self.batch.lengths[first:end]
        start = sum(self.batch.lengths[:first])
        rows = slice(start, start + sum(lengths))
        teacher = self.batch.teacher
        assert isinstance(teacher, HiddenTeacher)
        batch = FeatureBatch(
            features=self.batch.features[rows],
            input_ids=self.batch.input_ids[rows],
            teacher=HiddenTeacher(teacher.hidden[rows], teacher.lse[rows]),
            teacher_token=self.batch.teacher_token[rows],
            labels=self.batch.labels[rows],
            loss_mask=self.batch.loss_mask[rows],
            lengths=lengths,
        )
        shifted = {shift: features[rows] for shift, features in self.shifted.items()}
        return Probe(self.texts[first:end], self.answers, batch, shifted, self.answer[rows], self.truth[rows])


def make_probe(target: Target, layers: Sequence[int]) -> Probe | None:
    """Let the target answer, and run it over its answers. None where every answer is too short or a loop.

    Args:
        target: the target.
        layers: that the head reads.

    Raises:
        DataError: no built-in prompt fits the target's context.
        TargetError: its hidden states are not finite.
    """
    prompts = _prompts(target)
    answers = _answers(target, prompts)
    texts = [
        Text(prompt + answer, len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
        if len(answer) >= LEAST_ANSWER and not is_loop(answer)
    ]
    return _run(target, texts, len(answers), tuple(layers)) if texts else None


def is_loop(answer: Sequence[int]) -> bool:
    """Whether an answer repeats itself, by either sign that voids it in data or in an evaluation."""
    return repetition(answer) > REPETITIVE_ABOVE or loop(answer) is not None


def _prompts(target: Target) -> list[list[int]]:
    """The first built-in prompts, which alternate between the categories, that leave room for an answer."""
    room = min(LONGEST_PROMPT, target.context - NEW_TOKENS)
    fitting = [ids for prompt in load_suite("builtin") if len(ids := _encoded(target, prompt)) <= room]
    if not fitting:
        raise DataError(
            f"target {target.spec.name} has a context of {target.context} tokens, in which no built-in prompt and an "
            f"answer of {NEW_TOKENS} tokens fit; doctor needs a target with a longer one"
        )
    return fitting[:PROMPTS]


def _encoded(target: Target, prompt: Prompt) -> list[int]:
    if target.tokenizer.chat_template is None:  # a base model continues the text
        return list(target.tokenizer("\n".join(message.content for message in prompt.messages))["input_ids"])
    return render_prompt(target.tokenizer, prompt.messages)


def _answers(target: Target, prompts: list[list[int]]) -> list[list[int]]:
    if target.recurrent:  # cannot answer several at once
        plain = SpeculativeDecoder(target, None)
        return [plain.generate(ids, NEW_TOKENS, TEMPERATURE, TOP_P, seed=i).token_ids for i, ids in enumerate(prompts)]
    params = [SamplingParams(TEMPERATURE, TOP_P, TOP_K, NEW_TOKENS, seed) for seed in range(len(prompts))]
    return [sampled.token_ids for sampled in BatchSampler(target).sample(prompts, params, len(prompts))]


@torch.inference_mode()
def _run(target: Target, texts: list[Text], answers: int, layers: tuple[int, ...]) -> Probe:
    wanted = {shift: [layer + shift for layer in layers] for shift in SHIFTS}
    there = {s: ids for s, ids in wanted.items() if all(0 <= i < target.spec.num_layers for i in ids)}
    tapped = sorted({layer for ids in there.values() for layer in ids})
    features: dict[int, list[Tensor]] = {shift: [] for shift in there}
    hidden, lse, truth, answer = [], [], [], []
    with target.tap(tapped) as taps:
        for text in texts:
            # Everything is "trained", so that there is a teacher at every position that has a next token.
            sample = TokenSample("probe", text.ids, [True] * len(text.ids))
            (found,) = read_features(target, [sample], taps.features, HiddenSignal())
            by_layer = dict(zip(tapped, found.features.split(target.spec.hidden_size, -1), strict=True))
            for shift, ids in there.items():
                features[shift].append(torch.cat([by_layer[layer] for layer in ids], -1)[:-2])
            assert isinstance(found.teacher, HiddenTeacher)
            hidden.append(found.teacher.hidden[1:])
            lse.append(found.teacher.lse[1:])
            logits = target.model(torch.tensor([text.ids], device=target.device), use_cache=False).logits
            truth.append(logits[0, 1:-1].argmax(-1).cpu())
            at = torch.arange(len(text.ids) - 2)
            answer.append((at >= max(1, text.start - 2)) & (at < len(at) - 1))
    tokens = [torch.tensor(text.ids) for text in texts]
    own = torch.cat(truth)
    shifted = {shift: torch.cat(parts) for shift, parts in features.items()}
    batch = FeatureBatch(
        features=shifted[0],
        input_ids=torch.cat([row[1:-1] for row in tokens]),
        teacher=HiddenTeacher(torch.cat(hidden), torch.cat(lse)),
        teacher_token=own,
        labels=torch.cat([row[2:] for row in tokens]),
        loss_mask=torch.ones(len(own), dtype=torch.bool),
        lengths=tuple(len(row) - 2 for row in tokens),
    )
    return Probe(texts, answers, batch, shifted, torch.cat(answer), own)
