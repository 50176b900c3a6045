"""The nouns that every package shares, and the legend of dimensions.

Dimensions, used in annotations and comments alike:

| name | meaning |
|---|---|
| `batch` | sequences of a batch that is padded (of the target, and of drafting) |
| `seq` | positions of a padded row; in training, of a micro-batch's conversations one after the other |
| `hidden` | hidden size of the target |
| `taps` | number of target layers read, times `hidden` |
| `vocab` | target vocabulary |
| `draft_vocab` | draft vocabulary, a subset of the target's |
| `node` | nodes of a draft tree, the root excluded |
| `row` | chosen positions of a micro-batch: those that are supervised, or that the head is run at |

Symbols: `x_t` is the token at position t, `h_t` the target's hidden state at position t (it predicts `x_{t+1}`).
`target_probs` is the target's next-token distribution after temperature and top-p; `draft_probs` is the head's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class ToolCall:
    """A function that the assistant calls. `arguments` is a JSON object; `id` ties the result to the call."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True)
class Message:
    """One turn: `role` is `system`, `user`, `assistant` or `tool` (the result of a call).

    `reasoning` (what the assistant thought before it answered) and `tool_calls` belong to assistant turns,
    `tool_call_id` and `name` (of the function) to tool turns.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


Mode = Literal["thinking", "plain"]


@dataclass(frozen=True)
class Conversation:
    """Turns in order. `id` is unique within its source; `source` names the file, data set or model it came from.

    `tools` are the functions on offer, as JSON schemas in OpenAI's form. `mode` says whether the target is asked to
    think before it answers; None leaves that to the template.
    """

    id: str
    messages: tuple[Message, ...]
    source: str
    tools: tuple[dict[str, Any], ...] = ()
    mode: Mode | None = None


@dataclass(frozen=True)
class TokenSample:
    """One rendered conversation. `loss_mask[t]` is True where token t was written by the assistant."""

    id: str
    input_ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True)
class HiddenTeacher:
    """The target's distributions as the last hidden states, of which `lm_head` makes logits. They are exact."""

    hidden: Tensor  # [row, hidden], after the target's final norm
    lse: Tensor  # [row] float32, log-sum-exp of the target's logits over the whole vocabulary


@dataclass(frozen=True)
class TopKTeacher:
    """The target's distributions as their `k` most likely tokens, the likeliest first; the others' mass is lost."""

    tokens: Tensor  # [row, k] int64
    log_probs: Tensor  # [row, k] float16, logit - log-sum-exp over the whole vocabulary


TeacherRows = HiddenTeacher | TopKTeacher


@dataclass(frozen=True)
class FeatureBatch:
    """Aligned training input; built in one place, `features/dataset.py`, which holds the worked token table.

    Conversations (documents) stand one after the other and nothing stands between or behind them. Row t of a document
    carries the target features of `x_t`, the draft input token `x_{t+1}`, and the teacher of `x_{t+2}`.
    """

    features: Tensor  # [seq, taps], aux(h_t)
    input_ids: Tensor  # [seq] int64, x_{t+1}
    teacher: TeacherRows  # of h_{t+1} where `loss_mask` is True, in the order of the rows
    teacher_token: Tensor  # [seq] int64, argmax of the target at h_{t+1} where `loss_mask` is True
    labels: Tensor  # [seq] int64, x_{t+2}
    loss_mask: Tensor  # [seq] bool, True where x_{t+2} was written by the assistant
    lengths: tuple[int, ...]  # rows of each document, one or more; they add up to seq
    # One a document, for methods that train on a random part of the rows: another in every step of a training, and
    # the same wherever the document stands. Empty where nobody draws.
    seeds: tuple[int, ...] = ()
    # [position, seq] float32, weight of KL(draft || target) at draft position i of row t, besides the method's
    # objective: where the target rejected what a head drafted (`features/replay.py`). None where nothing is replayed.
    rejected: Tensor | None = None
    # Share of a training that is done, for losses that change on the way: 0 in its first step; 1 outside of a training,
    # where the loss is the one that it ends with.
    progress: float = 1.0


@dataclass(frozen=True)
class StepOutput:
    """What a method's `loss` returns for one batch, summed and not yet divided, so that the trainer can normalise by
    the GLOBAL number of valid tokens. Row i belongs to draft position i, which EAGLE-3 calls test-time-training step i.
    There are `TrainableMethod.positions` of them, whether a batch has rows for them or not."""

    loss: Tensor  # scalar, sum over positions and valid tokens of weight * per-token loss; carries the graph
    valid: Tensor  # [position] float32, number of valid tokens
    losses: Tensor  # [position] float32, unweighted sum of per-token losses, detached
    hits: Tensor  # [position] float32, tokens where the draft's argmax is the teacher's argmax, detached
    overlap: Tensor  # [position] float32, sum over tokens of sum_v min(target_probs, draft_probs), detached
    chain_hits: Tensor  # [position, anchors] bool, hits of the chains that lie wholly in supervised text


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
