"""From what a user names to a head's folder and to the target that the head is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import yaml

from sstf.errors import HeadError, TargetError
from sstf.formats.files import looks_published, read_config
from sstf.methods.checkpoint import read_head
from sstf.targets import EMBEDDED, Target, TargetConfig, TargetSpec, load_target
from sstf.targets.huggingface import Dtype


def find_head(name: str) -> Path:
    """The head's folder, given itself, its training folder, or its run with one finished head. A folder with a
    published head is itself; `families.py` says whether it can be read.

    Raises:
        HeadError: there is none, or more than one.
    """
    folder = Path(name).expanduser()
    for candidate in (folder, folder / "head"):
        if (candidate / "head.json").is_file():
            return candidate
    heads: list[Path] = []
    finished: list[Path] = []
    for stage in ("on_policy", "train"):  # a head that was trained further comes before those that it began as
        heads = sorted(path.parent for path in folder.glob(f"{stage}/*/head/head.json"))
        if finished := [head for head in heads if (head.parent / "done.json").is_file()]:
            break
    if len(finished) == 1:
        return finished[0]
    if finished:
        raise HeadError(
            f"{folder}: holds {len(finished)} finished heads; name one: {', '.join(map(str, finished[:4]))}"
            + ", ..." * (len(finished) > 4)
        )
    if heads:
        raise HeadError(f"{folder}: its head is still in training; {heads[-1]} is the best so far and can be named")
    if looks_published(folder):
        return folder
    raise HeadError(
        f"{folder}: no head there; expected a head folder that `sstf train` wrote, the folder of a run that trained "
        "one, a published head (config.json and model.safetensors), or ngram for prompt lookup without a head"
    )


def target_of(folder: Path, name: str | None = None) -> Target:
    """Load the target of the head in `folder`, in any form.

    Args:
        folder: see `find_head`.
        name: of the target, if not the one that the head names. In EAGLE's form a head names none.

    Raises:
        HeadError: the head cannot be read, or names no target.
        TargetError: the target cannot be loaded.
        DamagedDataError: the head was cut off or altered.
    """
    if (folder / "head.json").is_file():
        return target_for(folder, read_head(folder).target, name)
    config = read_config(folder)
    try:
        named = config["speculators_config"]["verifier"]["name_or_path"]
    except (KeyError, TypeError):
        named = None
    if not name and not isinstance(named, str):
        raise HeadError(f"{folder}: a published head that names no target; say --target NAME")
    return load_target(name or named)


def target_for(folder: Path, spec: TargetSpec, name: str | None = None) -> Target:
    """Load the target that the head in `folder` was trained for.

    Args:
        folder: of the head.
        spec: of its target.
        name: where that target is now, if not where the head says.

    Raises:
        HeadError: the head names a dtype that targets are not loaded in.
        TargetError: the target cannot be loaded.
    """
    dtype: Dtype | None = next((known for known in get_args(Dtype) if known == spec.dtype), None)
    if dtype is None:
        raise HeadError(f"{folder}: its target's dtype is {spec.dtype}; expected one of {', '.join(get_args(Dtype))}")
    config = TargetConfig(name=name) if name else _trained_for(folder, spec)
    try:
        return load_target(config.name, dtype, revision=config.revision)
    except TargetError as error:
        hint = "" if name else "; where the target was moved, --target says where it is now"
        raise TargetError(f"{error}{hint}") from None


def _trained_for(folder: Path, spec: TargetSpec) -> TargetConfig:
    """A head knows its target's name alone; the run's configuration beside it also knows the folder or revision."""
    known = TargetConfig(name=spec.name)
    if spec.name in EMBEDDED:
        return known
    try:
        fields = yaml.safe_load((folder.parent / "config.yaml").read_text(encoding="utf-8"))["target"]
        config = TargetConfig.model_validate_json(json.dumps(fields))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return known
    # Consent to run code that ships with weights is not taken from a file that may have come with them.
    return config if Path(config.name).name == Path(spec.name).name else known
