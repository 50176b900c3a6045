"""Whether a head computes what it should: what must change its output does, and what must not does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sstf.doctor.bench import Bench
from sstf.doctor.probe import Probe
from sstf.doctor.report import Check, Question, Verdict
from sstf.targets import Target
from sstf.types import HiddenTeacher

SAME_ARGMAX = 0.99
SAME = 1e-3  # relative difference of two losses that must be equal but for rounding
UNSEEN = 1e-5  # the same where not even the rounding differs
SOME = 4  # texts, where one would do
MOVED = 1e-4  # relative change of the loss, and change of a draft probability, that shows a weight in use
SAME_ANGLE = 1e-3  # relative difference of rotary frequencies, and of the scale

FINAL_NORM = Question(
    "target",
    "final norm",
    f"lm_head of the teacher's states has the target's argmax at {SAME_ARGMAX:.0%} of positions or more",
    "The states kept for the teacher are not what lm_head reads: they must be those after the final norm.",
)
ROTARY = Question(
    "target",
    "rotary positions",
    f"frequencies and scale within {SAME_ANGLE:.1%} of the target's",
    "Give the head the target's rope_theta and rope_scaling and train it with them: in long texts its angles differ.",
)
NORMS = Question(
    "target",
    "norm weights",
    f"a changed norm weight changes the loss by {MOVED:.2%} or more, and what is drafted",
    "Compare the flags of norms in the head's files, and the code that runs it, with those that it was trained with.",
)
LEAK = Question(
    "target",
    "leak from the future",
    f"later tokens and features change the loss of earlier positions by less than {UNSEEN:.3%}",
    "Look at the attention mask and at the alignment of inputs: a position must not see what comes behind it.",
)
PACKING = Question(
    "target",
    "packing",
    f"texts one after the other have the loss of each text alone, within {SAME:.1%}",
    "Look at the attention mask and the positions: both must begin anew with each text.",
)
OUTSIDE = Question(
    "target",
    "outside the draft vocabulary",
    "no position is supervised whose target token the draft vocabulary lacks",
    "Leave such positions out of the loss: their teacher is renormalised over tokens that the target did not choose.",
)


@runtime_checkable
class Rotary(Protocol):
    """A head that turns queries and keys by their positions."""

    frequencies: Tensor  # [head_dim / 2], radians a position

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [*rows, 1, head_dim / 2]."""


def check_final_norm(target: Target, probe: Probe) -> Check:
    """The teacher's logits, made of the states that training keeps, against the logits of the model itself."""
    teacher = probe.batch.teacher
    assert isinstance(teacher, HiddenTeacher)
    with torch.inference_mode():
        logits = target.frozen_head.logits(teacher.hidden.to(target.device))
    share = float((logits.argmax(-1).cpu() == probe.truth).float().mean())
    verdict: Verdict = "pass" if share >= SAME_ARGMAX else "fail"
    return FINAL_NORM.answer(verdict, f"{share:.2%} of {len(probe.truth):,} positions", {"same_argmax": share})


