"""A head against a target: its files first, then what it computes. What does not load is not measured, and says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sstf.data.progress import Progress
from sstf.doctor import alignment, arithmetic, stored
from sstf.doctor.alignment import (
    check_accepted_length,
    check_alignment,
    check_capture,
    check_coverage,
    check_degenerate,
    check_mask_token,
)
from sstf.doctor.arithmetic import (
    check_final_norm,
    check_leak,
    check_norms,
    check_outside,
    check_packing,
    check_rotary,
)
from sstf.doctor.bench import Bench, open_bench
from sstf.doctor.folder import HeadFiles, read_files
from sstf.doctor.probe import make_probe
from sstf.doctor.report import Check, Question, Report
from sstf.doctor.stored import check_files
from sstf.errors import ConfigError, HeadError
from sstf.formats import find_head, read_any, target_of
from sstf.methods import build_method
from sstf.methods.checkpoint import StoredHead
from sstf.targets import Target, TargetSpec

LOADS = Question(
    "head",
    "tensors",
    "every tensor of the method, in its shape, and no other",
    "Engines fill what is missing with noise and skip what they do not know: write the head again, whole.",
)
TARGET = Question(
    "target",
    "target",
    "the target that the head was trained for",
    "Its figures below are of this target; where they are low, continue training on it (train.warm_start).",
)
OF_FILES = (stored.FINITE, stored.DTYPES, stored.LAYERS, stored.VOCABULARY, stored.TIED, stored.EMBEDDINGS)
OF_TARGET = (
    alignment.DEGENERATE,
    alignment.CAPTURE,
    arithmetic.FINAL_NORM,
)
OF_BOTH = (
    arithmetic.ROTARY,
    arithmetic.NORMS,
    alignment.LAYER_ALIGNMENT,
    alignment.LABEL_SHIFT,
    alignment.FEATURE_SHIFT,
    alignment.MASK_TOKEN,
    arithmetic.LEAK,
    arithmetic.PACKING,
    arithmetic.OUTSIDE,
    alignment.COVERAGE,
    alignment.ACCEPTED_LENGTH,
)

QUESTIONS = (*OF_FILES, LOADS, TARGET, *OF_TARGET, *OF_BOTH)


def examine(name: str, target_name: str | None, progress: Progress) -> Report:
    """All checks of a head.

    Args:
        name: the head's folder, in any form, its training folder, or a run with one finished head.
        target_name: where its target is, if not where the head says.
        progress: shows the checks.

    Raises:
        HeadError: no head there, or one that cannot be read safely.
        TargetError: the target cannot be loaded.
        DamagedDataError: the head was cut off or altered.
    """
    folder = find_head(name)
    target = target_of(folder, target_name)
    return Report(str(folder), target.spec.name, tuple(check_head(folder, target, progress)))


def check_head(folder: Path, target: Target, progress: Progress) -> list[Check]:
    """The checks of the head in `folder` against `target`, in the order of `QUESTIONS`.

    Raises:
        HeadError, TargetError, DamagedDataError: as `examine`.
    """
    if not any(folder.glob("*.safetensors")):
        read_any(folder, target.spec)  # says what is there instead
    found, reason = _measured(folder, target, progress)
    by_name = {check.name: check for check in found}
    # Whether a head has masks is known once it is loaded; others are not asked.
    asked = [one for one in QUESTIONS if one is not alignment.MASK_TOKEN or one.name in by_name]
    return [by_name.get(question.name) or question.skipped(reason) for question in asked]


def _measured(folder: Path, target: Target, progress: Progress) -> tuple[list[Check], str]:
    """The checks that could be made, and why there are no more."""
    files = read_files(folder)
    fits = _same_sizes(files, target.spec)
    if fits.verdict == "fail":
        return [fits], "the head is for a target of another shape"
    found = [*check_files(files, target.frozen_head), fits]
    if wrong := [check.name for check in found if check.verdict == "fail"]:
        # What is built on a wrong map or wrong layers would fail everywhere and say nothing more.
        return found, f"not measured before {' and '.join(wrong)} is right"
    try:
        head = read_any(folder, target.spec)
        layers = build_method(head.config).feature_spec(head.target).layers
        if files.own:
            found[-1] = _same_weights(head, target)
            if found[-1].verdict == "fail":
                return found, "the head is for a target of another shape"
        with progress.start("doctor", 3 + len(OF_BOTH), "checks") as bar:
            probe = make_probe(target, layers)
            if probe is None:
                reason = "every answer of the target is too short or a loop"
                return [*found, alignment.DEGENERATE.answer("fail", reason)], reason
            found += [check_degenerate(probe), check_capture(target, probe, layers), check_final_norm(target, probe)]
            bar.advance(3)
            bench = open_bench(target, head, probe)
            # A published head's files say in their own way, or not at all, which layers it reads.
            why = f"; layers {list(layers)} here: {head.run['layers_from']}" if "layers_from" in head.run else ""
            found.append(LOADS.answer("pass", f"{len(files.tensors)} tensors{why}"))
            for check in _of_both(bench):
                made = check()
                found += made
                bar.advance(len(made))
    except (HeadError, ConfigError) as error:
        return [*found, LOADS.answer("fail", str(error))], "the head does not load"
    return found, ""


def _of_both(bench: Bench) -> tuple[Callable[[], list[Check]], ...]:
    draft_tokens = bench.draft_tokens
    return (
        lambda: [check_rotary(bench)],
        lambda: [check_norms(bench)],
        lambda: check_alignment(bench),
        lambda: check_mask_token(bench),
        lambda: [check_leak(bench)],
        lambda: [check_packing(bench)],
        lambda: [check_outside(bench, draft_tokens)],
        lambda: [check_coverage(bench, draft_tokens)],
        lambda: [check_accepted_length(bench)],
    )


def _same_sizes(files: HeadFiles, here: TargetSpec) -> Check:
    """By the shapes of the tensors, whatever the files say."""
    found = {}
    lm_head = files.tensor("lm_head.weight")
    if lm_head is not None and lm_head.ndim == 2:
        found["hidden size"] = (lm_head.shape[1], here.hidden_size)
    for name in ("t2d", "embed_tokens.weight"):
        rows = files.tensor(name)
        if rows is not None:
            found["vocabulary"] = (len(rows), here.vocab_size)
    other = [f"{what} {theirs:,}, the target's is {ours:,}" for what, (theirs, ours) in found.items() if theirs != ours]
    if other:
        return TARGET.answer("fail", "; ".join(other))
    return TARGET.answer("pass", "sizes fit; a published head names no weights that it was trained for")


def _same_weights(head: StoredHead, target: Target) -> Check:
    trained, here = head.target, target.spec
    if trained.num_layers != here.num_layers:
        return TARGET.answer("fail", f"trained for {trained.num_layers} layers, the target has {here.num_layers}")
    if trained.fingerprint != here.fingerprint:
        text = f"trained for {trained.name} {trained.fingerprint} in {trained.dtype}"
        return TARGET.answer("warn", f"{text}, here {here.fingerprint} in {here.dtype}: same sizes, other weights")
    return TARGET.answer("pass", f"fingerprint {here.fingerprint}, {here.dtype}")
