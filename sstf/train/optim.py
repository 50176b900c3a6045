"""Optimisers of the head: AdamW, or Muon for the matrices of the head's body with AdamW for the rest.

AdamW: arXiv 1711.05101. Muon (https://kellerjordan.github.io/posts/muon/, scaled up in arXiv 2502.16982) replaces the
update of a matrix by the nearest orthogonal one, found by Newton-Schulz steps in bfloat16. Its update is scaled to the
root mean square that AdamW's has (arXiv 2502.16982, section 2.2), so both share one learning rate and weight decay.

State goes in and out by parameter name, so that a checkpoint does not depend on the order of parameters, or on how
many processes shared them. The learning rate over time is `schedule`'s, the moves themselves are torch's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sstf.config_loading import Section
from sstf.errors import ConfigError, DamagedDataError

NamedParameters = Iterable[tuple[str, nn.Parameter]]
Beta = Annotated[float, Field(ge=0, lt=1)]

# Matrices that Muon leaves to AdamW. Their rows are one token each, and most tokens are rare: an orthogonal update
# moves every row alike, AdamW moves a row by the history of its own gradients. Both Muon papers exclude them.
TOKEN_MATRICES = frozenset({"lm_head", "embeddings", "embed_tokens"})

# What each optimiser remembers of a parameter.
STATES: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}


class _Common(Section):
    """`learning_rate` is the peak, which the schedule multiplies. `weight_decay` shrinks matrices, never norms."""

    learning_rate: float = Field(default=1e-4, gt=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0, lt=1)


class AdamWConfig(_Common):
    """AdamW for everything. The defaults are EAGLE's."""

    kind: Literal["adamw"] = "adamw"


class MuonConfig(_Common):
    """Muon with Nesterov momentum for the body's matrices; `betas` and `eps` are of the AdamW that moves the rest."""

    kind: Literal["muon"] = "muon"
    momentum: Beta = 0.95
    ns_steps: int = Field(default=5, ge=1, le=20)


OptimizerConfig = AdamWConfig | MuonConfig


def takes_muon(name: str, parameter: Tensor) -> bool:
    """Whether Muon moves this parameter: a matrix, and none of the output head or of embeddings.

    >>> takes_muon("midlayer.mlp.up_proj.weight", torch.zeros(4, 2)), takes_muon("norm.weight", torch.zeros(2))
    (True, False)
    >>> takes_muon("lm_head.weight", torch.zeros(4, 2))
    False
    """
    return parameter.ndim == 2 and TOKEN_MATRICES.isdisjoint(name.split("."))


