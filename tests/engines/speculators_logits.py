"""Runs in the environment of speculators: FOLDER/export on FOLDER/probe.safetensors, logits of STEPS teacher-forced
steps, and the layers that it would read, to FOLDER/logits.safetensors."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig


def main(folder: Path, steps: int) -> None:
    config = Eagle3SpeculatorConfig.from_pretrained(folder / "export")
    config.transformer_layer_config._attn_implementation = "eager"  # its own choice, flex attention, wants a compiler
    model = Eagle3DraftModel.from_pretrained(folder / "export", config=config)
    model = model.float().eval()
    found: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: found.append(output[0].float()))
    probe = load_file(folder / "probe.safetensors")
    tokens = probe["tokens"][None]
    with torch.no_grad():
        model(
            hidden_states=probe["features"][None], input_ids=tokens, document_ids=torch.zeros_like(tokens),
            ttt_steps=steps,
        )  # fmt: skip
    layers = torch.tensor(model.target_layer_ids)
    save_file({"logits": torch.stack(found), "layers": layers}, folder / "logits.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
