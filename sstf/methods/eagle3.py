"""EAGLE-3 (arXiv 2503.01840): a one-layer head over three target layers, trained by test-time training.

Loss: sum_i decay^i * KL(target over the draft vocabulary || draft at step i), over the positions whose supervised
token was written by the assistant and whose teacher's argmax the draft vocabulary holds.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from sstf.config_loading import Section
from sstf.errors import ConfigError
from sstf.features.dataset import shift_left
from sstf.features.spec import FeatureSpec
from sstf.heads import Eagle3Head, EagleShape
from sstf.losses import fused_distill, teacher
from sstf.targets import FrozenHead, TargetSpec
from sstf.trees import Chain, DynamicTree, grow
from sstf.types import DraftTree, FeatureBatch, StepOutput


class Eagle3Config(Section):
    """`layers` are 0-based layer outputs; None takes the paper's {1, L//2 - 1, L - 4}.

    `init` `target` starts the decoder layer, the norms and the draft logits from the target's last layer, final
    norm and lm_head; `random` does so for the lm_head only.
    """

    kind: Literal["eagle3"] = "eagle3"
    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    draft_vocab_size: int = Field(default=8192, ge=16)
    ttt_steps: int = Field(default=7, ge=1, le=16)
    ttt_decay: float = Field(default=0.8, gt=0, le=1)
    init: Literal["target", "random"] = "target"


class Eagle3Method:
    """A `TrainableMethod`."""

    def __init__(self, config: Eagle3Config) -> None:
        self.config = config

    @property
    def draft_vocab_size(self) -> int:
        """Tokens that the head can propose."""
        return self.config.draft_vocab_size

    def feature_spec(self, target: TargetSpec) -> FeatureSpec:
        """The configured layers, or low / middle / high."""
        count = target.num_layers
        layers = self.config.layers or (1, count // 2 - 1, count - 4)
        if len(set(layers)) != len(layers) or not all(0 <= layer < count for layer in layers):
            raise ConfigError(
                f"method.layers: target {target.name} has layers 0 to {count - 1}, cannot read {list(layers)}; "
                "name different layers in that range"
            )
        return FeatureSpec(tuple(sorted(layers)))

    def build_head(self, target: TargetSpec, frozen: FrozenHead, draft_tokens: Tensor) -> Eagle3Head:
        """A new head; lm_head rows come from the target's."""
        shape = EagleShape(
            hidden_size=target.hidden_size,
            taps=target.hidden_size * len(self.feature_spec(target).layers),
            num_heads=target.num_heads,
            num_kv_heads=target.num_kv_heads,
            head_dim=target.head_dim,
            intermediate_size=target.intermediate_size,
            draft_vocab_size=len(draft_tokens),
            vocab_size=target.vocab_size,
            rms_norm_eps=target.rms_norm_eps,
            rope_theta=target.rope_theta,
            max_position_embeddings=target.max_position_embeddings,
        )
        head = Eagle3Head(shape, frozen.embeddings, draft_tokens)
        with torch.no_grad():
            for parameter in head.parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=0.02)
            head.lm_head.weight.copy_(frozen.lm_head[draft_tokens])
            head.norm.weight.copy_(frozen.final_norm)
            if self.config.init == "target":
                _start_from_last_layer(head, frozen.last_layer)
        return head

    def loss(self, head: nn.Module, batch: FeatureBatch, frozen: FrozenHead) -> StepOutput:
        """Test-time-training loss of one batch; see the module docstring."""
        assert isinstance(head, Eagle3Head)
        steps = self.config.ttt_steps
        outs = head.unroll(
            head.fc(batch.features.to(head.fc.weight.dtype)), [shift_left(batch.input_ids, i) for i in range(steps)]
        )
        supervised = batch.loss_mask & head.t2d[batch.teacher_token.clamp_min(0)]
        target = teacher(
            frozen.logits(batch.teacher_hidden[supervised], head.draft_tokens), batch.teacher_lse[supervised]
        )
        teacher_row = torch.zeros_like(batch.labels)
        teacher_row[supervised] = torch.arange(int(supervised.sum()), device=supervised.device)
        valid = torch.stack([shift_left(supervised, i) for i in range(steps)])
        counts = valid.flatten(1).sum(-1)
        weights = self.config.ttt_decay ** torch.arange(steps, device=counts.device)
        result = fused_distill(
            torch.cat([head.norm(out[mask]) for out, mask in zip(outs, valid, strict=True)]),
            head.lm_head.weight,
            target,
            torch.cat([shift_left(teacher_row, i)[mask] for i, mask in enumerate(valid)]),
            weights.repeat_interleave(counts),
        )
        teacher_tokens = torch.stack([shift_left(batch.teacher_token, i) for i in range(steps)])
        hits = torch.zeros_like(valid)
        hits[valid] = head.draft_tokens[result.draft_token] == teacher_tokens[valid]
        # Anchors whose whole chain lies in supervised text; a token outside the draft vocabulary is a miss.
        whole = torch.stack([shift_left(batch.loss_mask, i) for i in range(steps)]).all(0)
        lengths = counts.tolist()
        return StepOutput(
            loss=result.loss_sum,
            valid=counts.float(),
            losses=torch.stack([part.sum() for part in result.losses.split(lengths)]),
            hits=hits.flatten(1).sum(-1).float(),
            overlap=torch.stack([part.sum() for part in result.overlap.split(lengths)]),
            chain_hits=hits[:, whole],
        )

    def drafter(self, head: nn.Module | None, device: torch.device) -> Eagle3Drafter:
        """A drafter with an empty key/value cache."""
        assert isinstance(head, Eagle3Head)
        return Eagle3Drafter(head)


