"""One head in the forms that the ladder compares: as it trains, as it decodes, and as vLLM serves it.

An EAGLE-3 head of one layer shows every value on the way to its drafts (`trace`). Of another head the drafts alone are
seen: its trainer's are what its loss counts, its decoder's what `Drafter.propose` drafts at the same places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from sstf.decode import SpeculativeDecoder
from sstf.features import ExtractConfig, FeatureSpec, OnlineFeatures, rows_ahead, to_device
from sstf.formats import speculative_config
from sstf.methods.base import DraftMethod, News, TrainableMethod
from sstf.methods.checkpoint import DraftHead, StoredHead, bind
from sstf.parity.compare import tensors_of, weights_of
from sstf.parity.served import Serving, count
from sstf.parity.texts import Text, replayed
from sstf.parity.trace import Trace, can_be_traced, rows_of, trace_drafting, trace_training
from sstf.targets import Target
from sstf.train.module import HeadWithLoss
from sstf.trees import Chain, DraftContext
from sstf.types import FeatureBatch, SamplingParams

Precision = Literal["bf16", "fp32"]
NOTHING = -1  # where a drafter drafts fewer tokens than it may


class Probe:
    """What all rungs share: the target, its texts, and the texts as training would see them."""

    def __init__(
        self, target: Target, texts: Sequence[Text], layers: tuple[int, ...], depth: int, max_new_tokens: int
    ) -> None:
        self.target, self.texts, self.depth, self.max_new_tokens = target, texts, depth, max_new_tokens
        samples = [text.sample(f"parity-{i}") for i, text in enumerate(texts)]
        source = OnlineFeatures(target, samples, FeatureSpec(layers), ExtractConfig())
        self.batches: list[FeatureBatch] = [to_device(source.batch([i]), target.device) for i in range(len(texts))]
        self.rows = [rows_of(batch) for batch in self.batches]

    def anchors(self, i: int, hits: Tensor) -> Tensor | None:
        """Places among the rows of a text, [anchors] int64, of the chains that a loss counted in it, [position,
        anchors]: those that lie wholly in its answer. A method that reads a state of the next row has none at the last.

        None where there are other numbers of them.
        """
        batch, rows = self.batches[i], self.rows[i]
        ahead, there = rows_ahead(batch.lengths, len(hits), rows.device)
        found = (there & batch.loss_mask[ahead]).all(0)[rows].nonzero()[:, 0]
        counted = hits.shape[1]
        return found[:counted] if len(found) - 1 <= counted <= len(found) else None

    def hits(self, drafted: Tensor, i: int) -> Tensor:
        """Which drafts, [position, row] target ids, are the target's own tokens."""
        batch, rows = self.batches[i], self.rows[i]
        ahead, there = rows_ahead(batch.lengths, len(drafted), rows.device)
        return there[:, rows] & (drafted == batch.teacher_token[ahead[:, rows]])

    def same(self, answers: Sequence[Sequence[int]]) -> float:
        """Share of answers that are the plain target's."""
        pairs = zip(answers, self.texts, strict=True)
        return sum(list(answer) == text.answer for answer, text in pairs) / len(self.texts)


class Emitted(NamedTuple):
    """Of one text: tokens behind the first, and the passes that emitted them."""

    tokens: int
    passes: int


@dataclass(frozen=True)
class Form:
    """The head in one form. `trace` takes the number of a text; an engine shows neither weights nor drafts, and a loss
    that cannot be looked into shows `counted`, for each text its `chain_hits`, alone."""

    name: str
    emitted: list[Emitted]
    weights: dict[str, Tensor] | None = None
    trace: Callable[[int], Trace] | None = None
    counted: list[Tensor] | None = None  # [position, anchors] bool
    same_text: float | None = None


def loss_counts(probe: Probe, method: TrainableMethod, head: nn.Module, precision: Precision) -> list[Tensor]:
    """`chain_hits` of the method's loss on each text, [position, anchors] bool."""
    frozen = probe.target.frozen_head.to(probe.target.device)
    module = HeadWithLoss(method, head, frozen, precision).eval()
    with torch.no_grad():
        return [module(batch).chain_hits for batch in probe.batches]