def check_rotary(bench: Bench) -> Check:
    """The head's angles against those of the target's own rotary module, at near and far positions."""
    head = bench.training
    if not isinstance(head, Rotary):
        return ROTARY.skipped(f"{type(head).__name__} has no rotary positions")
    found = _rotary_module(bench.target)
    if found is None:
        return ROTARY.skipped(f"{type(bench.target.decoder).__name__} has no single rotary module")
    dim = 2 * len(head.frequencies)
    if dim != bench.target.spec.head_dim:
        return ROTARY.skipped(f"its attention heads are of size {dim}, the target's of {bench.target.spec.head_dim}")
    far = max(2, bench.target.spec.max_position_embeddings - 1)
    positions = torch.tensor([[1, far]], device=bench.target.device)
    with torch.inference_mode():
        cos, sin = (
            part[0, :, : dim // 2].float() for part in found(positions.new_zeros((), dtype=torch.float32), positions)
        )
        own_cos, own_sin = (part[:, 0].float() for part in head.rope(positions[0]))
    # The angle at position 1 is the frequency: at most 1 radian, so that nothing has turned around.
    theirs, own = torch.atan2(sin[0], cos[0]), torch.atan2(own_sin[0], own_cos[0])
    frequency = float(((own - theirs).abs() / theirs.abs()).max())
    scale = float(own_cos[0].hypot(own_sin[0]).mean() / cos[0].hypot(sin[0]).mean())
    turned = float((own_cos[1] - cos[1]).hypot(own_sin[1] - sin[1]).max())
    verdict: Verdict = "pass" if max(frequency, abs(scale - 1)) <= SAME_ANGLE else "fail"
    text = (
        f"frequencies differ by {frequency:.2%} at most, the scale is {scale:.4f} of the target's; at position {far:,} "
        f"a pair is {turned:.3f} away (2 is the opposite)"
    )
    return ROTARY.answer(verdict, text, {"frequency": frequency, "scale": scale, "far": turned})


def _rotary_module(target: Target) -> nn.Module | None:
    found = [module for name, module in target.decoder.named_children() if "rotary" in name]
    per_layer_type = "full_attention" in (target.model.config.get_text_config().to_dict().get("rope_parameters") or {})
    return found[0] if len(found) == 1 and not per_layer_type else None


def norm_weights(head: nn.Module) -> list[str]:
    """Names of the weights of all norms of a head."""
    return [f"{name}.weight" for name, module in head.named_modules() if isinstance(module, nn.RMSNorm)]


@torch.no_grad()
def check_norms(bench: Bench) -> Check:
    """Each norm's weight is changed, in the form that trains and in the form that drafts."""
    few = bench.probe.part(0, 2)
    batch = few.supervised(few.answer)
    loss, place = float(bench.run(batch).loss), bench.drafting_place
    if place is None:
        return NORMS.skipped("the head drafts nothing in the first answer")
    tokens, chances = bench.drafted(place)
    moved: dict[str, tuple[float, float]] = {}
    decoding = dict(bench.decoding.named_parameters())
    for name in norm_weights(bench.training):
        weight = bench.training.get_parameter(name)
        kept = weight.clone(), decoding[name].clone()
        factor = 1 + 0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight.device)
        weight.mul_(factor)
        decoding[name].mul_(factor.to(decoding[name].dtype))
        other_tokens, other_chances = bench.drafted(place)
        drafted = (
            1.0 if other_tokens != tokens else max(abs(a - b) for a, b in zip(chances, other_chances, strict=True))
        )
        moved[name] = (abs(float(bench.run(batch).loss) - loss) / abs(loss), drafted)
        weight.copy_(kept[0])
        decoding[name].copy_(kept[1])
    if not moved:
        return NORMS.skipped("the head has no norm")
    dead = [name for name, (of_loss, drafted) in moved.items() if of_loss < MOVED or drafted < MOVED]
    least = min(of_loss for of_loss, _ in moved.values())
    least_drafted = min(drafted for _, drafted in moved.values())
    text = f"{len(moved)} norms: the loss moves by {least:.2%} or more, draft probabilities by {least_drafted:.2%}"
    text += f"; without effect: {', '.join(dead)}" if dead else ""
    return NORMS.answer("fail" if dead else "pass", text, {"loss": least, "drafted": least_drafted})


def check_leak(bench: Bench) -> Check:
    """Everything behind the middle of each answer is replaced; the loss up to there must stay."""
    before = after = 0.0
    early = late = 0
    # With the target's own first layers row t drafts from their state of the token that it reads: row t + 1's.
    seen = 1 if bench.method.shared_layers else 0
    for index in range(min(SOME, len(bench.probe.texts))):
        text = bench.probe.part(index, index + 1)  # alone: what packing leaks is another question
        rows = text.answer.nonzero()[:, 0]
        middle = int(rows[len(rows) // 2]) + 1
        taught = text.answer.clone()
        taught[middle:] = False
        batch = text.supervised(taught)
        features, tokens = batch.features.clone(), batch.input_ids.clone()
        features[middle + seen :] = -features[middle + seen :].flip(0)
        tokens[middle:] = tokens[middle:].flip(0)
        before += float(bench.run(batch).loss)
        after += float(bench.run(replace(batch, features=features, input_ids=tokens)).loss)
        early += int(taught.sum())
        late += len(tokens) - middle
    change = abs(after - before) / abs(before)
    verdict: Verdict = "pass" if change < UNSEEN else "fail"
    measured = f"the loss of {early:,} positions moves by {change:.4%}, {late:,} later ones replaced"
    return LEAK.answer(verdict, measured, {"change": change})


def check_packing(bench: Bench) -> Check:
    """One batch of several texts against the texts one by one."""
    few = bench.probe.part(0, SOME)
    packed = float(bench.run(few.supervised(few.answer)).loss)
    alone = 0.0
    for index in range(len(few.texts)):
        text = few.part(index, index + 1)
        alone += float(bench.run(text.supervised(text.answer)).loss)
    difference = abs(packed - alone) / abs(alone)
    verdict: Verdict = "pass" if difference < SAME else "fail"
    return PACKING.answer(verdict, f"the losses differ by {difference:.4%}", {"difference": difference})


def check_outside(bench: Bench, draft_tokens: Tensor) -> Check:
    """The positions that the loss counts as valid, against those whose target token is in the draft vocabulary."""
    probe = bench.probe
    rows = probe.answer
    inside = int((torch.isin(probe.truth, draft_tokens.cpu()) & rows).sum())
    supervised = int(bench.run(probe.supervised(rows)).valid[0])
    outside = int(rows.sum()) - inside
    verdict: Verdict = "pass" if supervised == inside else "fail"
    text = f"{outside:,} of {int(rows.sum()):,} positions are outside; {supervised:,} are supervised, {inside:,} inside"
    return OUTSIDE.answer(verdict, text, {"outside": outside, "supervised": supervised, "inside": inside})
