"""Where the heads of EAGLE-3's shape begin."""

from __future__ import annotations

import torch
from torch import Tensor

from sstf.heads import Eagle3Head


def start_from_last_layer(head: Eagle3Head, layer: dict[str, Tensor]) -> None:
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
