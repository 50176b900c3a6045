"""Whether a head reads what it was trained to read and predicts what it was trained to predict.

Every check here changes one thing about the alignment and measures again on the same rows how well the head agrees with
the target: its own alignment has to be the best. Two figures are taken, the chance of acceptance, which is what counts,
and the loss, which has less noise. Another alignment that is better by both is a failure, by one of them a warning: a
head that has learned little cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sstf.doctor.bench import Agreement, Bench
from sstf.doctor.probe import Probe
from sstf.doctor.report import Check, Question, Verdict
from sstf.evaluation.run import BROKEN_BELOW
from sstf.heads import BlockHead, PEagleHead
from sstf.methods.block import BlockConfig, mask_token_of
from sstf.targets import Target

# Features of the next position hold what is to be predicted, and any head does fairly well with them; one that was
# trained on them does much better than with those that it is served.
AHEAD = 1.2
VOIDED = (0.25, 0.75)  # shares of the target's answers that are loops: above the first a warning, the second a failure
COVERED = (0.8, 0.5)  # shares of the target's tokens in the draft vocabulary: below the first, the second

CAPTURE = Question(
    "target",
    "layer capture",
    "each captured state is most like transformers' own state of that layer, cosine 0.999 or more",
    "Hooks and transformers disagree on what a layer's output is: this architecture needs a look before it is trained.",
)
LAYER_ALIGNMENT = Question(
    "target",
    "layer alignment",
    "the layers named give the highest chance of acceptance and the lowest loss",
    "Check which layers it was trained on, and how its files count them (here 0-based outputs); a head that learned "
    "little cannot tell neighbours apart.",
)
LABEL_SHIFT = Question(
    "target",
    "label shift",
    "unshifted labels give the highest chance of acceptance and the lowest loss",
    "Look at the alignment of labels and teacher where it was trained; a head that is hardly trained shows the same.",
)
FEATURE_SHIFT = Question(
    "target",
    "feature shift",
    f"no other features give a lower loss and a chance of acceptance more than {AHEAD:g} times as high",
    "Look at the alignment of features and tokens where it was trained.",
)
MASK_TOKEN = Question(
    "target",
    "mask token",
    "no usual mask token gives a higher chance of acceptance and a lower loss than the head's own",
    "Set mask_token_id (pard_token in P-EAGLE's form) to the token that it was trained with.",
)
ACCEPTED_LENGTH = Question(
    "target",
    "accepted length",
    f"{BROKEN_BELOW} or more (1 is a head of no use), simulated at every position of the answers",
    "If all other checks pass, the head needs more training or other data; else see to those first.",
)
COVERAGE = Question(
    "target",
    "vocabulary coverage",
    f"{COVERED[0]:.0%} or more of the target's tokens ({COVERED[1]:.0%}: failed)",
    "Acceptance cannot exceed it: choose the draft vocabulary from answers of this target, or make it larger.",
)
DEGENERATE = Question(
    "target",
    "degenerate text",
    f"at most {VOIDED[0]:.0%} of the target's answers are loops ({VOIDED[1]:.0%}: failed); they are left out",
    "A head accepts loops whole, so figures on such text flatter it: check the target's template and dtype.",
)


def check_capture(target: Target, probe: Probe, layers: tuple[int, ...]) -> Check:
    """Two ways to capture a layer's output, forward hooks and `output_hidden_states`, against each other."""
    ids = torch.tensor([probe.texts[0].ids], device=target.device)
    with torch.inference_mode(), target.tap(layers) as taps:
        # states[0] are the embeddings, states[i + 1] the output of layer i, but for the last, which is after the norm.
        states = target.model(ids, output_hidden_states=True, use_cache=False).hidden_states
        caught = taps.features()[0].split(target.spec.hidden_size, -1)
        last = len(states) - 2
        own, neighbours = [], []
        for layer, state in zip(layers, caught, strict=True):
            mine = target.final_norm(state) if layer == last else state
            own.append(_cosine(mine, states[layer + 1][0]))
            neighbours.append(_cosine(state, states[layer][0]))
            if layer + 1 < last:
                neighbours.append(_cosine(state, states[layer + 2][0]))
    lowest, highest = min(own), max(neighbours)
    verdict: Verdict = "pass" if lowest >= 0.999 and lowest > highest else "fail"
    text = f"layers {list(layers)}: cosine {lowest:.4f} or more with their own, {highest:.4f} or less with neighbours"
    return CAPTURE.answer(verdict, text, {"own": lowest, "neighbour": highest})


