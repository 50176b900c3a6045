"""What the heads of EAGLE-3's shape share: the layers that they read, and where they begin."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sstf.errors import ConfigError
from sstf.features.spec import FeatureSpec
from sstf.heads import Eagle3Head
from sstf.targets import FrozenHead, TargetSpec


def fused_layers(chosen: tuple[int, ...] | None, target: TargetSpec) -> FeatureSpec:
    """The chosen layers, or low / middle / high: {1, L//2 - 1, L - 4}.

    Raises:
        ConfigError: the target lacks one, or one is named twice.
    """
    count = target.num_layers
    layers = chosen or (1, count // 2 - 1, count - 4)
    if len(set(layers)) != len(layers) or not all(0 <= layer < count for layer in layers):
        raise ConfigError(
            f"method.layers: target {target.name} has layers 0 to {count - 1}, cannot read {list(layers)}; "
            "name different layers in that range"
        )
    return FeatureSpec(tuple(sorted(layers)))


@torch.no_grad()
def initialise(head: Eagle3Head, frozen: FrozenHead, init: Literal["target", "random"]) -> None:
    """Weights under torch's current seed; lm_head rows and the last norm come from the target's. `target` starts the
    layers from the target's last one."""
    for parameter in head.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
    head.lm_head.weight.copy_(frozen.lm_head[head.draft_tokens])
    head.norm.weight.copy_(frozen.final_norm)
    if init == "target":
        _start_from_last_layer(head, frozen.last_layer)


def _start_from_last_layer(head: Eagle3Head, layer: dict[str, Tensor]) -> None:
    """Copy the target's last decoder layer to the head's first: fc passes the highest tap on, attention reads the
    feature half as the target's layer reads its input (the embedding half starts at random).

    A parameter that the layer lacks, or that has another shape (a target that is not Llama-like), keeps its random
    start. Later layers add nothing to what they read until they are trained. So the head begins as a rough early exit
    of the target, not as noise.
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
    for later in head.later_layers:
        later.self_attn.o_proj.weight.zero_()
        later.mlp.down_proj.weight.zero_()
