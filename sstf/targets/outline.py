"""A target without its weights: shapes, sizes and the tokenizer, for planning a run that this machine may not hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sstf.errors import TargetError
from sstf.targets.cache import layer_kinds
from sstf.targets.embedded import locate
from sstf.targets.frozen_head import FrozenHead, final_norm, is_plain
from sstf.targets.huggingface import TargetConfig
from sstf.targets.placement import decoder_layers
from sstf.targets.spec import TargetSpec, spec_of


@dataclass(frozen=True)
class TargetOutline:
    """`frozen` lies on torch's meta device, so its tensors have shapes and no values; `spec.fingerprint` is empty."""

    spec: TargetSpec
    tokenizer: PreTrainedTokenizerBase
    parameters: int
    frozen: FrozenHead
    recurrent: bool  # see `Target.recurrent`


def outline(config: TargetConfig) -> TargetOutline:
    """Read configuration and tokenizer, and lay the modules out without memory.

    Raises:
        TargetError: nothing is found under that name, or its configuration lacks what a draft head is shaped by.
    """
    path = str(Path(locate(config.name)).expanduser())
    dtype: torch.dtype = getattr(torch, config.dtype)
    try:
        read: Any = AutoConfig.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(read, dtype=dtype, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TargetError(
            f"target {config.name}: its configuration and tokenizer cannot be read ({first_line}); expected an "
            "embedded name, a local model folder or a reachable hub id"
        ) from error
    spec = spec_of(Path(path).name if Path(path).is_dir() else config.name, read, type(model).__name__, dtype, "")
    embeddings, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    rows: torch.Tensor = embeddings.detach()
    layers = decoder_layers(model.get_decoder())
    return TargetOutline(
        spec,
        tokenizer,
        sum(parameter.numel() for parameter in model.parameters()),
        FrozenHead(
            rows,
            rows if output is embeddings else output.detach(),  # tied weights are one tensor
            rows.new_empty(spec.hidden_size),
            {name: parameter.detach() for name, parameter in layers[-1].named_parameters()},
            rms_norm=is_plain(final_norm(model.get_decoder(), config.name), spec.hidden_size, spec.rms_norm_eps),
        ),
        "recurrent" in layer_kinds(read),
    )
