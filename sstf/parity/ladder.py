"""The ladder: one prompt set through the head as it was trained, as it is read back, and as engines are given it.

| rung | what computes | compared with |
|---|---|---|
| trainer | the code of the loss, in training's precision, from float32 weights | what the loss itself counts |
| reloaded | the head read from its folder, in the decoder | trainer |
| exported for an engine | the engine's files, read back by the engine's conventions, in the decoder | reloaded |
| vLLM | the engine itself, see `served` | exported |

At each rung: the first tensor that is another one (a layer id, a weight, or a value on the way to the logits), the
error of the draft logits, the share of drafted tokens that agree, and the accepted length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple, TypedDict

import torch
import yaml
from torch import Tensor

from sstf.data.progress import Progress
from sstf.decode import SpeculativeDecoder
from sstf.errors import HeadError, SstfError
from sstf.evaluation.metrics import bootstrap
from sstf.features import ExtractConfig, FeatureSpec, OnlineFeatures, rows_ahead, to_device
from sstf.formats import Engine, export_eagle3, load_any, read_any
from sstf.heads import Eagle3Head
from sstf.methods import Eagle3Config, build_method
from sstf.methods.base import TrainableMethod
from sstf.methods.checkpoint import DraftHead, StoredHead, bind
from sstf.parity.compare import AGREEMENT, Comparison, first_weight, weights_of
from sstf.parity.report import Parity, Rung
from sstf.parity.served import Serving, count
from sstf.parity.texts import Text, replayed, write_texts
from sstf.parity.trace import Trace, rows_of, trace_drafting, trace_training
from sstf.targets import Target
from sstf.train.module import HeadWithLoss
from sstf.trees import Chain
from sstf.types import FeatureBatch, SamplingParams

Precision = Literal["bf16", "fp32"]
# Accepted lengths of two rungs may lie so far apart, as a share, besides what few prompts leave open.
TOLERANCE = 0.05
ROUNDS = 1000  # resamples of prompts


@dataclass(frozen=True)
class ParitySettings:
    """Which rungs there are, and how well they are measured. `depth` None: as many drafts as training unrolled.

    `exported` is a folder of an engine's files to be checked in place of fresh exports for `engines`. `vllm` is a
    virtual environment with vLLM, for the last rung.
    """

    engines: tuple[Engine, ...] = ("vllm",)
    prompts: int = 8
    max_new_tokens: int = 64
    depth: int | None = None
    exported: Path | None = None
    vllm: Path | None = None


def climb(folder: Path, target: Target, settings: ParitySettings, precision: Precision, progress: Progress) -> Parity:
    """Take a head up the ladder.

    Args:
        folder: of the head, in any form that `formats` reads.
        target: the head's.
        settings: what is compared, and how.
        precision: of the training, for the first rung.
        progress: for a bar.

    Raises:
        HeadError: the folder holds no head for this target, or one that cannot be looked into.
        DataError: the target's answers are too short to draft in.
        WorkerError: vLLM does not start, or stops answering.
    """
    stored = read_any(folder, target.spec)
    if not isinstance(stored.config, Eagle3Config):
        raise HeadError(f"{folder}: the ladder looks into EAGLE-3 heads; this one's method is {stored.config.kind}")
    if stored.config.num_layers > 1:
        raise HeadError(f"{folder}: the ladder looks into heads of one layer; this one has {stored.config.num_layers}")
    depth = settings.depth or stored.config.ttt_steps
    with TemporaryDirectory(prefix="sstf-parity-") as scratch:
        exports = _exports(stored, settings, Path(scratch))
        with progress.start("parity", 2 + len(exports) + bool(settings.vllm), "rungs") as bar:
            texts = write_texts(target, settings.prompts, settings.max_new_tokens)
            probe = _Probe(target, texts, stored.layers, depth, settings.max_new_tokens)
            trained = _trained(probe, stored, precision)
            rungs = [_loss_rung(probe, trained, stored.config, precision)]
            bar.advance()
            reloaded = _decoded(probe, "reloaded", load_any(folder, target))
            rungs.append(_rung(probe, trained, reloaded))
            bar.advance()
            for export in exports:
                try:
                    place = export.make()
                    again = _decoded(probe, export.name, load_any(place, target), like=reloaded)
                except SstfError as error:
                    rungs.append(Rung(export.name, reloaded.name, (f"it cannot be exported and read back: {error}",)))
                else:
                    rungs.append(_rung(probe, reloaded, again))
                    if settings.vllm and export.serves:
                        bar.advance()
                        rungs.append(_rung(probe, again, _served(probe, settings.vllm, place)))
                bar.advance()
    return Parity(depth, len(texts), settings.max_new_tokens, tuple(rungs))


@dataclass(frozen=True)
class _Export:
    """An engine's files, made when they are wanted: an exporter may refuse."""

    name: str
    make: Callable[[], Path]
    serves: bool  # vLLM, where it is asked for


def _exports(stored: StoredHead, settings: ParitySettings, scratch: Path) -> list[_Export]:
    if settings.exported:
        folder = settings.exported
        return [_Export(f"export {folder.name}", lambda: folder, serves=True)]

    def maker(engine: Engine) -> Callable[[], Path]:
        def make() -> Path:
            export_eagle3(stored, engine, scratch / engine)
            return scratch / engine

        return make

    engines = settings.engines + (("vllm",) if settings.vllm and "vllm" not in settings.engines else ())
    return [_Export(f"export {engine}", maker(engine), engine == "vllm") for engine in engines]


# ---- forms of a head -------------------------------------------------------------------------------------------------


class _Probe:
    """What all rungs share: the target, its texts, and the texts as training would see them."""

    def __init__(
        self, target: Target, texts: Sequence[Text], layers: tuple[int, ...], depth: int, max_new_tokens: int
    ) -> None:
        self.target, self.texts, self.depth, self.max_new_tokens = target, texts, depth, max_new_tokens
        samples = [text.sample(f"parity-{i}") for i, text in enumerate(texts)]
        source = OnlineFeatures(target, samples, FeatureSpec(layers), ExtractConfig())
        self.batches: list[FeatureBatch] = [to_device(source.batch([i]), target.device) for i in range(len(texts))]
        self.rows = [rows_of(batch) for batch in self.batches]

    def same(self, answers: Sequence[Sequence[int]]) -> float:
        """Share of answers that are the plain target's."""
        pairs = zip(answers, self.texts, strict=True)
        return sum(list(answer) == text.answer for answer, text in pairs) / len(self.texts)


class Emitted(NamedTuple):
    """Of one text: tokens behind the first, and the passes that emitted them."""

    tokens: int
    passes: int


@dataclass(frozen=True)
class _Inside:
    """A head that can be looked into; `trace` takes the number of a text."""

    head: Eagle3Head
    layers: tuple[int, ...]
    trace: Callable[[int], Trace]

    @property
    def weights(self) -> dict[str, Tensor]:
        return weights_of(self.head, self.layers)


@dataclass(frozen=True)
class _Form:
    """The head in one form; an engine shows nothing of its inside."""

    name: str
    emitted: list[Emitted]
    inside: _Inside | None = None
    same_text: float | None = None


def _trained(probe: _Probe, stored: StoredHead, precision: Precision) -> _Form:
    head = bind(stored, probe.target.frozen_head).to(probe.target.device)
    assert isinstance(head, Eagle3Head)

    def trace(i: int) -> Trace:
        return trace_training(head, probe.batches[i], probe.depth, precision == "bf16")

    passes = [replayed(trace(i).drafted, probe.rows[i], text) for i, text in enumerate(probe.texts)]
    emitted = [Emitted(sum(lengths), len(lengths)) for lengths in passes]
    return _Form("trainer", emitted, _Inside(head, stored.layers, trace))


def _decoded(probe: _Probe, name: str, head: DraftHead, like: _Form | None = None) -> _Form:
    """In the decoder, which captures the target's hidden states by itself, and decodes. What is `like` another form to
    the last bit decodes as that did, and is not asked to do so again."""
    module, target = head.module, probe.target
    assert isinstance(module, Eagle3Head)
    decoder = SpeculativeDecoder(target, head, Chain(depth=probe.depth))
    features = []
    with decoder.taps, torch.inference_mode():
        for text in probe.texts:
            _, found = decoder.passes(1, len(text.ids)).prefill(0, text.ids)
            features.append(found[:-2])

    def trace(i: int) -> Trace:
        return trace_drafting(module, features[i], probe.batches[i].input_ids, probe.rows[i], probe.depth)

    inside = _Inside(module, decoder.layers, trace)
    if like and like.inside and _identical(inside.weights, like.inside.weights):
        return _Form(name, like.emitted, inside, like.same_text)
    prompts = [text.prompt for text in probe.texts]
    made = decoder.generate_batch(prompts, SamplingParams(max_new_tokens=probe.max_new_tokens), len(prompts))
    emitted = [Emitted(sum(one.accepted_lengths), len(one.accepted_lengths)) for one in made]
    return _Form(name, emitted, inside, probe.same([one.token_ids for one in made]))


def _served(probe: _Probe, venv: Path, head: Path) -> _Form:
    target = probe.target
    context = min(target.context, max(len(text.prompt) for text in probe.texts) + probe.max_new_tokens + probe.depth)
    serving = Serving(venv, Path(target.model.name_or_path), head, probe.depth, target.spec.dtype, context)
    ends = sorted(target.end_tokens)
    found = count(serving, [text.prompt for text in probe.texts], probe.max_new_tokens, ends)
    emitted = [Emitted(len(one.token_ids) - 1, one.rounds) for one in found]
    return _Form("vllm", emitted, None, probe.same([one.token_ids for one in found]))


def _identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


# ---- rungs -----------------------------------------------------------------------------------------------------------


def _loss_rung(probe: _Probe, form: _Form, config: Eagle3Config, precision: Precision) -> Rung:
    """The trainer beside its own loss: hits of the chains that lie wholly in supervised text."""
    assert form.inside
    method = build_method(config.model_copy(update={"ttt_steps": probe.depth}))
    assert isinstance(method, TrainableMethod)
    frozen = probe.target.frozen_head.to(probe.target.device)
    module = HeadWithLoss(method, form.inside.head, frozen, precision).eval()
    same = total = 0
    for i, (batch, rows) in enumerate(zip(probe.batches, probe.rows, strict=True)):
        with torch.no_grad():
            counted = module(batch).chain_hits
        ahead, there = rows_ahead(batch.lengths, probe.depth, rows.device)
        whole = (there & batch.loss_mask[ahead]).all(0)[rows]
        hits = form.inside.trace(i).drafted == batch.teacher_token[ahead[:, rows]]
        same += int((hits[:, whole] == counted).sum())
        total += counted.numel()
    agreement = same / total if total else 1.0
    faults = [] if agreement >= AGREEMENT else [_disagreement(agreement, "hits")]
    return Rung(form.name, "its loss", tuple(faults), agreement=agreement, **_lengths(form))


def _rung(probe: _Probe, before: _Form, after: _Form) -> Rung:
    """One form beside the form below it."""
    faults = []
    found = None
    figures: dict[str, float] = {}
    if before.inside and after.inside:
        comparison = Comparison()
        for i in range(len(probe.texts)):
            comparison.add(before.inside.trace(i), after.inside.trace(i))
        found = first_weight(before.inside.weights, after.inside.weights) or comparison.first()
        if found:
            faults.append(f"{found}")
        if comparison.agreement < AGREEMENT:
            faults.append(_disagreement(comparison.agreement, "drafted tokens"))
        figures = {
            "logits_max": comparison.logits_max,
            "logits_mean": comparison.logits_mean,
            "agreement": comparison.agreement,
        }
    if drift := _drift(before, after):
        faults.append(drift)
    return Rung(
        after.name,
        before.name,
        tuple(faults),
        first_difference=found.name if found else None,
        maximum_difference=found.maximum if found else None,
        same_text=after.same_text,
        **_lengths(after),
        **figures,
    )


def _disagreement(agreement: float, what: str) -> str:
    return f"{agreement:.1%} of its {what} agree, expected {AGREEMENT:.0%} or more"


def _lengths(form: _Form) -> _Lengths:
    """Accepted length and its interval over prompts."""
    return _Lengths(
        accepted_length=_accepted_length(form.emitted),
        interval=bootstrap(
            lambda drawn: _accepted_length([form.emitted[i] for i in drawn]), len(form.emitted), rounds=ROUNDS
        ),
    )


class _Lengths(TypedDict):
    accepted_length: float
    interval: tuple[float, float]


def _accepted_length(emitted: Sequence[Emitted]) -> float:
    return sum(one.tokens for one in emitted) / max(1, sum(one.passes for one in emitted))


def _drift(before: _Form, after: _Form) -> str | None:
    """Whether accepted lengths lie further apart than the tolerance, whichever prompts had been taken."""

    def ratio(drawn: Sequence[int]) -> float:
        now, then = (_accepted_length([form.emitted[i] for i in drawn]) for form in (after, before))
        return now / then if then else 1.0

    low, high = bootstrap(ratio, len(before.emitted), rounds=ROUNDS)
    if low <= 1 + TOLERANCE and high >= 1 - TOLERANCE:
        return None
    now, then = _accepted_length(after.emitted), _accepted_length(before.emitted)
    return (
        f"its accepted length is {now:.2f}, before {then:.2f}: {low:.0%} to {high:.0%} of it, expected within "
        f"{TOLERANCE:.0%}"
    )


def training_precision(folder: Path) -> Precision:
    """In which a head's training ran, by the configuration beside it; bf16, the usual one, where there is none."""
    try:
        fields = yaml.safe_load((folder.parent / "config.yaml").read_text(encoding="utf-8"))
        return "fp32" if fields["train"]["precision"] == "fp32" else "bf16"
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return "bf16"
