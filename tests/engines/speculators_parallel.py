"""Runs in the environment of speculators: FOLDER/export, a head that drafts several tokens in one pass, on
FOLDER/probe.safetensors (features of x_t and tokens x_t), to FOLDER/logits.safetensors."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from speculators.losses.eager import kl_div_loss
from speculators.model import SpeculatorModel
from speculators.models.dflash import DFlashSpeculatorConfig
from speculators.models.dspark import DSparkSpeculatorConfig
from speculators.models.peagle import PEagleSpeculatorConfig, core

Tensors = dict[str, torch.Tensor]
CONFIGS = {"dflash": DFlashSpeculatorConfig, "dspark": DSparkSpeculatorConfig, "peagle": PEagleSpeculatorConfig}


def of_blocks(model: SpeculatorModel, features: torch.Tensor, tokens: torch.Tensor) -> Tensors:
    """Of a block at every anchor that it takes: logits [anchor, slot, draft_vocab] before and behind a Markov head that
    is told the text's own tokens, and what the confidence head says."""
    block, count = model.block_size, len(tokens) - model.block_size
    hidden, logits, _, _, indices = model._backbone_forward(
        features[None], tokens[None], torch.ones(1, len(tokens)), torch.zeros(1, len(tokens), model.hidden_size),
        torch.zeros_like(tokens[None]), max_anchors=count,
    )  # fmt: skip
    found = {"logits": logits.view(count, block, -1), "anchors": indices.view(count, block)[:, 0]}
    if model.config.speculators_model_type == "dspark":
        before = tokens[indices].view(count, block)
        states = hidden.view(count, block, -1)
        known = model.markov_head.prev_embeddings(before)
        found["logits"] = found["logits"] + model.markov_head.block_bias(prev_token_ids=before, hidden_states=states)
        found["confidence"] = model.confidence_head(torch.cat([states, known], -1))
    return found


def of_depths(model: SpeculatorModel, features: torch.Tensor, tokens: torch.Tensor, depth: int) -> Tensors:
    """Of the rows and depths that it draws: logits [pair, draft_vocab]. It reads x_{t+1} beside the features of x_t."""
    logits: list[torch.Tensor] = []
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    draw = core.generate_cod_sample_indices

    def recorded(**settings: object) -> tuple[torch.Tensor, torch.Tensor]:
        pairs.append(draw(**settings))
        return pairs[-1]

    core.generate_cod_sample_indices = recorded
    model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output[0].float()))
    rows = len(tokens) - 1
    model(
        hidden_states=features[None, :rows], input_ids=tokens[None, 1:], document_ids=torch.zeros(1, rows).long(),
        verifier_last_hidden_states=torch.zeros(1, rows, model.hidden_size),
        loss_config={"kl_div": (kl_div_loss, 1.0)}, num_depths=depth, down_sample_ratio=0.9,
    )  # fmt: skip
    return {"logits": logits[0], "rows": pairs[0][0], "depths": pairs[0][1]}


def main(folder: Path, kind: str) -> None:
    torch.manual_seed(0)
    config = CONFIGS[kind].from_pretrained(folder / "export")
    config.transformer_layer_config._attn_implementation = "eager"  # its own choice, flex attention, wants a compiler
    model = SpeculatorModel.from_pretrained(folder / "export", config=config, dtype=torch.float32).eval()
    probe = load_file(folder / "probe.safetensors")
    with torch.no_grad():
        if kind == "peagle":
            depth = config.speculators_config.proposal_methods[0].speculative_tokens
            found = of_depths(model, probe["features"], probe["tokens"], depth)
        else:
            found = of_blocks(model, probe["features"], probe["tokens"])
    found["layers"] = torch.tensor(model.target_layer_ids)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "logits.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