def trained(probe: Probe, stored: StoredHead, method: TrainableMethod, precision: Precision) -> Form:
    """In float32, by the code that trains it."""
    head = bind(stored, probe.target.frozen_head).to(probe.target.device)
    counted = loss_counts(probe, method, head, precision)
    if can_be_traced(head):
        inner = head

        def trace(i: int) -> Trace:
            return trace_training(inner, probe.batches[i], probe.depth, precision == "bf16")

        passes = [replayed(trace(i).drafted, probe.rows[i], text) for i, text in enumerate(probe.texts)]
        return Form("trainer", _emitted(passes), weights_of(head, stored.layers), trace, counted)
    passes = [_replayed_hits(probe, i, hits) for i, hits in enumerate(counted)]
    return Form("trainer", _emitted(passes), tensors_of(head, stored.layers), None, counted)


def _emitted(passes: Sequence[Sequence[int]]) -> list[Emitted]:
    return [Emitted(sum(lengths), len(lengths)) for lengths in passes]


def _replayed_hits(probe: Probe, i: int, hits: Tensor) -> list[int]:
    """What decoding would emit while it stands at anchors: behind the last of them the loss counts no whole chain."""
    depth = min(probe.depth, len(hits))
    places = probe.anchors(i, hits)
    if places is None:
        return []
    rows = probe.rows[i][places]
    own = torch.tensor(probe.texts[i].ids, device=rows.device)
    wanted = own[rows + 2 + torch.arange(depth, device=rows.device)[:, None]]
    return replayed(torch.where(hits[:depth], wanted, NOTHING), rows, probe.texts[i])


def decoded(probe: Probe, name: str, head: DraftHead, like: Form | None = None) -> Form:
    """In the decoder, which captures the target's hidden states by itself, and decodes. What is `like` another form to
    the last bit decodes as that did, and is not asked to do so again."""
    module, target = head.module, probe.target
    assert module is not None
    decoder = SpeculativeDecoder(target, head, Chain(depth=probe.depth))
    features = []
    with decoder.taps, torch.inference_mode():
        for text in probe.texts:
            _, found = decoder.passes(1, len(text.ids)).prefill(0, text.ids)
            features.append(found[:-2])
    if can_be_traced(module):
        inner = module
        weights = weights_of(module, decoder.layers)

        def trace(i: int) -> Trace:
            tokens, rows = probe.batches[i].input_ids, probe.rows[i]
            return trace_drafting(inner, features[i], tokens, rows, probe.depth)

    else:
        weights = tensors_of(module, decoder.layers)

        def trace(i: int) -> Trace:
            return Trace({}, proposed(head.method, module, features[i], probe.texts[i], probe.rows[i], probe.depth))

    if like and like.weights and _identical(weights, like.weights):
        return Form(name, like.emitted, weights, trace, None, like.same_text)
    prompts = [text.prompt for text in probe.texts]
    made = decoder.generate_batch(prompts, SamplingParams(max_new_tokens=probe.max_new_tokens), len(prompts))
    emitted = [Emitted(sum(one.accepted_lengths), len(one.accepted_lengths)) for one in made]
    return Form(name, emitted, weights, trace, None, probe.same([one.token_ids for one in made]))


def proposed(method: DraftMethod, head: nn.Module, features: Tensor, text: Text, rows: Tensor, depth: int) -> Tensor:
    """What a head's drafter drafts along a text, [depth, row] target ids, `NOTHING` where it drafts less.

    Args:
        method: of the head.
        head: in the dtype that it decodes in.
        features: [seq, taps] as the decoder captures them.
        text: what is known at row t up to x_{t+1}, see `features.dataset`.
        rows: [row] int64, ascending and one after the other.
        depth: of the chain.
    """
    drafter = method.drafter(head, features.device)
    drafter.start(1, len(text.ids) + depth + 1)
    ids, known, found = text.ids, 0, []
    for row in rows.tolist():
        news = News(0, ids[known + 1 : row + 2], features[known : row + 1])
        (tree,) = drafter.propose([news], Chain(depth=depth), DraftContext(depth=depth))
        known = row + 1
        found.append(nn.functional.pad(tree.tokens, (0, depth - len(tree)), value=NOTHING))
    return torch.stack(found, 1)


def served(probe: Probe, venv: Path, head: Path, kind: str) -> Form:
    """By vLLM."""
    target = probe.target
    context = min(target.context, max(len(text.prompt) for text in probe.texts) + probe.max_new_tokens + probe.depth)
    speculative = speculative_config(kind, str(head), probe.depth)
    serving = Serving(venv, Path(target.model.name_or_path), speculative, target.spec.dtype, context)
    ends = sorted(target.end_tokens)
    found = count(serving, [text.prompt for text in probe.texts], probe.max_new_tokens, ends)
    emitted = [Emitted(len(one.token_ids) - 1, one.rounds) for one in found]
    return Form("vllm", emitted, same_text=probe.same([one.token_ids for one in found]))


def _identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )
