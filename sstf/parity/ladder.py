"""The ladder: one prompt set through the head as it was trained, as it is read back, and as engines are given it.

| rung | what computes | compared with |
|---|---|---|
| trainer | the code of the loss, in training's precision, from float32 weights | what the loss itself counts |
| reloaded | the head read from its folder, in the decoder | trainer |
| exported for an engine | the engine's files, read back by the engine's conventions, in the decoder | reloaded |
| vLLM | the engine itself, see `served` | exported |

At each rung: the first tensor that is another one (a layer id, a weight, or a value on the way to the logits), the
error of the draft logits, the share of drafted tokens that agree, and the accepted length. Values on the way are seen
of EAGLE-3 heads alone. Of others the reloaded head is compared with what the loss counts: which drafts of a chain are
right, up to the first that is not, for there decoding reads its own drafts and the loss the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypedDict

import yaml
from torch import Tensor

from sstf.data.progress import Progress
from sstf.errors import HeadError, SstfError
from sstf.evaluation.metrics import bootstrap
from sstf.formats import Engine, engines_of, export_head, load_any, read_any
from sstf.methods import Eagle3Config, build_method
from sstf.methods.base import TrainableMethod
from sstf.methods.checkpoint import StoredHead
from sstf.parity.compare import AGREEMENT, Comparison, first_weight
from sstf.parity.forms import NOTHING, Emitted, Form, Precision, Probe, decoded, served, trained
from sstf.parity.report import Parity, Rung
from sstf.parity.texts import write_texts
from sstf.targets import FrozenHead, Target

# Accepted lengths of two rungs may lie so far apart, as a share, besides what few prompts leave open.
TOLERANCE = 0.05
ROUNDS = 1000  # resamples of prompts


@dataclass(frozen=True)
class ParitySettings:
    """Which rungs there are, and how well they are measured. `engines` None: every one that knows the method. `depth`
    None: as many drafts as training unrolled.

    `exported` is a folder of an engine's files to be checked in place of fresh exports for `engines`. `vllm` is a
    virtual environment with vLLM, for the last rung.
    """

    engines: tuple[Engine, ...] | None = None
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
        HeadError: the folder holds no head for this target, or one that does not draft so deep.
        DataError: the target's answers are too short to draft in.
        WorkerError: vLLM does not start, or stops answering.
    """
    stored = read_any(folder, target.spec)
    depth = settings.depth or _method(stored).positions
    method = _method(stored, depth)
    with TemporaryDirectory(prefix="sstf-parity-") as scratch:
        exports = _exports(stored, settings, target.frozen_head, Path(scratch))
        with progress.start("parity", 2 + len(exports) + bool(settings.vllm), "rungs") as bar:
            texts = write_texts(target, settings.prompts, settings.max_new_tokens)
            probe = Probe(target, texts, stored.layers, depth, settings.max_new_tokens)
            training = trained(probe, stored, method, precision)
            rungs = [_loss_rung(probe, training)]
            bar.advance()
            reloaded = decoded(probe, "reloaded", load_any(folder, target))
            rungs.append(_rung(probe, training, reloaded))
            bar.advance()
            for export in exports:
                try:
                    place = export.make()
                    again = decoded(probe, export.name, load_any(place, target), like=reloaded)
                except SstfError as error:
                    rungs.append(Rung(export.name, reloaded.name, (f"it cannot be exported and read back: {error}",)))
                else:
                    rungs.append(_rung(probe, reloaded, again))
                    if settings.vllm and export.serves:
                        bar.advance()
                        by_vllm = served(probe, settings.vllm, place, stored.config.kind)
                        rungs.append(_rung(probe, again, by_vllm))
                bar.advance()
    return Parity(depth, len(texts), settings.max_new_tokens, tuple(rungs))


def _method(stored: StoredHead, depth: int | None = None) -> TrainableMethod:
    """The head's; where its training unrolls, over so many steps."""
    config = stored.config
    if depth is not None and isinstance(config, Eagle3Config):
        config = config.model_copy(update={"ttt_steps": depth})
    method = build_method(config)
    if not isinstance(method, TrainableMethod):
        raise HeadError(f"method {config.kind} has no head, so there is nothing to compare")
    deepest = method.limits.depth
    if depth is not None and deepest is not None and depth > deepest:
        raise HeadError(f"the head drafts at most {deepest} tokens a pass, not {depth}; ask for a depth up to that")
    return method


@dataclass(frozen=True)
class _Export:
    """An engine's files, made when they are wanted: an exporter may refuse."""

    name: str
    make: Callable[[], Path]
    serves: bool  # vLLM, where it is asked for


def _exports(stored: StoredHead, settings: ParitySettings, frozen: FrozenHead, scratch: Path) -> list[_Export]:
    if settings.exported:
        folder = settings.exported
        return [_Export(f"export {folder.name}", lambda: folder, serves=True)]

    def maker(engine: Engine) -> Callable[[], Path]:
        def make() -> Path:
            export_head(stored, engine, scratch / engine, frozen=frozen)
            return scratch / engine

        return make

    engines = engines_of(stored.config.kind) if settings.engines is None else settings.engines
    engines += ("vllm",) if settings.vllm and "vllm" not in engines else ()
    return [_Export(f"export {engine}", maker(engine), engine == "vllm") for engine in engines]


# ---- rungs -----------------------------------------------------------------------------------------------------------


def _loss_rung(probe: Probe, form: Form) -> Rung:
    """The trainer beside its own loss: hits of the chains that lie wholly in supervised text."""
    assert form.counted
    odd = _odd_texts(probe, form.counted)
    faults = [f"its loss counts other chains than text {odd[0]} has"] if odd else []
    agreement = None
    if form.trace and not odd:
        agreement = _same_hits(probe, form, form.counted, whole=True)
        faults += [] if agreement >= AGREEMENT else [_disagreement(agreement, "hits")]
    return Rung(form.name, "its loss", tuple(faults), agreement=agreement, **_lengths(form))


def _odd_texts(probe: Probe, counted: Sequence[Tensor]) -> list[int]:
    """Those of which a loss counts more or fewer chains than lie wholly in their answers."""
    return [i for i, hits in enumerate(counted) if probe.anchors(i, hits) is None]


def _same_hits(probe: Probe, form: Form, counted: Sequence[Tensor], whole: bool = False) -> float:
    """Share of a loss's hits that a form's drafts have too.

    Args:
        probe: the texts.
        form: shows its drafts.
        counted: for each text the loss's hits, [position, anchors].
        whole: compare chains to their end; else to the first wrong draft, and drafts that were not made do not count.
    """
    assert form.trace
    same = total = 0
    for i, hits in enumerate(counted):
        depth = min(probe.depth, len(hits))
        places, drafted = probe.anchors(i, hits), form.trace(i).drafted[:depth]
        own, made = probe.hits(drafted, i)[:, places], drafted[:, places] != NOTHING
        theirs = hits[:depth]
        if not whole:
            own, theirs = own.cumprod(0).bool(), theirs.cumprod(0).bool()
        same += int(((own == theirs) & made).sum())
        total += int(made.sum())
    return same / total if total else 1.0


def _rung(probe: Probe, before: Form, after: Form) -> Rung:
    """One form beside the form below it."""
    faults = []
    found = first_weight(before.weights, after.weights) if before.weights and after.weights else None
    figures: dict[str, float] = {}
    if before.trace and after.trace:
        comparison = Comparison()
        for i in range(len(probe.texts)):
            comparison.add(before.trace(i), after.trace(i))
        found = found or comparison.first()
        figures = {"agreement": comparison.agreement, **comparison.logits}
    elif before.counted and after.trace and not _odd_texts(probe, before.counted):
        figures = {"agreement": _same_hits(probe, after, before.counted)}
    if found:
        faults.append(f"{found}")
    if "agreement" in figures and figures["agreement"] < AGREEMENT:
        faults.append(_disagreement(figures["agreement"], "drafted tokens"))
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


def _lengths(form: Form) -> _Lengths:
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


def _drift(before: Form, after: Form) -> str | None:
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
