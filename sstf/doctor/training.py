"""Checks on a finished training: whether its weights moved, whether it was too easy, and whose vocabulary it has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sstf.data.tokens import supervised_frequencies
from sstf.doctor.report import Check, Question, Verdict
from sstf.methods import build_method
from sstf.methods.base import TrainableMethod
from sstf.methods.checkpoint import StoredHead
from sstf.targets import FrozenHead
from sstf.targets.draft_vocab import choose_draft_vocab, coverage
from sstf.train.checkpoint import list_checkpoints, read_checkpoint
from sstf.types import TokenSample

STILL = (0.1, 0.5)  # entries of one tensor that did not change: above the first a warning, the second a failure
EARLY = (0.8, 0.95)  # first-token accuracy in the first log line: above the first a warning, the second a failure
SAME_VOCABULARY = 0.95  # of the coverage that the best vocabulary of this size has

FROZEN_ENTRIES = Question(
    "training",
    "frozen entries",
    f"at most {STILL[0]:.0%} of any tensor's entries are the same after training ({STILL[1]:.0%}: failed)",
    "Keep the trained weights in float32: steps smaller than the spacing of bfloat16 numbers are lost.",
)
EARLY_ACCURACY = Question(
    "training",
    "early accuracy",
    f"at most {EARLY[0]:.0%} in the first line of the log ({EARLY[1]:.0%}: failed)",
    "No head is this good this early: look whether it sees the token that it has to predict.",
)
OWN_VOCABULARY = Question(
    "training",
    "vocabulary of this data",
    f"covers {SAME_VOCABULARY:.0%} or more of what the best vocabulary of its size covers of the trained tokens",
    "The draft vocabulary was chosen from other data: train anew without the old one (warm_start keeps it).",
)
QUESTIONS = (FROZEN_ENTRIES, EARLY_ACCURACY, OWN_VOCABULARY)


def check_training(
    folder: Path, head: StoredHead, samples: Sequence[TokenSample], start: Mapping[str, Tensor] | None = None
) -> list[Check]:
    """All of them.

    Args:
        folder: of the training, with its log and checkpoints.
        head: that it chose.
        samples: of the run's data stage.
        start: the weights at step 0, for a training that keeps one state alone.

    Raises:
        DamagedDataError: a checkpoint was cut off or altered.
    """
    return [_frozen_entries(folder, head, start), _early_accuracy(folder), _own_vocabulary(head, samples)]


def initial_weights(head: StoredHead, frozen: FrozenHead, seed: int) -> dict[str, Tensor]:
    """What a training that was given no weights began with: the trainer draws them anew from its seed.

    Args:
        head: that came of it.
        frozen: of its target.
        seed: of the run.
    """
    method = build_method(head.config)
    assert isinstance(method, TrainableMethod)
    offsets = head.tensors["d2t"]
    draft_tokens = (offsets + torch.arange(len(offsets))).to(frozen.embeddings.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return {name: t.cpu() for name, t in method.build_head(head.target, frozen, draft_tokens).state_dict().items()}


def _frozen_entries(folder: Path, head: StoredHead, start: Mapping[str, Tensor] | None) -> Check:
    states: dict[int, Mapping[str, Tensor]] = {int(head.run.get("step", -1)): head.tensors}
    paths = list_checkpoints(folder / "checkpoints")
    for path in {*paths[:1], *paths[-1:]}:
        found = read_checkpoint(path)
        states[found.progress.step] = found.head
    if len(states) < 2 and start is not None:
        states[0] = start
    if len(states) < 2:
        return FROZEN_ENTRIES.skipped("only one state of the weights is kept; lower train.checkpoint_every for two")
    first, last = min(states), max(states)
    before, after = states[first], states[last]
    still = {
        name: float((before[name] == after[name]).float().mean())
        for name in before.keys() & after.keys()
        if before[name].is_floating_point()
    }
    worst = max(still, key=lambda name: still[name])
    entries = sum(before[name].numel() for name in still)
    share = sum(still[name] * before[name].numel() for name in still) / entries
    verdict: Verdict = "pass" if still[worst] <= STILL[0] else "warn" if still[worst] <= STILL[1] else "fail"
    text = (
        f"{share:.2%} of {entries:,} entries between steps {first} and {last}; at most {still[worst]:.2%}, in {worst}"
    )
    return FROZEN_ENTRIES.answer(verdict, text, {"share": share, "worst": still[worst]})


def _early_accuracy(folder: Path) -> Check:
    log = folder / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    rows = [row for row in map(json.loads, lines) if "train/accuracy/0" in row]
    if not rows:
        return EARLY_ACCURACY.skipped("the training has no log of its accuracy")
    step, found = int(rows[0]["step"]), float(rows[0]["train/accuracy/0"])
    verdict: Verdict = "pass" if found <= EARLY[0] else "warn" if found <= EARLY[1] else "fail"
    return EARLY_ACCURACY.answer(verdict, f"{found:.1%} of first tokens at step {step}", {"accuracy": found})


def _own_vocabulary(head: StoredHead, samples: Sequence[TokenSample]) -> Check:
    offsets = head.tensors["d2t"]
    own = offsets + torch.arange(len(offsets))
    counts = supervised_frequencies(samples, head.target.vocab_size)
    covered, best = coverage(counts, own), coverage(counts, choose_draft_vocab(counts, len(own)))
    verdict: Verdict = "pass" if covered >= SAME_VOCABULARY * best else "fail"
    text = f"{covered:.1%} of the trained tokens, the best {len(own):,} tokens cover {best:.1%}"
    return OWN_VOCABULARY.answer(verdict, text, {"covered": covered, "best": best})
