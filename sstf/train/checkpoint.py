"""Training checkpoints: head, optimiser state and step, as safetensors, each folder whole or absent.

Everything else that a resumed run needs (data order, learning rate, random numbers) is a function of the seed and the
step, so there is nothing more to save. No pickle: optimiser state is flattened to `<state>.<parameter name>`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from sstf.data.atomic import sync_folder, write_bytes_atomic, write_json_atomic
from sstf.errors import DamagedDataError


@dataclass
class Progress:
    """Where a run stands. `best` is the highest simulated accepted length so far, reached at `best_step`."""

    step: int = 0
    best: float = 0.0
    best_step: int = -1
    trained_tokens: int = 0
    sha256: dict[str, str] = field(default_factory=dict)


def save_checkpoint(
    folder: Path, head: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, keep: int
) -> None:
    """Write `folder/step-<n>` and drop all but the `keep` latest."""
    final = folder / f"step-{progress.step:08d}"
    scratch = folder / f".{final.name}.part"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    names: dict[Tensor, str] = {parameter: name for name, parameter in head.named_parameters()}
    files = {
        "head.safetensors": dict(head.state_dict()),
        "optimizer.safetensors": {
            f"{key}.{names[parameter]}": value
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        },
    }
    digests = {}
    for file, tensors in files.items():
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        digests[file] = hashlib.sha256(data).hexdigest()
        write_bytes_atomic(scratch / file, data)
    write_json_atomic(scratch / "progress.json", asdict(progress) | {"sha256": digests})
    shutil.rmtree(final, ignore_errors=True)
    scratch.rename(final)
    sync_folder(folder)  # before an older one goes
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def load_checkpoint(path: Path, head: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore head and optimiser in place.

    Raises:
        DamagedDataError: a file is missing, cut off or altered, or belongs to another head.
    """
    try:
        progress = Progress(**json.loads((path / "progress.json").read_text(encoding="utf-8")))
        tensors = {}
        for file, digest in progress.sha256.items():
            data = (path / file).read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                raise DamagedDataError(
                    f"{path / file}: altered or cut off (its checksum differs); delete {path} to go on from an "
                    "earlier checkpoint"
                )
            tensors[file] = load(data)
        head.load_state_dict(tensors["head.safetensors"], strict=True)
        _load_optimizer(optimizer, [name for name, _ in head.named_parameters()], tensors["optimizer.safetensors"])
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise DamagedDataError(
            f"{path}: unreadable checkpoint ({error}); delete it to go on from an earlier one"
        ) from error
    return progress


def _load_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """Restore the state of the parameters `names`, in the order in which the optimiser got them."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, name = key.split(".", 1)
        state.setdefault(names.index(name), {})[kind] = value
    # torch's own loader knows which tensors go to the parameter's device (a fused optimiser's `step` does).
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
