"""Where the weights of a target too big for one device lie.

transformers spreads a model by a device map, and moves activations and offloaded weights as a pass goes through it.
What is left for us: the maps' names, weights that are not in memory while no pass runs, and which device takes part in
the input and the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.accelerate import load_offloaded_parameter

# `auto`, `balanced` and `sequential` are transformers' own: over the GPUs by their free memory, then main memory, then
# the disk. `disk` leaves the decoder layers on the disk, from where each pass reads them one by one. A dictionary gives
# module names their devices (`cuda:1`, `cpu`, `disk`).
DeviceMap = Literal["auto", "balanced", "sequential", "disk"] | dict[str, str]


def layers_on_disk(path: str, device: torch.device, revision: str | None, trust_remote_code: bool) -> dict[str, str]:
    """The device map `disk`: everything on `device` but the decoder layers.

    The model is built without weights to learn its modules' names.
    """
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    layers = decoder_layers(model.get_decoder())
    names = {module: name for name, module in model.named_modules()}
    inside = names[layers].split(".")
    parents = {".".join(inside[:depth]) for depth in range(len(inside))}  # the model itself is ""
    places = {names[layers]: "disk"}
    for parent in parents:
        for child in model.get_submodule(parent).children():
            if names[child] != names[layers] and names[child] not in parents:
                places[names[child]] = str(device)
    return places


def decoder_layers(decoder: nn.Module) -> nn.ModuleList:
    """The longest list of modules in a decoder: its layers."""
    lists = [module for module in decoder.children() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def main_device(places: Mapping[str, Any]) -> torch.device:
    """Where a spread model takes its input and leaves its output: its first GPU, else the CPU."""
    devices = [place for place in places.values() if str(place) not in ("cpu", "disk")]
    return torch.empty(0, device=devices[0]).device if devices else torch.device("cpu")


def splits_tied_weights(model: Any) -> bool:
    """Whether a map puts one of two names of the same weights on the disk: transformers would not find them there."""
    places: Mapping[str, Any] = vars(model).get("hf_device_map", {})
    names = {module: name for name, module in model.named_modules()}

    def on_disk(module: nn.Module) -> bool:
        parts = names[module].split(".")
        prefixes = [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]  # the map's longest name decides
        return next((str(places[prefix]) == "disk" for prefix in prefixes if prefix in places), False)

    tied = model.config.get_text_config().tie_word_embeddings
    return tied and on_disk(model.get_input_embeddings()) != on_disk(model.get_output_embeddings())


def in_memory(model: Any, name: str, parameter: Tensor) -> Tensor:
    """`parameter` of that name, read from where it was offloaded to if it is not in memory."""
    if not parameter.is_meta:
        return parameter.detach()
    weight: Tensor = load_offloaded_parameter(model, name)
    return weight.detach()
