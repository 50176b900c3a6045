"""DeepSpeed's ZeRO (arXiv 1910.02054): stage 1 splits the optimiser state, 2 the gradients too, 3 the parameters too.

DeepSpeed holds float32 parameters and torch's own AdamW; what runs in bfloat16 is `HeadWithLoss`'s decision. Averaging
is undone and the norm clipped where DeepSpeed divides by a loss scale, which float32 does not need: exact, and the
scale need not be known before the last backward pass.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sstf.errors import ConfigError
from sstf.train.module import HeadWithLoss
from sstf.train.optim import STATES, check_state
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

MOMENTS = tuple(state for state in STATES[torch.optim.AdamW] if state != "step")


class Zero:
    """A `Parallel` over a DeepSpeed engine."""

    def __init__(self, launch: Launch, module: HeadWithLoss, make_optimizers: MakeOptimizers) -> None:
        deepspeed = _import(launch.device)
        self.launch, self.head, self.stage = launch, module.head, int(launch.kind[-1])
        self.bare = LossFirst(module)
        self.named = trained_parameters(module)
        # Stage 3 leaves parameters without a shape.
        self.shapes = {name: tensor.shape for name, tensor in self.head.state_dict().items()}
        self.copy = HeadCopy(self.head) if self.stage == 3 else None
        self.optimizers = make_optimizers(self.named)
        check_optimizers(self.optimizers, self.named)
        if [type(optimizer) for optimizer in self.optimizers] != [torch.optim.AdamW]:
            raise ConfigError(
                f"{launch.kind} gives the optimiser pieces of matrices; set train.optimizer.kind to adamw"
            )
        if self.stage == 3:
            for parameter in self.head.parameters():
                # The objective may read any weight anywhere: the whole head is gathered for each pass.
                deepspeed.zero.register_external_parameter(self.bare, parameter)
        self.api = deepspeed.utils
        self.engine = deepspeed.initialize(model=self.bare, optimizer=self.optimizers[0], config=_config(launch))[0]
        self.zero: Any = self.engine.optimizer
        assert self.engine.zero_optimization_stage() == self.stage, "DeepSpeed has started another stage"
        self._start_states(0.0)

    def backward(self, batch: FeatureBatch, last: bool) -> StepOutput:
        """See `Parallel.backward`. From stage 2 on, gradients cross processes with every micro-batch."""
        self.engine.set_gradient_accumulation_boundary(last)
        loss, output = self.engine(batch)
        self.engine.backward(loss)
        out: StepOutput = output
        return out

    @torch.no_grad()
    def evaluate(self, batch: FeatureBatch) -> StepOutput:
        """See `Parallel.evaluate`."""
        output: StepOutput = (self.engine if self.stage == 3 else self.bare)(batch)[1]
        return output

    def step(self, scale: float, clip: float) -> float:
        """See `Parallel.step`. DeepSpeed skips a step whose norm is not finite."""
        self.zero.clip_grad = clip
        self.zero.loss_scale = 1.0 / (scale * self.launch.processes)  # DeepSpeed averaged, and divides by it
        self.engine.step()
        self.zero.loss_scale = 1.0
        return float(self.engine.get_global_grad_norm())

    def forget(self) -> None:
        """See `Parallel.forget`. DeepSpeed drops gradients only in a step, and moves nothing if they are not finite."""
        for group in self.zero.averaged_gradients.values():
            for gradient in group:
                gradient.fill_(torch.inf)
        self.step(1.0, 1.0)

    def set_lr(self, factor: float) -> None:
        """See `Parallel.set_lr`."""
        set_lr(self.optimizers, factor)

    # ---- whole tensors and back --------------------------------------------------------------------------------------

    def _whole_head_state(self) -> dict[str, Tensor]:
        tensors = {name: on_cpu(tensor) for name, tensor in self.head.state_dict().items()}
        if self.stage == 3:
            tensors |= {name: on_cpu(self.api.safe_get_full_fp32_param(p)) for name, p in self.named}
        return tensors

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `Parallel.state`."""
        head = self._whole_head_state()
        step = on_cpu(next(iter(self.optimizers[0].state.values()))["step"])
        optimizer = {f"step.{name}": step.clone() for name, _ in self.named}
        for name, parameter in self.named:
            for moment in MOMENTS:
                optimizer[f"{moment}.{name}"] = on_cpu(self.api.safe_get_full_optimizer_state(parameter, moment))
        return (head, optimizer) if self.launch.is_main else ({}, {})

    def load(self, head: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """See `Parallel.load`."""
        check_head(head, self.shapes)
        moments = {f"{moment}.{name}": self.shapes[name] for name, _ in self.named for moment in MOMENTS}
        check_state(optimizer, moments | {f"step.{name}": torch.Size() for name, _ in self.named})
        self._load_head(head)
        self._start_states(max(float(optimizer[f"step.{name}"]) for name, _ in self.named))
        for name, parameter in self.named:
            for moment in MOMENTS:
                value = optimizer[f"{moment}.{name}"].to(self.launch.device)
                if self.stage == 3:
                    self.api.safe_set_local_optimizer_state(parameter, self._share(parameter, value), moment)
                else:
                    self.api.safe_set_full_optimizer_state(parameter, value, moment)

    @torch.no_grad()
    def _load_head(self, tensors: Mapping[str, Tensor]) -> None:
        if self.stage < 3:
            self.head.load_state_dict(tensors)
            self.zero.refresh_fp32_params()
            return
        names = {name for name, _ in self.named}
        self.head.load_state_dict({name: t for name, t in tensors.items() if name not in names}, strict=False)
        for name, parameter in self.named:
            share = self._share(parameter, tensors[name].to(self.launch.device))
            self.api.safe_set_local_fp32_param(parameter, share)
            parameter.ds_tensor.copy_(share)  # type: ignore[attr-defined]  # what forward passes gather

    def _start_states(self, step: float) -> None:
        """Zero moments after `step` steps. AdamW would make them in its first step, of which DeepSpeed sees the first
        parameter group's alone."""
        flat = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        for share in flat:
            state: dict[str, Tensor] = {moment: torch.zeros_like(share) for moment in MOMENTS}
            self.optimizers[0].state[share] = state | {"step": torch.tensor(step, device=share.device)}
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _share(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This process's piece of a whole tensor, as stage 3 cuts them: flat, the last one filled up with zeros."""
        size: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        flat = F.pad(value.flatten(), (0, size * self.launch.processes - value.numel()))
        return flat.narrow(0, self.launch.rank * size, size)

    @contextmanager
    def whole_head(self) -> Iterator[nn.Module | None]:
        """See `Parallel.whole_head`."""
        if self.copy is None:
            yield self.head if self.launch.is_main else None
            return
        tensors = self._whole_head_state()
        if not self.launch.is_main:
            yield None
            return
        with self.copy.filled(tensors) as head:
            yield head


def check_adamw(kind: str, optimizers: list[torch.optim.Optimizer]) -> None:
    """Refuse anything but one AdamW.

    Raises:
        ConfigError: it is something else.
    """
    if [type(optimizer) for optimizer in optimizers] != [torch.optim.AdamW]:
        raise ConfigError(f"{kind} gives the optimiser pieces of matrices; use train.optimizer.kind adamw")


def _config(launch: Launch) -> dict[str, Any]:
    """DeepSpeed's configuration: the file's `zero_optimization`, and what the trainer relies on."""
    relied_on: dict[str, Any] = {"stage3_param_persistence_threshold": 0} if launch.kind == "zero3" else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # `set_gradient_accumulation_boundary` says when
        "zero_optimization": launch.zero | relied_on,
    }


def _import(device: torch.device) -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError("DeepSpeed is not installed; pip install 'sstf[deepspeed]'") from error
    deepspeed.utils.logger.setLevel(logging.ERROR)  # a step that is skipped is the trainer's to tell
    # Its calls of torch's collectives by their old names, one line a call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        # It would be compiled at the first start, to do between processes of one machine what gloo does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
