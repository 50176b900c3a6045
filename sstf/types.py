"""The nouns that every package shares, and the legend of dimensions.

Dimensions, used in annotations and comments alike:

| name | meaning |
|---|---|
| `batch` | conversations (or parts) in a batch |
| `seq` | positions in a row, padding included |
| `hidden` | hidden size of the target |
| `taps` | number of target layers read, times `hidden` |
| `vocab` | target vocabulary |
| `draft_vocab` | draft vocabulary, a subset of the target's |
| `node` | nodes of a draft tree, the root excluded |
| `row` | supervised positions of a batch, flattened |

Symbols: `x_t` is the token at position t, `h_t` the target's hidden state at position t (it predicts `x_{t+1}`).
`target_probs` is the target's next-token distribution after temperature and top-p; `draft_probs` is the head's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Message:
    """One turn: `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns in order. `id` is unique within its source; `source` names the file, data set or model it came from."""

    id: str
    messages: tuple[Message, ...]
    source: str


@dataclass(frozen=True)
class TokenSample:
    """One rendered conversation. `loss_mask[t]` is True where token t was written by the assistant."""

    id: str
    input_ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True)
class FeatureBatch:
    """Aligned training input; built in one place, `features/dataset.py`, which holds the worked token table.

    Row position t carries the target features of `x_t`, the draft input token `x_{t+1}`, and the teacher of
    `x_{t+2}`. Rows are padded at the end; padding has `loss_mask` False.
    """

    features: Tensor  # [batch, seq, taps], aux(h_t)
    input_ids: Tensor  # [batch, seq] int64, x_{t+1}
    teacher_hidden: Tensor  # [batch, seq, hidden], h_{t+1} after the target's final norm
    teacher_token: Tensor  # [batch, seq] int64, argmax of the target at h_{t+1}
    teacher_lse: Tensor  # [batch, seq] float32, log-sum-exp of the target's logits at h_{t+1}, whole vocabulary
    labels: Tensor  # [batch, seq] int64, x_{t+2}
    loss_mask: Tensor  # [batch, seq] bool, True where x_{t+2} was written by the assistant


@dataclass(frozen=True)
class StepOutput:
    """What a method's `loss` returns for one batch, summed and not yet divided, so that the trainer can normalise by
    the GLOBAL number of valid tokens. Row i belongs to test-time-training step i (draft position i)."""

    loss: Tensor  # scalar, sum over steps and valid tokens of weight * per-token loss; carries the graph
    valid: Tensor  # [ttt_steps] float32, number of valid tokens
    losses: Tensor  # [ttt_steps] float32, unweighted sum of per-token losses, detached
    hits: Tensor  # [ttt_steps] float32, tokens where the draft's argmax is the teacher's argmax, detached
    overlap: Tensor  # [ttt_steps] float32, sum over tokens of sum_v min(target_probs, draft_probs), detached
    chain_hits: Tensor  # [ttt_steps, anchors] bool, hits of the chains that lie wholly in supervised text


@dataclass(frozen=True)
class DraftTree:
    """Candidate continuations of one sequence. The root (the last emitted token) is not a node.

    Nodes come in an order in which parents precede children; among siblings, the better (or the earlier drawn) comes
    first. `parents[i]` is the node index of i's parent, -1 for children of the root.

    Without `draft_probs` the nodes were chosen deterministically (the top of the draft distribution): siblings have
    different tokens. With it they were drawn at random, siblings in the order of drawing.
    """

    tokens: Tensor  # [node] int64, target vocabulary
    parents: Tensor  # [node] int64
    confidence: Tensor | None = None  # [node] float32, draft probability of the token at its parent
    # [node + 1, vocab]: row 0 is what the root's children were drawn from, row i + 1 the children of node i. Rows of
    # leaves are never read.
    draft_probs: Tensor | None = None
    # [node] int64, rank of the token at its parent; None where no better sibling was left out: its place then.
    ranks: Tensor | None = None

    @staticmethod
    def empty(device: torch.device) -> DraftTree:
        """No proposal: the verify pass degenerates to one plain decoding step."""
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        return DraftTree(nothing, nothing)

    def __len__(self) -> int:
        return int(self.tokens.shape[0])


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off.

    A text ends with the token that completes one of the strings `stop` (decoding only; regeneration has none).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampled:
    """One sampled continuation. `finished` is False when it was cut at the length limit."""

    token_ids: list[int] = field(default_factory=list)
    finished: bool = False