def check_alignment(bench: Bench) -> list[Check]:
    """Layers, labels and features, in this order, each with its neighbours. Where one is off, the others show that too
    and mean nothing: only the one whose change makes most of it good fails."""
    features = bench.probe.batch.features
    own = bench.agreement()
    labels = {0: own} | {shift: bench.agreement(shift) for shift in (-1, 1)}
    rolled = {0: own} | {shift: bench.agreement(features=features.roll(-shift, 0)) for shift in (-1, 1)}
    of_labels = _best_is_own(LABEL_SHIFT, labels, "one token earlier", "one token later")
    of_features = _best_is_own(FEATURE_SHIFT, rolled, "one position earlier", "one position later", AHEAD, both=True)
    if bench.target.spec.num_layers - 1 in bench.stored.layers:
        # lm_head of the last layer's state is the target's distribution of the token that the head reads, and of its
        # next state the teacher itself. Heads begin as such an lm_head, so one that is hardly trained does best with
        # both, as does one that was trained on them: they cannot be told apart.
        of_labels = _doubtful(of_labels) if _lowest(labels) == -1 else of_labels
        of_features = _doubtful(of_features) if _lowest(rolled) == 1 else of_features
    if of_labels.verdict == of_features.verdict == "fail":
        if min(one.loss for one in labels.values()) < min(one.loss for one in rolled.values()):
            of_features = FEATURE_SHIFT.skipped(f"not measured before {LABEL_SHIFT.name} is right")
        else:
            of_labels = LABEL_SHIFT.skipped(f"not measured before {FEATURE_SHIFT.name} is right")
    return [_layers(bench, own, [of_labels, of_features]), of_labels, of_features]


def _doubtful(check: Check) -> Check:
    return replace(check, verdict="warn") if check.verdict == "fail" else check


def _lowest(found: dict[int, Agreement]) -> int:
    """The shift with the lowest loss."""
    return min(found, key=lambda shift: found[shift].loss)


def _layers(bench: Bench, own: Agreement, shifts: Sequence[Check]) -> Check:
    if wrong := [check.name for check in shifts if check.verdict == "fail"]:
        return LAYER_ALIGNMENT.skipped(f"not measured before {wrong[0]} is right")
    others = {shift: features for shift, features in bench.probe.shifted.items() if shift}
    if not others:
        return LAYER_ALIGNMENT.skipped("the target has no layers one lower or one higher")
    found = {0: own} | {shift: bench.agreement(features=features) for shift, features in others.items()}
    return _best_is_own(LAYER_ALIGNMENT, found, "one layer lower", "one layer higher")


def check_mask_token(bench: Bench) -> list[Check]:
    """All drafts with the embedding of the head's own mask token, and with those of the tokens that methods take where
    none is named: the last, and the one with the smallest embedding. That it was trained with yet another does
    not show. Nothing for heads without masks."""
    head = bench.training
    if not isinstance(head, BlockHead | PEagleHead):
        return []
    own = int(head.mask_token)
    usual = {len(bench.frozen.embeddings) - 1, mask_token_of(BlockConfig(), bench.frozen.embeddings)} - {own}
    try:
        found = {token: _with_mask(bench, head, token) for token in (own, *sorted(usual))}
    finally:
        _set_mask(head, own)
    best = min(found, key=lambda token: found[token].loss)
    failed = best != own and found[best].acceptance > found[own].acceptance
    text = ", ".join(f"token {token} {one.acceptance:.1%} (loss {one.loss:.3f})" for token, one in found.items())
    figures = {f"token {token}: {name}": value for token, one in found.items() for name, value in vars(one).items()}
    return [MASK_TOKEN.answer("fail" if failed else "pass", text, figures)]