def build_optimizers(config: OptimizerConfig, named_parameters: NamedParameters) -> list[torch.optim.Optimizer]:
    """One AdamW, or a Muon and an AdamW. Each parameter group carries `peak_lr`, which the schedule multiplies.

    Args:
        config: Kind and settings.
        named_parameters: What is trained, float32. (Autocast may compute in bfloat16; the masters may not be.)

    Raises:
        ConfigError: a parameter is not float32, or there is none.
    """
    named = list(named_parameters)
    _check_masters(named)
    optimizers: list[torch.optim.Optimizer] = []
    rest = [p for _, p in named]
    if isinstance(config, MuonConfig) and any(takes_muon(name, p) for name, p in named):
        rest = [p for name, p in named if not takes_muon(name, p)]
        optimizers.append(
            torch.optim.Muon(
                [p for name, p in named if takes_muon(name, p)],
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                ns_steps=config.ns_steps,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    if groups := [group for group in groups if group["params"]]:
        optimizers.append(
            torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = config.learning_rate
    return optimizers


def _check_masters(named: Sequence[tuple[str, nn.Parameter]]) -> None:
    if not named:
        raise ConfigError("the head has no parameters to train; expected at least one")
    for name, parameter in named:
        if parameter.dtype != torch.float32:
            raise ConfigError(
                f"{name} is {parameter.dtype}, but the optimiser needs float32, in which small updates are not "
                "rounded away; convert the head with .float() and leave bfloat16 to train.precision"
            )


def check_optimizer_fits(config: OptimizerConfig, parallel: str) -> None:
    """Refuse an optimiser that cannot work under `parallel` (single, ddp, fsdp2, zero1, zero2 or zero3).

    Raises:
        ConfigError: Muon under FSDP2 or ZeRO, which give an optimiser pieces of matrices where it needs whole ones.
    """
    if config.kind == "muon" and parallel not in ("single", "ddp"):
        raise ConfigError(
            f"train.optimizer.kind is muon, which orthogonalises whole matrices, but {parallel} gives each process a "
            "piece of them; use adamw, or launch with DDP"
        )


# ---- state by name ---------------------------------------------------------------------------------------------------


def _entries(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> Iterator[tuple[int, Tensor, str, str]]:
    """Index and parameter, in the order in which the optimiser holds it; state, and the key of that state."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        for state in STATES[type(optimizer)]:
            yield index, parameter, state, f"{state}.{names[parameter]}"


def _names(named_parameters: NamedParameters) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in named_parameters}


def state_by_name(optimizers: Sequence[torch.optim.Optimizer], named_parameters: NamedParameters) -> dict[str, Tensor]:
    """State of every parameter as `<state>.<parameter name>`: the optimisers' own tensors, not copies.

    Of a parameter that has not moved yet it is zeros, which is what the optimiser would start from. So a state is
    always whole, and one that lacks something was damaged.
    """
    names, out = _names(named_parameters), {}
    for optimizer in optimizers:
        for _, parameter, state, key in _entries(optimizer, names):
            held = optimizer.state.get(parameter)
            fresh = torch.zeros(()) if state == "step" else torch.zeros_like(parameter, requires_grad=False)
            out[key] = held[state] if held else fresh
    return out


def load_state_by_name(
    optimizers: Sequence[torch.optim.Optimizer], named_parameters: NamedParameters, tensors: Mapping[str, Tensor]
) -> None:
    """Restore copies of `tensors`, as `state_by_name` gave them. Learning rates stay those of the configuration.

    Raises:
        DamagedDataError: a state is missing, unknown, of another shape, or of another kind of optimiser.
    """
    names = _names(named_parameters)
    shapes = {
        key: torch.Size() if state == "step" else parameter.shape
        for optimizer in optimizers
        for _, parameter, state, key in _entries(optimizer, names)
    }
    check_state(tensors, shapes)
    for optimizer in optimizers:
        states: dict[int, dict[str, Tensor]] = {}
        for index, _, state, key in _entries(optimizer, names):
            states.setdefault(index, {})[state] = tensors[key].clone()
        # torch's own loader knows which tensors go to the parameter's device (a fused optimiser's `step` does).
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def check_state(found: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Refuse a state by name whose keys and shapes are not `shapes`.

    Raises:
        DamagedDataError: a state is missing, unknown, of another shape, or of another kind of optimiser.
    """
    kinds = ["muon" if any(key.startswith("momentum_buffer.") for key in keys) else "adamw" for keys in (found, shapes)]
    if found and kinds[0] != kinds[1]:
        raise DamagedDataError(
            f"the checkpoint's optimiser state is of {kinds[0]}, the configuration asks for {kinds[1]}; set "
            f"train.optimizer.kind to {kinds[0]}, or train in another folder"
        )
    for keys, problem in (
        (shapes.keys() - found.keys(), "lacks {}"),
        (found.keys() - shapes.keys(), "holds {}, of no parameter that is trained here"),
        ({key for key in shapes if key in found and found[key].shape != shapes[key]}, "has another shape in {}"),
    ):
        if keys:
            some = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise DamagedDataError(
                f"the checkpoint's optimiser state {problem.format(some)}; go on from an earlier checkpoint"
            )
