"""A frozen target: any causal language model that transformers loads, used through hooks on its stock modules."""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sstf.config_loading import Section
from sstf.errors import TargetError
from sstf.targets.attention import use_grouped_sdpa
from sstf.targets.cache import PreallocatedCache, layer_kinds
from sstf.targets.embedded import EMBEDDED, locate
from sstf.targets.frozen_head import FrozenHead, final_norm, read_frozen_head
from sstf.targets.masks import MaskMaker
from sstf.targets.placement import DeviceMap, decoder_layers, layers_on_disk, main_device, splits_tied_weights
from sstf.targets.spec import TargetSpec, describe

Dtype = Literal["bfloat16", "float16", "float32"]


class TargetConfig(Section):
    """Which model is frozen. `name` is an embedded name, a local folder or a hub id. `dtype` is what it runs in; where
    it is served it should be the same. `device` `auto` is the GPU where there is one.

    `device_map` spreads a model that is too big for one device (see `placement`), in place of `device`.
    """

    name: str = Field(min_length=1)
    revision: str | None = None
    dtype: Dtype = "bfloat16"
    device: str = "auto"
    device_map: DeviceMap | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_place(self) -> TargetConfig:
        if isinstance(self.device_map, dict | str) and self.device_map != "disk" and self.device != "auto":
            raise ValueError(
                f"target.device is {self.device!r} and target.device_map is {self.device_map!r}; a map decides the "
                "devices: leave target.device at auto"
            )
        return self


@dataclass(frozen=True)
class TargetOutput:
    """One forward pass: `features` is the concatenation of the tapped layers' outputs, in the order asked for."""

    logits: Tensor  # [batch, seq, vocab]
    features: Tensor  # [batch, seq, taps]


class LayerTaps:
    """Captures the outputs of decoder layers (0-based) while it is open as a context manager.

    Threads that share a target have a pair of taps each, and each sees its own passes only.
    """

    def __init__(self, layers: nn.ModuleList, ids: Sequence[int]) -> None:
        self._layers, self._ids = layers, tuple(ids)
        self._captured: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> LayerTaps:
        self._thread = threading.get_ident()  # that opens them, which need not be the one that made them
        for layer_id in self._ids:

            def capture(module: nn.Module, args: Any, output: Any, layer_id: int = layer_id) -> None:
                if threading.get_ident() != self._thread:
                    return
                # Some architectures return (hidden, ...), some the hidden states alone.
                self._captured[layer_id] = output[0] if isinstance(output, tuple) else output

            self._handles.append(self._layers[layer_id].register_forward_hook(capture))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._captured.clear()

    def features(self) -> Tensor:
        """[batch, seq, taps]: what the last forward pass left, concatenated in the order of the ids."""
        caught = [self._captured[layer_id] for layer_id in self._ids]
        # The layers of a spread target leave their outputs where they are.
        return torch.cat([states.to(caught[0].device) for states in caught], dim=-1)


