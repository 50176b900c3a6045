"""What an EAGLE-3 head computes along a given text, step by step: by the code that trains it, and by the code that
drafts with it.

Both read the text's own tokens in every step, as test-time training does, so that one wrong draft does not spoil what
is compared behind it. Values, in the order of computation; step i starts at `.0`:

| name | shape | what |
|---|---|---|
| `features` | [seq, taps] | the target's hidden states |
| `embeddings` | [seq, hidden] | of the tokens |
| `fc` | [seq, hidden] | the fused features |
| `attention.i` | [row, hidden] | behind the attention, residual included |
| `mlp.i` | [row, hidden] | the layer's output |
| `logits.i` | [row, draft_vocab] | draft logits |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import TypeIs

from sstf.features import rows_ahead
from sstf.heads import Eagle3Head, FusedEagle
from sstf.targets import PreallocatedCache
from sstf.types import FeatureBatch


@dataclass(frozen=True)
class Trace:
    """Of one text."""

    values: dict[str, Tensor]  # see the module docstring
    drafted: Tensor  # [steps, row] int64, the best draft token as a target id


def can_be_traced(head: nn.Module) -> TypeIs[Eagle3Head]:
    """Whether a head is one that is looked into here."""
    return type(head) is Eagle3Head and head.shape.num_layers == 1  # not what is made from it


def rows_of(batch: FeatureBatch) -> Tensor:
    """The rows at which an answer is drafted, [row] int64."""
    return batch.loss_mask.nonzero()[:, 0]


@torch.no_grad()
def trace_training(head: Eagle3Head, batch: FeatureBatch, steps: int, bf16: bool) -> Trace:
    """As `Eagle3Method.loss` computes it, for one document; `bf16` is training's precision."""
    rows = rows_of(batch)
    with torch.autocast(batch.features.device.type, torch.bfloat16, enabled=bf16):
        ahead, _ = rows_ahead(batch.lengths, steps, batch.features.device)
        fused = head.fuse(batch.features)
        states = head.unroll_states(fused, batch.input_ids, batch.lengths, ahead[:, rows])
        logits = head.logits(states.outs)
    values = {"features": batch.features, "embeddings": head.embed(batch.input_ids), "fc": fused}
    for i in range(steps):
        values |= {f"attention.{i}": states.middles[i], f"mlp.{i}": states.outs[i], f"logits.{i}": logits[i]}
    return Trace(values, head.draft_tokens[logits.argmax(-1)])


@torch.inference_mode()
def trace_drafting(head: Eagle3Head, features: Tensor, tokens: Tensor, rows: Tensor, steps: int) -> Trace:
    """As `FeedbackDrafter` computes it, all rows at once: step i's node of row t sees step 0 up to t and its own nodes.

    Args:
        head: in the dtype that it decodes in.
        features: [seq, taps] as the decoder captures them.
        tokens: [seq] int64, x_{t+1} of each row.
        rows: [row] int64, where values are wanted.
        steps: of the chain.
    """
    seq, device = len(tokens), tokens.device
    step = FusedEagle(head)
    step.make_rope(seq + steps)
    cache = PreallocatedCache(("attention",), 1, seq * steps)
    ahead, _ = rows_ahead((seq,), steps, device)
    at = torch.arange(seq, device=device)
    own = at == at[:, None]
    state = step.fuse(features[None])
    values = {"features": features, "embeddings": head.embed(tokens), "fc": state[0]}
    drafted = []
    for i in range(steps):
        cache.write_behind(seq * i)
        mask = torch.cat([at <= at[:, None], *[own] * i], -1)
        middle = step.attend(state, tokens[ahead[i]][None], (at + i)[None], mask[None], cache)
        out = step.finish(middle)
        logits = step.logits(out[0, rows])
        values |= {f"attention.{i}": middle[0, rows], f"mlp.{i}": out[0, rows], f"logits.{i}": logits}
        state = step.fed_back(out)
        drafted.append(head.draft_tokens[logits.argmax(-1)])
    return Trace(values, torch.stack(drafted))
