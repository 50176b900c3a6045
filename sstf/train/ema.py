"""An exponential moving average of the head's weights, to validate and to save in place of the last ones.

The average is over steps: average <- d * average + (1 - d) * weights. It starts at the first weights, which are far
from where training goes, so d itself warms up: min(decay, (1 + step) / (10 + step)), as in TensorFlow's
ExponentialMovingAverage. Buffers (the draft vocabulary) are not averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sstf.errors import DamagedDataError


class Ema:
    """Averages of named float32 parameters, which are held by reference and must stay the same objects."""

    def __init__(self, decay: float, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Args:
        decay: Share of the average that stays at each step, such as 0.999: it looks back about 1 / (1 - decay) steps.
        named_parameters: What is trained, whole on every process.
        """
        self.decay = decay
        self.parameters = dict(named_parameters)
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def update(self, step: int) -> None:
        """Take in the weights that 0-based optimiser step `step` left."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights: list[Tensor] = list(self.parameters.values())
        get_ema_multi_avg_fn(decay)(list(self.averages.values()), weights, 0)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the head has the averaged weights; behind, to the bit the trained ones, also after an exception."""
        trained = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        try:
            self._put(self.averages)
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter name: the tensors themselves, not copies."""
        return dict(self.averages)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore copies of what `state` gave.

        Raises:
            DamagedDataError: an average is missing, unknown or of another shape.
        """
        found = {name: tensor.shape for name, tensor in tensors.items()}
        expected = {name: tensor.shape for name, tensor in self.averages.items()}
        if found != expected:
            wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise DamagedDataError(
                f"the checkpoint's averaged weights do not fit this head in {', '.join(wrong[:3])}{more}; go on from "
                "an earlier checkpoint, or train in another folder"
            )
        for name, average in self.averages.items():
            average.copy_(tensors[name])
