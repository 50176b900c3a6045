"""The protocol of a head that one or several processes train, and what its implementations share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from sstf.errors import DamagedDataError
from sstf.train.module import HeadWithLoss
from sstf.train.parallel.launch import Launch
from sstf.types import FeatureBatch, StepOutput

MakeOptimizers = Callable[[list[tuple[str, nn.Parameter]]], list[torch.optim.Optimizer]]


class Parallel(Protocol):
    """A head being trained. Every process calls the same methods in the same order: nearly all are collective.

    A step is `backward` for each micro-batch of this process, then `step`. Gradients are those of SUMMED losses, and
    are summed over the processes; `step` divides them once, by what all processes counted together. So 1 process with
    4 sequences = 2 processes with 2 each = 2 micro-batches of 2.
    """

    @property
    def launch(self) -> Launch:
        """This process among the others."""

    def backward(self, batch: FeatureBatch, last: bool) -> StepOutput:
        """Forward and backward of one micro-batch's summed loss, which comes back detached.

        Args:
            batch: On this process's device.
            last: Whether it is this process's last one of the step. Gradients cross processes then, where possible.
        """

    def evaluate(self, batch: FeatureBatch) -> StepOutput:
        """The forward pass alone, without gradients."""

    def step(self, scale: float, clip: float) -> float:
        """Move the head, and forget the gradients.

        Args:
            scale: What the gradients, summed over micro-batches and processes, are multiplied by.
            clip: Their greatest norm after that.

        Returns:
            The norm of the scaled gradients before clipping. Where it is not finite, nothing has moved.
        """

    def forget(self) -> None:
        """Drop the gradients of a step that is not to be taken."""

    def set_lr(self, factor: float) -> None:
        """Set every learning rate to `factor` times its group's `peak_lr`."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The head's whole state dict, and the optimisers' state as `<state>.<parameter name>`.

        CPU tensors, the same for every kind and number of processes; both are empty except in the main process.
        """

    def load(self, head: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """The inverse of `state`. Every process gives all tensors, whichever kind and number of processes saved them.

        Raises:
            DamagedDataError: a tensor is missing, unknown or of another shape.
        """

    def whole_head(self) -> AbstractContextManager[nn.Module | None]:
        """Inside, the main process has a head with all its parameters, to save it or decode with it; others None."""


class LossFirst(nn.Module):
    """Gives the loss beside the output: FSDP2 and DeepSpeed look for the tensors to hook in tuples, and do not see
    those in a dataclass."""

    def __init__(self, module: HeadWithLoss) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: FeatureBatch) -> tuple[Tensor, StepOutput]:
        """Summed loss, with its graph, and the whole output, without."""
        output: StepOutput = self.module(batch)
        loss = output.loss
        if torch.is_grad_enabled() and not loss.requires_grad:
            # Nothing to learn from here, but the other processes wait for this one's gradients.
            loss = loss + sum(0.0 * p.sum() for p in self.module.head.parameters() if p.requires_grad)
        return loss, replace(output, loss=loss.detach())


def trained_parameters(module: HeadWithLoss) -> list[tuple[str, nn.Parameter]]:
    """What the optimiser may see: parameters of the head, by their names in it."""
    named = [(name, p) for name, p in module.head.named_parameters() if p.requires_grad]
    foreign = {name for name, p in module.named_parameters() if p.requires_grad} - {f"head.{name}" for name, _ in named}
    assert not foreign, f"the frozen target must be buffers, found trainable {sorted(foreign)}"
    return named


def check_optimizers(optimizers: list[torch.optim.Optimizer], named: list[tuple[str, nn.Parameter]]) -> None:
    """Assert that they hold all of the head's trained parameters once, and nothing else."""
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for _, p in named), "the optimisers must hold the head's parameters, each once"


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """See `Parallel.set_lr`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy that later steps do not change."""
    return tensor.detach().to("cpu", copy=True)


def check_head(found: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Refuse a head state that is not of this head.

    Raises:
        DamagedDataError: names or shapes differ.
    """
    shapes = {name: tensor.shape for name, tensor in found.items()}
    wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DamagedDataError(
            f"the checkpoint's head differs from this one in {', '.join(wrong[:3])}{more}; the method's settings have "
            "changed: train in another folder"
        )


class HeadCopy:
    """A second head, without memory until it is filled. For kinds whose own parameters are in pieces."""

    def __init__(self, head: nn.Module) -> None:
        memo: dict[int, object] = {id(buffer): buffer for buffer in head.buffers()}
        memo |= {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in head.parameters()}
        self.head = copy.deepcopy(head, memo)
        self.device = next(head.parameters()).device

    @contextmanager
    def filled(self, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Inside, the copy holds `tensors`, a whole state dict."""
        empty = {name: p for name, p in self.head.named_parameters()}
        try:
            whole = {name: tensors[name].to(self.device) for name in empty}
            self.head.load_state_dict(whole, strict=False, assign=True)
            yield self.head
        finally:
            self.head.load_state_dict(empty, strict=False, assign=True)