def _start_from_last_layer(head: Eagle3Head, layer: dict[str, Tensor]) -> None:
    """Copy the target's last decoder layer: fc passes the highest tap on, attention reads the feature half
    as the target's layer reads its input (the embedding half starts at random).

    A parameter that the layer lacks, or that has another shape (a target that is not Llama-like), keeps its random
    start. So the head begins as a rough early exit of the target, not as noise.
    """
    hidden = head.shape.hidden_size
    head.fc.weight.zero_()
    head.fc.weight[:, -hidden:] = torch.eye(hidden)
    names = dict(head.midlayer.named_parameters())
    renamed = {"hidden_norm.weight": "input_layernorm.weight"}
    for name, parameter in names.items():
        source = layer.get(renamed.get(name, name))
        if source is None or name == "input_layernorm.weight":
            continue
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
            if source.shape == (parameter.shape[0], hidden):
                parameter[:, hidden:] = source
        elif source.shape == parameter.shape:
            parameter.copy_(source)


class Eagle3Drafter:
    """One sequence: a key/value cache of real positions, and behind it the entries of the tree being drafted."""

    def __init__(self, head: Eagle3Head) -> None:
        self.head = head
        shape = head.shape
        like = head.fc.weight
        self.keys = like.new_empty(1, shape.num_kv_heads, 512, shape.head_dim)
        self.values = torch.empty_like(self.keys)
        self.length = 0  # positions whose features the target computed

    @torch.inference_mode()
    def propose(self, features: Tensor, tokens: Tensor, policy: Chain | DynamicTree) -> DraftTree:
        """See `Drafter.propose`."""
        head, count = self.head, len(tokens)
        positions = torch.arange(self.length, self.length + count, device=tokens.device)
        causal = torch.arange(self.length + count, device=tokens.device) <= positions[:, None]
        out = self._forward(head.fc(features.to(head.fc.weight.dtype)), tokens, positions, causal)
        self.length += count
        last = out[-1:]
        tree_rows = torch.zeros(1, 0, dtype=torch.bool, device=tokens.device)  # ancestors of the level's nodes
        level = 0

        def expand(parents: Tensor, draft_ids: Tensor) -> Tensor:
            nonlocal last, tree_rows, level
            width = len(parents)
            own = torch.eye(width, dtype=torch.bool, device=parents.device)
            tree_rows = torch.cat([tree_rows[parents], own], -1)
            seen = torch.ones(width, self.length, dtype=torch.bool, device=parents.device)
            at = torch.full((width,), self.length + level, device=parents.device)
            mask = torch.cat([seen, tree_rows], -1)
            last = self._forward(last[parents], head.draft_tokens[draft_ids], at, mask)
            level += 1
            return torch.log_softmax(head.logits(last).float(), -1)

        first = torch.log_softmax(head.logits(last)[0].float(), -1)
        return grow(policy, first, expand, head.draft_tokens)

    def _forward(self, g: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Run the layer on [seq] rows, whose keys join the cache behind what `mask` [seq, visible] shows already."""
        head = self.head
        query, key, value = head.midlayer.qkv(head.embed(tokens[None]), g[None], *head.rope(positions[None]))
        end = mask.shape[1]
        self._make_room(end)
        self.keys[:, :, end - len(tokens) : end] = key
        self.values[:, :, end - len(tokens) : end] = value
        groups = head.shape.num_heads // head.shape.num_kv_heads
        attended = F.scaled_dot_product_attention(
            query,
            self.keys[:, :, :end].repeat_interleave(groups, 1),
            self.values[:, :, :end].repeat_interleave(groups, 1),
            attn_mask=mask,
        )
        return head.midlayer.finish(g[None], attended)[0]

    def _make_room(self, end: int) -> None:
        while end > self.keys.shape[2]:
            self.keys = torch.cat([self.keys, torch.empty_like(self.keys)], 2)
            self.values = torch.cat([self.values, torch.empty_like(self.values)], 2)