def _with_mask(bench: Bench, head: BlockHead | PEagleHead, token: int) -> Agreement:
    _set_mask(head, token)
    found = bench.run(bench.probe.supervised(bench.probe.answer))
    drafts = float(found.valid.sum().clamp_min(1))
    return Agreement(float(found.overlap.sum()) / drafts, float(found.losses.sum()) / drafts)


def _set_mask(head: BlockHead | PEagleHead, token: int) -> None:
    head.mask_token = torch.full_like(head.mask_token, token) if isinstance(head, BlockHead) else token


def check_accepted_length(bench: Bench) -> Check:
    """What a greedy chain would emit a verify pass on the target's answers; a warning, since it shows no cause."""
    found = bench.accepted_length()
    verdict: Verdict = "pass" if found >= BROKEN_BELOW else "warn"
    rows = int(bench.probe.answer.sum())
    text = f"{found:.2f} tokens a verify pass, chain of {bench.method.positions}, {rows:,} positions"
    return ACCEPTED_LENGTH.answer(verdict, text, {"accepted_length": found})


def check_coverage(bench: Bench, draft_tokens: Tensor) -> Check:
    """Share of the target's own tokens that the head can propose at all.

    Args:
        bench: head and probe.
        draft_tokens: [draft_vocab] int64, target ids.
    """
    written = torch.tensor([token for text in bench.probe.texts for token in text.ids[text.start :]])
    share = float(torch.isin(written, draft_tokens.cpu()).float().mean())
    verdict: Verdict = "pass" if share >= COVERED[0] else "warn" if share >= COVERED[1] else "fail"
    text = f"{share:.1%} of {len(written):,} tokens of new answers, with {len(draft_tokens):,} draft tokens"
    return COVERAGE.answer(verdict, text, {"coverage": share})


def check_degenerate(probe: Probe) -> Check:
    """How many of the target's answers cannot be measured on."""
    left_out = probe.answers - len(probe.texts)
    share = left_out / probe.answers
    verdict: Verdict = "pass" if share <= VOIDED[0] else "warn" if share <= VOIDED[1] else "fail"
    text = f"{left_out} of {probe.answers} answers left out"
    return DEGENERATE.answer(verdict, text, {"left_out": share})


def _best_is_own(
    question: Question,
    found: dict[int, Agreement],
    before: str,
    after: str,
    ahead: float = 1.0,
    both: bool = False,
) -> Check:
    """Compare the own alignment with others.

    Args:
        question: that is answered.
        found: by shift; 0 is the own one.
        before: what the shift -1 is.
        after: what the shift 1 is.
        ahead: another acceptance counts as higher from so many times the own one.
        both: whether what is better by one of the two figures gives no warning.
    """
    own, others = found[0], [agreement for shift, agreement in found.items() if shift]
    higher = [other.acceptance > ahead * own.acceptance for other in others]
    lower = [other.loss < own.loss for other in others]
    failed = any(a and b for a, b in zip(higher, lower, strict=True))
    doubtful = not both and any((*higher, *lower))
    verdict: Verdict = "fail" if failed else "warn" if doubtful else "pass"
    names = {-1: before, 0: "as it is", 1: after}
    order = sorted(found, key=abs)
    text = ", ".join(f"{names[s]} {found[s].acceptance:.1%} (loss {found[s].loss:.3f})" for s in order)
    figures = {f"{names[shift]}: {name}": value for shift in order for name, value in vars(found[shift]).items()}
    return question.answer(verdict, text, figures)


def _cosine(a: Tensor, b: Tensor) -> float:
    """Mean over positions, the first left out: there many targets put one huge value that outshines all else."""
    return float(F.cosine_similarity(a[1:].float().cpu(), b[1:].float().cpu(), dim=-1).mean())
