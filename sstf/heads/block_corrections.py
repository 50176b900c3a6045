"""Block heads whose drafts know of each other: the logits of a slot, corrected by the tokens drafted before it.

Both add `correction` (low rank) times a function of the path, so one pass over the block stays all that the layers
compute. Domino's path is all its tokens, through a GRU (arXiv 2605.29707):

    logits_i = lm_head . hidden_i + embed_proj_2 . silu(embed_proj_0 . [hidden_i; GRU(anchor, draft_0 .. draft_{i-1})])

DSpark's is the last token alone (arXiv 2607.05147), and a second head says how likely a draft is to be accepted:

    logits_i     = lm_head . hidden_i + markov_w2 . markov_w1[draft_{i-1}]
    confidence_i = sigmoid(proj . [hidden_i; markov_w1[draft_{i-1}]])

Module names are those of the published checkpoints: SpecForge's DominoDraftModel, and vLLM's Qwen3DSparkModel.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sstf.heads.block import BlockHead, BlockShape


class DominoHead(BlockHead):
    """With a GRU over the embeddings of the anchor and of what was drafted."""

    def __init__(
        self,
        shape: BlockShape,
        embeddings: Tensor,
        lm_head: Tensor,
        draft_tokens: Tensor,
        mask_token: int,
        gru_size: int,
        rank: int,
    ) -> None:
        """Args:
        shape: see `BlockHead`, as all that are not named here.
        embeddings: of the target.
        lm_head: of the target.
        draft_tokens: of the draft vocabulary.
        mask_token: target id.
        gru_size: of its state.
        rank: of the correction.
        """
        super().__init__(shape, embeddings, lm_head, draft_tokens, mask_token)
        self.prefix_gru = nn.GRU(shape.hidden_size, gru_size, bias=False, batch_first=True)
        self.embed_proj = nn.Sequential(
            nn.Linear(shape.hidden_size + gru_size, rank, bias=False),
            nn.SiLU(),
            nn.Linear(rank, len(draft_tokens), bias=False),
        )

    @property
    def correction(self) -> Tensor:
        """See `BlockHead.correction`."""
        last = self.embed_proj[2]
        assert isinstance(last, nn.Linear)
        return last.weight

    def path_start(self, anchors: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows state"]:
        """See `BlockHead.path_start`."""
        return self.path_next(self.fc.weight.new_zeros(*anchors.shape, self.prefix_gru.hidden_size), anchors)

    def path_next(
        self, state: Float[Tensor, "*rows state"], tokens: Int[Tensor, "*rows"]
    ) -> Float[Tensor, "*rows state"]:
        """One step of the GRU (torch's own takes whole sequences only, and its cell other weights)."""
        of_token = F.linear(self.embed(tokens), self.prefix_gru.get_parameter("weight_ih_l0")).chunk(3, -1)
        of_state = F.linear(state, self.prefix_gru.get_parameter("weight_hh_l0")).chunk(3, -1)
        reset, update = ((a + b).sigmoid() for a, b in zip(of_token[:2], of_state[:2], strict=True))
        new = (of_token[2] + reset * of_state[2]).tanh()
        return new + update * (state - new)

    def low_rank(
        self, hidden: Float[Tensor, "*rows hidden"], state: Float[Tensor, "*rows state"]
    ) -> Float[Tensor, "*rows rank"]:
        """See `BlockHead.low_rank`."""
        out: Tensor = self.embed_proj[:2](torch.cat([hidden, state.to(hidden.dtype)], -1))
        return out


class MarkovHead(nn.Module):
    """What the token before adds to the logits."""

    def __init__(self, vocab_size: int, draft_vocab_size: int, rank: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab_size, bias=False)


class ConfidenceHead(nn.Module):
    """How likely a draft is to be accepted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 1)


class DSparkHead(BlockHead):
    """With a Markov bias, and confidences."""

    def __init__(
        self, shape: BlockShape, embeddings: Tensor, lm_head: Tensor, draft_tokens: Tensor, mask_token: int, rank: int
    ) -> None:
        """Args:
        shape: see `BlockHead`, as all but `rank`.
        embeddings: of the target.
        lm_head: of the target.
        draft_tokens: of the draft vocabulary.
        mask_token: target id.
        rank: of the bias.
        """
        super().__init__(shape, embeddings, lm_head, draft_tokens, mask_token)
        self.markov_head = MarkovHead(shape.vocab_size, len(draft_tokens), rank)
        self.confidence_head = ConfidenceHead(shape.hidden_size + rank)

    @property
    def correction(self) -> Tensor:
        """See `BlockHead.correction`."""
        return self.markov_head.markov_w2.weight

    def path_start(self, anchors: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows state"]:
        """See `BlockHead.path_start`."""
        state: Tensor = self.markov_head.markov_w1(anchors)
        return state

    def path_next(
        self, state: Float[Tensor, "*rows state"], tokens: Int[Tensor, "*rows"]
    ) -> Float[Tensor, "*rows state"]:
        """The last token alone counts."""
        return self.path_start(tokens)

    def confidence(
        self, hidden: Float[Tensor, "*rows hidden"], state: Float[Tensor, "*rows state"]
    ) -> Float[Tensor, "*rows"]:
        """Logits of the chance that a slot's draft behind this path is accepted; float32."""
        # Not a product: under autocast that would round a single number to bfloat16.
        proj = self.confidence_head.proj
        out: Tensor = (torch.cat([hidden, state.to(hidden.dtype)], -1).float() * proj.weight[0]).sum(-1) + proj.bias[0]
        return out
