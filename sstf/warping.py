"""From logits to the distribution that is sampled: temperature, then top-k, then top-p (nucleus).

The order and the "keep the token that crosses top_p" convention are those of transformers' and vLLM's samplers.
Temperature 0 is greedy: all mass on the argmax (the first one on ties, as `torch.argmax`).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

COLDEST = 1e-30  # a lower temperature is greedy all the same, and would underflow in float32


def warp(
    logits: Float[Tensor, "*rows vocab"], temperature: float, top_p: float = 1.0, top_k: int = 0
) -> Float[Tensor, "*rows vocab"]:
    """The warped distribution over the whole vocabulary, float32.

    Args:
        logits: [..., vocab], any float dtype.
        temperature: 0 or above.
        top_p: in (0, 1]; 1 is off.
        top_k: 0 is off.
    """
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, best, 1.0)
    if top_p >= 1 and top_k == 0:
        return torch.softmax(_divide(logits.float(), temperature), -1)
    probs, ids = warp_top(logits, temperature, top_p, top_k)
    return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, ids, probs)


def warp_top(
    logits: Float[Tensor, "*rows vocab"], temperature: Tensor | float, top_p: Tensor | float, top_k: int
) -> tuple[Float[Tensor, "*rows kept"], Int[Tensor, "*rows kept"]]:
    """The same as probabilities in descending order with their token ids; `kept` is top_k, or the vocabulary.

    `temperature` (above 0) and `top_p` may be tensors [..., 1], one value a row.
    """
    kept = min(top_k or logits.shape[-1], logits.shape[-1])
    values, ids = logits.float().topk(kept, dim=-1)
    probs = torch.softmax(_divide(values, temperature), -1)
    before = probs.cumsum(-1) - probs  # mass of the tokens ahead: the one that crosses top_p stays
    limit = torch.as_tensor(top_p)
    # The best token stays whatever top_p is; `before` is exactly 0 there, but top_p may be tiny or rounded.
    # A sum of many tokens may round to 1 and above before the last, which top_p = 1 must not drop.
    probs = torch.where((before < limit.clamp_min(1e-9)) | (limit >= 1), probs, 0.0)
    return probs / probs.sum(-1, keepdim=True), ids


def _divide(logits: Tensor, temperature: Tensor | float) -> Tensor:
    """logits / temperature up to a constant a row, which softmax ignores. The best is 0, so nothing overflows."""
    return (logits - logits.amax(-1, keepdim=True)) / torch.as_tensor(temperature).clamp_min(COLDEST)
