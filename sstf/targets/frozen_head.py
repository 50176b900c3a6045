"""The frozen parts of a target that a draft head is built from and taught by.

Hidden states are stored AFTER the target's final norm (they are the input of `lm_head`), so the teacher needs no
norm of its own and none can be forgotten. The embeddings, `lm_head`, the final norm and the last decoder layer (for
initialising a head) travel with the feature store, so that training never loads the target.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from sstf.data.atomic import write_bytes_atomic
from sstf.errors import DamagedDataError, TargetError
from sstf.targets.placement import in_memory


@dataclass(frozen=True)
class FrozenHead:
    """Tensors of the frozen target. `last_layer` holds the last decoder layer's parameters by their own names."""

    embeddings: Tensor  # [vocab, hidden]
    lm_head: Tensor  # [vocab, hidden]
    final_norm: Tensor  # [hidden]
    last_layer: dict[str, Tensor]
    softcap: float = 0.0  # logits = softcap * tanh(logits / softcap) where not 0 (Gemma 2)
    scale: float = 1.0  # logits are multiplied by it (Granite, Cohere)
    rms_norm: bool = True  # the final norm is x / rms(x) * final_norm, so that a head can apply it (not in Gemma)

    def logits(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Target logits of normed hidden states, over the whole vocabulary or over `tokens` only.

        Args:
            hidden: [..., hidden], after the final norm.
            tokens: [draft_vocab] int64 target ids, or None for all.

        Returns:
            [..., vocab] or [..., draft_vocab], float32.
        """
        weight = self.lm_head if tokens is None else self.lm_head[tokens]
        logits = F.linear(hidden.to(weight.device, weight.dtype), weight).float()
        if self.scale != 1.0:  # a pass over the whole vocabulary
            logits = logits * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def native_logits(self, hidden: Tensor) -> Tensor:
        """The same over the whole vocabulary, in the target's dtype where that loses nothing: half the memory to go
        through when only the best token is wanted."""
        if self.softcap or self.scale != 1.0:
            return self.logits(hidden)
        return F.linear(hidden.to(self.lm_head.device, self.lm_head.dtype), self.lm_head)

    def to(self, device: torch.device) -> FrozenHead:
        """A copy on `device`."""
        return FrozenHead(
            self.embeddings.to(device),
            self.lm_head.to(device),
            self.final_norm.to(device),
            {name: tensor.to(device) for name, tensor in self.last_layer.items()},
            self.softcap,
            self.scale,
            self.rms_norm,
        )

    def save(self, path: Path) -> None:
        """Write as safetensors; tied weights are written once."""
        tensors = {"embeddings": self.embeddings, "final_norm": self.final_norm}
        if self.lm_head.data_ptr() != self.embeddings.data_ptr():
            tensors["lm_head"] = self.lm_head
        tensors |= {f"last_layer.{name}": tensor for name, tensor in self.last_layer.items()}
        # The third number is not written where it says nothing new: what was stored before has two.
        transform = [self.softcap, self.scale] if self.rms_norm else [self.softcap, self.scale, 0.0]
        tensors["logit_transform"] = torch.tensor(transform, dtype=torch.float64)
        # Not safetensors' own `save_file`: it hides a full disk in an error of its own kind.
        write_bytes_atomic(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))

    @staticmethod
    def load(path: Path) -> FrozenHead:
        """Inverse of `save`.

        Raises:
            DamagedDataError: the file is missing, cut off or altered.
        """
        try:
            tensors = load_file(path)
            softcap, scale, *other_norm = tensors.pop("logit_transform").tolist()
            embeddings = tensors.pop("embeddings")
            return FrozenHead(
                embeddings,
                tensors.pop("lm_head", embeddings),
                tensors.pop("final_norm"),
                {name.removeprefix("last_layer."): tensor for name, tensor in tensors.items()},
                softcap,
                scale,
                not other_norm,
            )
        except (OSError, SafetensorError, KeyError) as error:
            raise DamagedDataError(
                f"{path}: the frozen head cannot be read ({error}); delete its folder and run `sstf extract` again"
            ) from error


def final_norm(decoder: nn.Module, name: str) -> nn.Module:
    """The norm between the last decoder layer and `lm_head`.

    Raises:
        TargetError: there is not exactly one.
    """
    norms = [module for key, module in decoder.named_children() if "norm" in key.lower() or key == "ln_f"]
    if len(norms) != 1:
        raise TargetError(f"target {name}: found {len(norms)} final norms in {type(decoder).__name__}, expected one")
    return norms[0]


def is_plain(norm: nn.Module, size: int, eps: float) -> bool:
    """Whether a norm is an RMSNorm times its weight: tried on a copy, so that its weights need not be in memory."""
    copied = copy.deepcopy(norm).to_empty(device="cpu").float()
    # Of a module whose weights lie on the disk, accelerate has put a `forward` that fetches them over the class's own.
    vars(copied).pop("forward", None)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for parameter in copied.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator))
        weight = next(copied.parameters())
        x = torch.randn(2, size, generator=generator)
        found = copied(x)
        return weight.shape == (size,) and torch.allclose(found, F.rms_norm(x, (size,), weight, eps), atol=1e-4)


def read_frozen_head(model: Any, decoder: nn.Module, layers: nn.ModuleList, name: str) -> FrozenHead:
    """Take the frozen parts from a loaded transformers model, and check that they reproduce its logits.

    Raises:
        TargetError: the model computes its logits in a way that the frozen head does not reproduce.
    """
    output = model.get_output_embeddings()
    if not isinstance(output, nn.Linear) or output.bias is not None:
        raise TargetError(f"target {name}: its output layer is {output}, expected a Linear without a bias")
    norm = final_norm(decoder, name)
    names = {module: module_name for module_name, module in model.named_modules()}

    def read(module: nn.Module) -> dict[str, Tensor]:
        return {key: in_memory(model, f"{names[module]}.{key}", value) for key, value in module.named_parameters()}

    embeddings, lm_head = read(model.get_input_embeddings())["weight"], read(output)["weight"]
    if output.weight.is_meta and torch.equal(embeddings, lm_head):
        lm_head = embeddings  # tied weights are told by their place, of which those on the disk have none
    config = model.config.get_text_config()
    fields = config.to_dict()
    # Granite divides, Cohere multiplies.
    scale = 1.0 / fields["logits_scaling"] if fields.get("logits_scaling") else fields.get("logit_scale") or 1.0
    frozen = FrozenHead(
        embeddings,
        lm_head,
        next(iter(read(norm).values())),
        read(layers[-1]),
        float(fields.get("final_logit_softcapping") or 0.0),
        float(scale),
        is_plain(norm, config.hidden_size, fields.get("rms_norm_eps") or 1e-6),  # as `TargetSpec` has it
    )
    with torch.inference_mode():
        # A spread model takes its input from any device, and only its offloaded weights are on none.
        device = "cpu" if output.weight.is_meta else output.weight.device
        probe = torch.arange(8, device=device)[None] % config.vocab_size
        expected = model(probe, use_cache=False).logits.float()
        found = frozen.logits(decoder(probe, use_cache=False).last_hidden_state).to(expected.device)
    error = float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not error < 0.02:  # bf16 rounding of a scaled or capped logit stays under 1 %
        raise TargetError(
            f"target {name}: lm_head(last hidden state) differs from the model's own logits by {error:.1%} of their "
            "maximum; this architecture transforms its logits in a way that is not supported yet"
        )
    return frozen
