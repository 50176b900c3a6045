"""How each form of an EAGLE-3 head counts the target's layers. It is stated here and nowhere else.

| form | an id k means | our 0-based layer output i is written as | without ids |
|---|---|---|---|
| ours | the output of 0-based layer k | i | never |
| SGLang, SpecForge | the output of 0-based layer k | i | outputs 1, L//2 - 1, L - 4 |
| transformers (DFlash) | the output of 0-based layer k | i | |
| vLLM, speculators | the residual stream after k layers | i + 1 | the same outputs, as 2, L//2, L - 3 |
| EAGLE | it has no ids | | the same outputs |

SGLang counts as vLLM does for some targets (GPT-OSS; Kimi and DeepSeek V3 unless the first id is 1). Off by one loads,
serves, and loses most of the acceptance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from sstf.errors import HeadError

Engine = Literal["vllm", "sglang", "speculators", "transformers"]
Count = Literal["outputs", "streams"]  # the output of layer k, or the residual stream after k layers
COUNTS: dict[Engine, Count] = {
    "vllm": "streams",
    "sglang": "outputs",
    "speculators": "streams",
    "transformers": "outputs",
}
WRITTEN_FOR = "sstf_export"  # key of a configuration: the engine that an export of ours was written for
IDS = "eagle_aux_hidden_state_layer_ids"


def layer_ids(layers: Sequence[int], engine: Engine) -> list[int]:
    """Our layers as an engine counts them."""
    return [layer + (COUNTS[engine] == "streams") for layer in layers]


def usual_layers(num_layers: int) -> tuple[int, ...]:
    """What every engine reads where a head names no layers."""
    return 1, num_layers // 2 - 1, num_layers - 4


def read_layers(config: dict[str, Any], num_layers: int) -> tuple[tuple[int, ...], str]:
    """The layers that a published head reads, as 0-based outputs in ascending order, and how that is known.

    Engines sort the ids: a head's order is that of the layers.

    Args:
        config: its `config.json`.
        num_layers: of the target.

    Raises:
        HeadError: ids that contradict each other or do not fit the target.
    """
    places = {
        f"{place}{IDS}": found[IDS]
        for place, found in (("", config), ("eagle_config.", config.get("eagle_config") or {}))
        if found.get(IDS)
    }
    if not places:
        return usual_layers(num_layers), "it names none: those that every engine takes then"
    (place, ids), *others = places.items()
    if not isinstance(ids, list) or not all(type(one) is int for one in ids) or len(set(ids)) != len(ids):
        raise HeadError(f"its {place} is {ids}; expected a list of different layer numbers")
    if any(other != ids for _, other in others):
        raise HeadError(f"it names two lists of layers, {ids} and {others[0][1]}; keep the right one in config.json")
    count, why = _count(config, place, sorted(ids), num_layers)
    layers = tuple(sorted(one - (count == "streams") for one in ids))
    if not all(0 <= layer < num_layers for layer in layers):
        raise HeadError(f"it reads the layers {ids} ({why}), of which the target with {num_layers} layers lacks some")
    return layers, why


def _count(config: dict[str, Any], place: str, ids: list[int], num_layers: int) -> tuple[Count, str]:
    if "speculators_model_type" in config:
        return "streams", "counted as speculators does"
    if config.get(WRITTEN_FOR) in COUNTS:
        engine: Engine = config[WRITTEN_FOR]
        return COUNTS[engine], f"counted for {engine}, as it says"
    usual = list(usual_layers(num_layers))
    if ids == usual:
        return "outputs", "the usual ones as SGLang counts"
    if ids == [layer + 1 for layer in usual] or num_layers in ids:
        return "streams", "the usual ones as vLLM counts" if num_layers not in ids else "only vLLM counts so far"
    if 0 in ids:
        return "outputs", "only SGLang counts from 0"
    if place == IDS:
        return "streams", "counted as vLLM does, which alone reads them there"
    return "outputs", "counted as SGLang and SpecForge do, which have them there"