class Target:
    """A frozen causal language model with its tokenizer, its spec and access to its layers."""

    def __init__(self, name: str, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model.eval().requires_grad_(False)
        use_grouped_sdpa(self.model)
        self.tokenizer = tokenizer
        self.spec: TargetSpec = describe(name, model.config, model)
        self.decoder: nn.Module = model.get_decoder()
        self.layers = self._find_layers()
        places = vars(model).get("hf_device_map", {})  # left by transformers on a model that it spread
        self.device: torch.device = main_device(places) if places else next(model.parameters()).device
        # Whether weights are brought into memory and out again during a pass.
        self.offloaded = not {"disk", "cpu"}.isdisjoint(map(str, places.values())) and set(places.values()) != {"cpu"}
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.masks = MaskMaker(self.model.config, self.dtype)
        self.layer_kinds = layer_kinds(self.model.config)
        self._frozen: FrozenHead | None = None

    def _find_layers(self) -> nn.ModuleList:
        layers = decoder_layers(self.decoder)
        if len(layers) == self.spec.num_layers:
            return layers
        raise TargetError(
            f"target {self.spec.name}: no list of {self.spec.num_layers} decoder layers in "
            f"{type(self.decoder).__name__}; this architecture cannot be tapped yet"
        )

    @property
    def frozen_head(self) -> FrozenHead:
        """Embeddings, lm_head, final norm and last layer, read (and checked) on first use."""
        if self._frozen is None:
            self._frozen = read_frozen_head(self.model, self.decoder, self.layers, self.spec.name)
        return self._frozen

    @property
    def final_norm(self) -> nn.Module:
        """What turns the last layer's output into the input of `lm_head`."""
        return final_norm(self.decoder, self.spec.name)

    @property
    def takes_threads(self) -> bool:
        """Whether several threads may run it at once: not where a pass changes the model for the next, as offloading
        does, and rotary embeddings that adapt to the length of the text."""
        rope = self.model.config.get_text_config().to_dict().get("rope_parameters") or {}
        kinds = {str(rope.get("rope_type"))} | {
            str(one.get("rope_type")) for one in rope.values() if isinstance(one, dict)
        }
        return not self.offloaded and not any("dynamic" in kind or kind == "longrope" for kind in kinds)

    @property
    def end_tokens(self) -> frozenset[int]:
        """Token ids after which the target stops."""
        found = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if self.tokenizer.eos_token_id is not None:
            ids = [*ids, self.tokenizer.eos_token_id]
        return frozenset(ids)

    def tap(self, ids: Sequence[int]) -> LayerTaps:
        """Taps on the outputs of the 0-based decoder layers `ids`.

        Raises:
            TargetError: an id is out of range, or named twice.
        """
        bad = [i for i in ids if not 0 <= i < self.spec.num_layers]
        if bad or len(set(ids)) != len(ids):
            raise TargetError(
                f"target {self.spec.name} has layers 0 to {self.spec.num_layers - 1}; cannot read layers {list(ids)}"
                + (f" ({bad} do not exist)" if bad else " (one is named twice)")
            )
        return LayerTaps(self.layers, ids)

    @property
    def context(self) -> int:
        """Tokens that a sequence decoded here may have."""
        return self.spec.max_position_embeddings

    @property
    def recurrent(self) -> bool:
        """Whether some layers keep a recurrent state: it holds one history, so a tree cannot be verified in one pass,
        and takes back no token, so a rejected draft costs another pass."""
        return "recurrent" in self.layer_kinds

    @property
    def takes_trees(self) -> bool:
        """Whether one pass can show each token its ancestors only."""
        return not self.recurrent and "flash" not in self.model.config._attn_implementation

    def new_cache(self, capacity: int, batch: int = 1) -> PreallocatedCache:
        """An empty key/value cache with room for `capacity` tokens a row.

        Raises:
            TargetError: some layers keep a kind of state that cannot be cached here.
        """
        unknown = sorted(set(self.layer_kinds) - {"attention", "recurrent"})
        if unknown:
            raise TargetError(
                f"target {self.spec.name}: layers with a cache of kind {unknown[0]} cannot be decoded here yet; "
                "expected full, sliding or chunked attention, or a recurrent state"
            )
        return PreallocatedCache(self.layer_kinds, batch, capacity)


def load_target(
    name_or_path: str,
    dtype: Dtype | torch.dtype = "bfloat16",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: DeviceMap | None = None,
) -> Target:
    """Load a frozen target.

    Args:
        name_or_path: an embedded name (`smollm2-135m-instruct`), a local folder, or a hub id.
        dtype: of the weights and the computation.
        device: `auto` takes the first GPU where there is one.
        revision: of a hub repository; a commit hash makes a run repeatable.
        trust_remote_code: run modeling code that ships with the weights. Off: it is somebody else's code.
        device_map: spreads a model over several devices and the disk, see `placement`. Of `device`, only the map
            `disk` makes use.

    Raises:
        TargetError: nothing loadable under that name, weights that are missing or cut off, an architecture that cannot
            be tapped, or a device that is not there.
    """
    where = _device(device)
    torch_dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    path = locate(name_or_path)
    if path.startswith((".", "/", "~")) or name_or_path in EMBEDDED:
        folder = Path(path).expanduser()
        if not (folder / "config.json").is_file():
            raise TargetError(
                f"target {name_or_path}: no config.json in {folder}; expected a transformers model folder"
            )
        path = str(folder)
    offload: dict[str, Any] = {}
    try:
        if device_map is not None:
            # It would warn that weights are where they were asked to be.
            logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
            places = (
                layers_on_disk(path, where, revision, trust_remote_code)
                if device_map == "disk"
                else _places(device_map)
            )
            # Weights that transformers keeps in another form than the checkpoint's are written there.
            offload = {"device_map": places, "offload_folder": tempfile.mkdtemp(prefix="sstf-offload-")}
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            dtype=torch_dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **offload,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TargetError(
            f"target {name_or_path}: cannot be loaded ({first_line}); expected an embedded name "
            f"({', '.join(EMBEDDED)}), a local model folder with safetensors, or a reachable hub id"
        ) from error
    model, loading = loaded
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers fills them with noise
        raise TargetError(
            f"target {name_or_path}: its weights lack {', '.join(missing[:3])}{' and others' * (len(missing) > 3)}; "
            "copy or download it again"
        )
    if offload and splits_tied_weights(model):
        raise TargetError(
            f"target {name_or_path}: its embeddings and its output layer are one tensor, of which target.device_map "
            "puts only one on the disk; give both the same place"
        )
    name = name_or_path if name_or_path in EMBEDDED else Path(path).name if Path(path).is_dir() else name_or_path
    module: nn.Module = model
    target = Target(name, module if offload else module.to(where), tokenizer)
    if offload:
        weakref.finalize(target, shutil.rmtree, offload["offload_folder"], ignore_errors=True)
    return target


def load_configured(config: TargetConfig) -> Target:
    """The target of a run configuration; see `load_target`."""
    return load_target(
        config.name, config.dtype, config.device, config.revision, config.trust_remote_code, config.device_map
    )


def _places(device_map: str | dict[str, str]) -> str | dict[str, str]:
    for place in device_map.values() if isinstance(device_map, dict) else ():
        if place != "disk":
            _device(place, "target.device_map")
    return device_map


def _device(name: str, setting: str = "target.device") -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise TargetError(
            f"{setting} is {name!r}, which this machine or this build of torch does not have; expected auto, cpu, "
            "or cuda:N of a GPU that is there"
        ) from error
