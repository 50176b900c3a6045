"""The target's next-token distributions over the draft vocabulary, made for a few rows at a time.

Training has many more rows than can be held as [row, draft_vocab]. What a batch carries (the last hidden states, or
the top k) is small; `Teachers` makes distributions of it when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Teacher:
    """The target's distributions of some rows."""

    probs: Float[Tensor, "row draft_vocab"]  # over the whole vocabulary, cut to the draft vocabulary
    coverage: Float[Tensor, "row"]  # what `probs` sums to
    entropy: Float[Tensor, "row"]  # of `probs` / `coverage`, in nats
    token: Int[Tensor, "row"]  # argmax of `probs`, in draft ids


CACHED = 2**17  # elements: three blocks of so many float32 numbers fit in 2 MiB, a core's cache
Teachers = Callable[[slice], Teacher]  # of the batch's teacher rows start .. stop


def rows_in_cache(table: Float[Tensor, "row draft_vocab"]) -> int:
    """How many rows of a table shall go through all passes before the next: on a CPU each pass would otherwise go
    through memory, and take longer than the matrix product that made the table. On a GPU, all of them."""
    rows, vocab = table.shape
    return min(rows, max(1, torch.get_num_threads() * CACHED // vocab)) if table.device.type == "cpu" else rows


def teacher(logits: Float[Tensor, "row draft_vocab"], full_lse: Float[Tensor, "row"]) -> Teacher:
    """From the target's logits over the draft vocabulary and its log-sum-exp over the whole vocabulary.

    Logits computed a second time round differently and may reach beyond the log-sum-exp that was stored with them:
    the coverage is cut at one.
    """
    probs = torch.empty_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
    coverage, entropy = torch.empty_like(probs[:, 0]), torch.empty_like(probs[:, 0])
    token = torch.empty_like(coverage, dtype=torch.int64)
    size = rows_in_cache(probs)
    for start in range(0, len(logits), max(1, size)):
        here = slice(start, start + size)
        shifted = logits[here].to(probs.dtype, copy=True)
        top, token[here] = shifted.max(-1)
        some = torch.exp(shifted.sub_(top[:, None]), out=probs[here])
        total = some.sum(-1)
        coverage[here] = (total.log() + top - full_lse[here]).exp().clamp(max=1.0)
        entropy[here] = total.log() - (some * shifted).sum(-1) / total
        some.mul_((coverage[here] / total)[:, None])
    return Teacher(probs, coverage, entropy, token)


def top_k_teacher(
    tokens: Int[Tensor, "row k"],
    log_probs: Float[Tensor, "row k"],
    draft_tokens: Int[Tensor, "draft_vocab"],
    vocab_size: int,
) -> Teacher:
    """From the target's `k` most likely tokens alone: all others count as impossible.

    So `probs` has the top k that the draft vocabulary holds, and zeros; `coverage` is their mass, which is less than
    the draft vocabulary's; and an overlap measured against this teacher is a lower bound, short by at most what the
    head gives to the tokens left out. With k the whole vocabulary nothing is left out.

    Args:
        tokens: [row, k] int64 target ids, no two alike in a row; one at least is in the draft vocabulary.
        log_probs: [row, k], over the whole vocabulary.
        draft_tokens: [draft_vocab] int64 target ids, in the order of the draft ids.
        vocab_size: of the target.
    """
    places = torch.full((vocab_size,), -1, device=draft_tokens.device)
    places[draft_tokens] = torch.arange(len(draft_tokens), device=draft_tokens.device)
    place = places[tokens]
    mass = log_probs.float().exp() * (place >= 0)
    total = mass.sum(-1, keepdim=True)
    coverage = total.clamp(max=1.0)
    best = mass.argmax(-1, keepdim=True)
    entropy = torch.special.entr(mass / total).sum(-1)
    probs = mass.new_zeros(len(tokens), len(draft_tokens))
    # Added, not set: the tokens outside share place 0 and bring nothing.
    probs.scatter_add_(1, place.clamp_min(0), mass * (coverage / total))
    return Teacher(probs, coverage[:, 0], entropy, place.gather(1, best)[:, 0])
