"""Checks on a feature store: whether it belongs to this data and this target, and holds what it says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sstf.doctor.report import Check, Question, Verdict
from sstf.errors import DamagedDataError
from sstf.features import FeatureSpec, FeatureStore, HiddenSignal
from sstf.features.extract import data_digest
from sstf.features.on_policy import argmax_share
from sstf.features.record import Features, taught
from sstf.features.shards import read_features
from sstf.targets import FrozenHead, Target
from sstf.types import HiddenTeacher, TokenSample

READ = 64  # conversations whose rows are read, evenly taken
COMPUTED = 3  # conversations that the target computes again
COMPUTED_TOKENS = 256  # of each at most
SAME_STATE = 0.99  # cosine of a stored state with the target's; 8-bit codecs stay above 0.999
# Shares of positions: of states kept in 16 bits, and in 8, which change 2 to 4 % of the choices.
SAME_ARGMAX, SAME_ARGMAX_ROUNDED = 0.99, 0.94
TIE = 2**-7  # of the best logit: two steps of bfloat16, by which another batch may round two tokens past each other
OWN = (0.65, 0.3)  # trained tokens that are the target's argmax: below the first a warning, the second a failure

BELONGS = Question(
    "features",
    "features of this run",
    "made from this data, this target, its chat template and the layers that the method reads",
    "Delete the store and run `sstf extract` again: it was made from something else.",
)
STATES = Question(
    "features",
    "states per token",
    "every conversation has one state a token",
    "Delete the store and run `sstf extract` again: states and tokens would be trained out of step.",
)
STORED_LAYERS = Question(
    "features",
    "stored layers",
    f"stored states are those of the layers named: cosine {SAME_STATE} or more, and less with layers beside them",
    "Extract again: the store was written with another convention of layer ids, or by another target.",
)
STORED_TEACHER = Question(
    "features",
    "stored teacher",
    f"its argmax is the target's, but for ties, at {SAME_ARGMAX:.0%} of positions ({SAME_ARGMAX_ROUNDED:.0%}: 8 bits)",
    "Extract again: the states kept for the teacher are not those that lm_head reads, after the final norm.",
)
ON_POLICY = Question(
    "features",
    "on-policy share",
    f"{OWN[0]:.0%} or more of the trained tokens are the target's first choice ({OWN[1]:.0%}: failed)",
    "The answers are another model's, or drawn at a high temperature: let the target answer (answers.kind=regenerate).",
)
QUESTIONS = (BELONGS, STATES, STORED_LAYERS, STORED_TEACHER, ON_POLICY)


def check_store(store: FeatureStore, samples: Sequence[TokenSample], target: Target, spec: FeatureSpec) -> list[Check]:
    """All of them.

    Args:
        store: the run's.
        samples: of the run's data stage.
        target: loaded now.
        spec: the layers that the run's method reads.
    """
    states = _states(store, samples)
    if states.verdict == "fail":
        reason = f"not measured before {STATES.name} is right"
        return [_belongs(store, samples, target, spec), states, *(q.skipped(reason) for q in QUESTIONS[2:])]
    return [
        _belongs(store, samples, target, spec),
        states,
        *_against_target(store, target),
        _on_policy(store),
    ]


def _belongs(store: FeatureStore, samples: Sequence[TokenSample], target: Target, spec: FeatureSpec) -> Check:
    origin = store.origin
    template = hashlib.sha256(json.dumps(target.tokenizer.chat_template).encode()).hexdigest()
    same = {
        "data": origin.data == data_digest(samples),
        "target": origin.target.fingerprint == target.spec.fingerprint,
        "chat template": origin.chat_template == template,
        "layers": origin.layers == spec.layers,
    }
    other = [name for name, equal in same.items() if not equal]
    text = f"another {' and '.join(other)}" if other else f"the same {', '.join(same)}"
    return BELONGS.answer("fail" if other else "pass", text, {"others": float(len(other))})


def _states(store: FeatureStore, samples: Sequence[TokenSample]) -> Check:
    length = {sample.id: len(sample.input_ids) for sample in samples}
    wrong = [name for name, found in zip(store.ids, store.lengths, strict=True) if length.get(name, found) != found]
    read = _evenly(len(store), READ)
    for index in read:
        try:
            row = store[index]
        except DamagedDataError:  # its tensors are of other sizes than its description says
            wrong.append(store.ids[index])
            continue
        if len(row.features) != len(row.input_ids):
            wrong.append(store.ids[index])
    names = sorted(set(wrong))
    text = f"{len(names):,} of {len(store):,} conversations have another number ({len(read):,} read)"
    text += f", as {', '.join(names[:3])}" if names else ""
    return STATES.answer("fail" if names else "pass", text, {"wrong": float(len(names))})


@torch.inference_mode()
def _against_target(store: FeatureStore, target: Target) -> list[Check]:
    layers, layer_count, spec = store.layers, target.spec.num_layers, store.target
    if (spec.hidden_size, spec.vocab_size, spec.num_layers) != (
        target.spec.hidden_size, target.spec.vocab_size, layer_count,
    ):  # fmt: skip
        reason = "the store is of a target of another shape"
        return [STORED_LAYERS.skipped(reason), STORED_TEACHER.skipped(reason)]
    near = sorted({layer + shift for layer in layers for shift in (-1, 0, 1)} & set(range(layer_count)))
    cosines: dict[tuple[int, int], list[Tensor]] = {}
    same: list[Tensor] = []
    usable = [i for i in range(len(store)) if store.lengths[i] >= 3 and store.trained[i]]
    with target.tap(near) as taps:
        for index in (usable[i] for i in _evenly(len(usable), COMPUTED)):
            row = store[index]
            # What stands behind does not change what stands before.
            count = min(len(row.input_ids), COMPUTED_TOKENS)
            sample = TokenSample(store.ids[index], row.input_ids[:count].tolist(), row.loss_mask[:count].tolist())
            (fresh,) = read_features(target, [sample], taps.features, HiddenSignal())
            found = dict(zip(near, fresh.features.split(spec.hidden_size, -1), strict=True))
            for layer, state in zip(layers, row.features[:count].split(spec.hidden_size, -1), strict=True):
                for other in {layer - 1, layer, layer + 1} & set(near):
                    cosine = F.cosine_similarity(state[1:].float(), found[other][1:].float(), dim=-1)
                    cosines.setdefault((layer, other), []).append(cosine)
            same.append(_same_choice(row, fresh, store.frozen_head(), target.frozen_head))
    mean = {pair: float(torch.cat(parts).mean()) for pair, parts in cosines.items()}
    return [_layers_like(layers, mean), _teacher_like(store, torch.cat(same))]


def _same_choice(stored: Features, fresh: Features, store_s: FrozenHead, target_s: FrozenHead) -> Tensor:
    """[row] bool, whether the stored teacher's argmax is the target's, or tied with it.

    Args:
        stored: of a whole conversation.
        fresh: of its beginning.
        store_s: the frozen head that the store came with.
        target_s: that of the target.
    """
    assert isinstance(fresh.teacher, HiddenTeacher)
    where = taught(fresh.loss_mask)
    if isinstance(stored.teacher, HiddenTeacher):
        chosen = store_s.logits(stored.teacher.hidden[: len(where)]).argmax(-1)
    else:
        chosen = stored.teacher_token[where]
    logits = target_s.logits(fresh.teacher.hidden).cpu()
    best = logits.amax(-1)
    return logits.gather(-1, chosen[:, None])[:, 0] >= best - TIE * best.abs()


def _layers_like(layers: Sequence[int], mean: dict[tuple[int, int], float]) -> Check:
    own = min(mean[layer, layer] for layer in layers)
    beside = max((value for (layer, other), value in mean.items() if layer != other), default=0.0)
    best = all(mean[layer, layer] >= value for (layer, _), value in mean.items())
    verdict: Verdict = "pass" if own >= SAME_STATE and best else "fail"
    text = f"layers {list(layers)}: cosine {own:.4f} or more with the target's, {beside:.4f} or less with those beside"
    return STORED_LAYERS.answer(verdict, text, {"own": own, "beside": beside})


def _teacher_like(store: FeatureStore, same: Tensor) -> Check:
    if not len(same):
        return STORED_TEACHER.skipped("the conversations looked at train nothing in their beginning")
    share = float(same.float().mean())
    bound = SAME_ARGMAX if store.origin.codec == "bf16" else SAME_ARGMAX_ROUNDED
    text = f"{share:.2%} of {len(same):,} positions, {store.target.dtype} kept as {store.origin.codec}"
    return STORED_TEACHER.answer("pass" if share >= bound else "fail", text, {"same_argmax": share})


def _on_policy(store: FeatureStore) -> Check:
    share = argmax_share(store, READ)
    verdict: Verdict = "pass" if share >= OWN[0] else "warn" if share >= OWN[1] else "fail"
    return ON_POLICY.answer(verdict, f"{share:.1%} of the trained tokens", {"share": share})


def _evenly(total: int, count: int) -> list[int]:
    """Up to `count` of `total` indices."""
    return sorted({i * total // count for i in range(count)}) if total else []
