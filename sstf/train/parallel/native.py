"""One process, DDP and FSDP2: torch's own.

DDP keeps a whole head and optimiser in every process. FSDP2 (arXiv 2304.11277) keeps a share, and gathers the whole
head for a step's passes. A head is one decoder layer and an output layer, so it is gathered as one: the objective may
read any weight anywhere, and gathering by layer would save nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from sstf.train.module import HeadWithLoss
from sstf.train.optim import load_state_by_name, state_by_name
from sstf.train.parallel.base import (
    HeadCopy,
    LossFirst,
    MakeOptimizers,
    check_head,
    check_optimizers,
    on_cpu,
    set_lr,
    trained_parameters,
)
from sstf.train.parallel.launch import Launch
from sstf.types import FeatureBatch, StepOutput


class Native:
    """A `Parallel` of one process; parameters, gradients and optimiser state are whole."""

    averaged_over = 1  # processes whose mean the gradients are when they arrive at `step`
    keeps_gradients = False  # their memory, from step to step

    def __init__(self, launch: Launch, module: HeadWithLoss, make_optimizers: MakeOptimizers) -> None:
        self.launch, self.head = launch, module.head
        self.shapes = {name: tensor.shape for name, tensor in self.head.state_dict().items()}
        self.bare = LossFirst(module)
        self.wrapped = self._wrap()
        self.named = trained_parameters(module)
        self.optimizers = make_optimizers(self.named)
        check_optimizers(self.optimizers, self.named)

    def _wrap(self) -> nn.Module:
        return self.bare

    def backward(self, batch: FeatureBatch, last: bool) -> StepOutput:
        """See `Parallel.backward`."""
        loss, output = self.wrapped(batch)
        loss.backward()
        out: StepOutput = output
        return out

    @torch.no_grad()
    def evaluate(self, batch: FeatureBatch) -> StepOutput:
        """See `Parallel.evaluate`."""
        output: StepOutput = self.bare(batch)[1]
        return output

    @torch.no_grad()
    def step(self, scale: float, clip: float) -> float:
        """See `Parallel.step`."""
        scale *= self.averaged_over
        grads = [p.grad for _, p in self.named if p.grad is not None]
        norm = float(whole(torch.nn.utils.get_total_norm(grads))) * scale
        if math.isfinite(norm):
            torch._foreach_mul_(grads, scale * min(1.0, clip / (norm + 1e-6)))
            for optimizer in self.optimizers:
                optimizer.step()
        self.forget()
        return norm

    def forget(self) -> None:
        """See `Parallel.forget`."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=not self.keeps_gradients)

    def set_lr(self, factor: float) -> None:
        """See `Parallel.set_lr`."""
        set_lr(self.optimizers, factor)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `Parallel.state`."""
        head, optimizer = gathered(self.head.state_dict()), gathered(state_by_name(self.optimizers, self.named))
        return (head, optimizer) if self.launch.is_main else ({}, {})

    def load(self, head: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """See `Parallel.load`."""
        check_head(head, self.shapes)
        self.head.load_state_dict(self._shares(head))
        load_state_by_name(self.optimizers, self.named, self._shares(optimizer))

    def _shares(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return tensors

    @contextmanager
    def whole_head(self) -> Iterator[nn.Module | None]:
        """See `Parallel.whole_head`."""
        yield self.head if self.launch.is_main else None


class Ddp(Native):
    """A `Parallel` that copies the head: gradients are averaged over the processes, and nothing else moves."""

    keeps_gradients = True  # they are pieces of the buffers that DDP sends; new ones would come on top

    def __init__(self, launch: Launch, module: HeadWithLoss, make_optimizers: MakeOptimizers) -> None:
        self.averaged_over = launch.processes
        super().__init__(launch, module, make_optimizers)

    def _wrap(self) -> nn.Module:
        # Buffers are the same everywhere and never change; DDP would send the target's embeddings around.
        buffers = [name for name, _ in self.bare.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.bare, buffers)
        device = self.launch.device
        return DistributedDataParallel(
            self.bare, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )

    def backward(self, batch: FeatureBatch, last: bool) -> StepOutput:
        """See `Parallel.backward`."""
        assert isinstance(self.wrapped, DistributedDataParallel)
        with nullcontext() if last else self.wrapped.no_sync():
            return super().backward(batch, last)


class Fsdp2(Native):
    """A `Parallel` that splits every parameter, gradient and optimiser state along its rows."""

    def _wrap(self) -> nn.Module:
        self.copy = HeadCopy(self.head)
        mesh = init_device_mesh(self.launch.device.type, (self.launch.processes,))
        # Backward follows forward at once; in between, the whole head may stay.
        module: Any = fully_shard(self.bare, mesh=mesh, reshard_after_forward=False)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has sums alone
        assert all(isinstance(parameter, DTensor) for parameter in self.head.parameters()), "FSDP2 has split nothing"
        out: nn.Module = module
        return out

    def backward(self, batch: FeatureBatch, last: bool) -> StepOutput:
        """See `Parallel.backward`."""
        assert isinstance(self.wrapped, FSDPModule)
        self.wrapped.set_requires_gradient_sync(last)
        return super().backward(batch, last)

    def evaluate(self, batch: FeatureBatch) -> StepOutput:
        """See `Parallel.evaluate`."""
        assert isinstance(self.wrapped, FSDPModule)
        output = super().evaluate(batch)
        self.wrapped.reshard()
        return output

    def _shares(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        parameters = dict(self.named)
        out = dict(tensors)
        for key, tensor in tensors.items():
            # A parameter's name, or `<state>.<parameter name>`.
            parameter = parameters.get(key, parameters.get(key.partition(".")[2]))
            if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
                # Every process has read the whole tensor: nothing needs to be sent.
                whole_tensor = tensor.to(self.launch.device)
                out[key] = distribute_tensor(
                    whole_tensor, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
        return out

    @contextmanager
    def whole_head(self) -> Iterator[nn.Module | None]:
        """See `Parallel.whole_head`."""
        tensors = gathered(self.head.state_dict())
        if not self.launch.is_main:
            yield None
            return
        with self.copy.filled(tensors) as head:
            yield head


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies on the CPU. Collective."""
    return {name: on_cpu(whole(tensor)) for name, tensor in tensors.items()}


def whole(tensor: Tensor) -> Tensor:
    """A split tensor put together, collectively; any other as it is."""
    if isinstance(tensor, DTensor):
        full: Tensor = tensor.full_tensor()
        return full
    return tensor
