"""A target's decoder in two parts over the same weights and the same cache: its first layers, and the rest.

Both parts are stock: shallow copies of transformers' decoder in which the other part's layers are replaced by modules
that hand their input on. So every layer keeps its place, its mask, its position embeddings and its cache entry. The
first part ends before the final norm; the second begins with what the first returned, as `inputs_embeds`.

Not every architecture can be taken apart like this: some scale their embeddings in the decoder's own forward, or bring
the tokens themselves to later layers. So the parts are proven when they are made.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sstf.errors import TargetError
from sstf.targets.cache import PreallocatedCache
from sstf.targets.huggingface import Target

PROMPT, DRAFTED = 9, 3  # tokens of the proof
TOLERANCE = 2.0**-7  # relative to the largest value; the same products in the same order differ by nothing


class _HandOn(nn.Module):
    """In the place of a layer that the other part runs."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_states


class SplitDecoder:
    """Layers 0 .. `layers` - 1 of a target, and the rest."""

    def __init__(self, target: Target, layers: int) -> None:
        """Raises:
        TargetError: the parts do not say what the whole says, or would read an unsuitable cache.
        """
        if target.offloaded or not target.takes_trees:
            why = (
                "has layers outside of memory"
                if target.offloaded
                else "keeps a recurrent state"
                if target.recurrent
                else "uses flash attention, which takes no tree mask"
            )
            raise TargetError(f"target {target.spec.name} {why}: its first layers cannot draft for the others")
        self.target, self.layers = target, layers
        depth = len(target.layers)
        self._shallow = _part(target, range(layers), normed=False)
        self._deep = _part(target, range(layers, depth), normed=True)
        self._prove()

    def shallow(
        self, ids: Int[Tensor, "batch rows"], positions: Int[Tensor, "batch rows"], mask: Any, cache: PreallocatedCache
    ) -> Float[Tensor, "batch rows hidden"]:
        """Outputs of layer `layers` - 1; its keys and those below it go where `cache` was told to put them.

        Args:
            ids: tokens.
            positions: of them.
            mask: in the form of `Target.masks`.
            cache: of the whole target.
        """
        return self._run(self._shallow, mask, positions, cache, input_ids=ids)

    def deep(
        self, states: Float[Tensor, "batch rows hidden"], positions: Int[Tensor, "batch rows"], mask: Any,
        cache: PreallocatedCache,
    ) -> Float[Tensor, "batch rows hidden"]:  # fmt: skip
        """The last hidden states, after the final norm, from what `shallow` returned."""
        return self._run(self._deep, mask, positions, cache, inputs_embeds=states)

    @staticmethod
    def _run(part: Any, mask: Any, positions: Tensor, cache: PreallocatedCache, **given: Tensor) -> Tensor:
        output = part(attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **given)
        hidden: Tensor = output.last_hidden_state
        return hidden

    @torch.inference_mode()
    def _prove(self) -> None:
        """That a tree behind a text is worth the same in two parts as in one pass: two siblings below the root."""
        target = self.target
        ids = (torch.arange(PROMPT + DRAFTED, device=target.device) * 7 + 3)[None] % target.spec.vocab_size
        positions = torch.arange(PROMPT + DRAFTED, device=target.device)[None]
        positions[0, -1] -= 1
        seen = torch.ones(PROMPT + DRAFTED, PROMPT + DRAFTED, dtype=torch.bool, device=target.device).tril()[None]
        seen[0, -1, -2] = False
        text, tree = slice(0, PROMPT), slice(PROMPT, PROMPT + DRAFTED)
        keys = positions if target.masks.by_position else None
        mask = target.masks(seen[:, tree], positions[:, tree], keys)
        found = []
        try:
            for whole in (True, False):
                cache = target.new_cache(PROMPT + DRAFTED)
                cache.write_behind(0)
                target.decoder(ids[:, text], position_ids=positions[:, text], past_key_values=cache, use_cache=True)
                cache.write_behind(PROMPT)
                if whole:
                    found.append(self._run(target.decoder, mask, positions[:, tree], cache, input_ids=ids[:, tree]))
                else:
                    states = self.shallow(ids[:, tree], positions[:, tree], mask, cache)
                    found.append(self.deep(states, positions[:, tree], mask, cache))
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise self._refused(str(error).strip().splitlines()[0]) from error
        expected, parts = found
        difference = float((parts - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
        if not difference <= TOLERANCE:
            raise self._refused(f"their result differs by {difference:.1%} from that of the whole")

    def _refused(self, why: str) -> TargetError:
        return TargetError(
            f"target {self.target.spec.name}: the layers of {type(self.target.decoder).__name__} cannot be run in two "
            f"parts ({why}), so its first layers cannot draft for the others; use a method that does not share layers"
        )


def _part(target: Target, kept: range, normed: bool) -> nn.Module:
    """A view of the decoder that runs the layers `kept` alone."""
    part = copy.copy(target.decoder)
    layers = nn.ModuleList(layer if i in kept else _HandOn() for i, layer in enumerate(target.layers))
    replaced: dict[nn.Module, nn.Module] = {target.layers: layers}
    if not normed:
        replaced[target.final_norm] = nn.Identity()
    part._modules = {
        name: child if child is None else replaced.get(child, child) for name, child in part._modules.items()
    }
    return part
