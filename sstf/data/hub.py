"""Rows of a data set that the `datasets` library loads by name."""

from __future__ import annotations

from collections.abc import Iterator

from sstf.data.config import HubSource
from sstf.data.files import Row, without_nulls
from sstf.data.known_sets import KNOWN_SETS, resolve
from sstf.errors import DataError


def hub_rows(source: HubSource) -> Iterator[Row]:
    """The rows of one split, in order; ids of rows without one are `name/split:number`.

    Raises:
        DataError: There is no such data set, split or subset, or it cannot be reached.
    """
    # Takes seconds to import, and only this source needs it.
    import datasets

    known, source = resolve(source)
    name = f"{source.name}/{source.split}"
    try:
        rows = datasets.load_dataset(
            source.name,
            source.subset,
            data_files=known.file,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
        for number, value in enumerate(rows, start=1):
            yield Row(without_nulls(value), f"{name}:{number}", f"{name}:{number}", name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # The library's messages are long; the first line says what happened. Network errors are OSErrors.
        lines = str(error).strip().splitlines()
        short = "" if "/" in source.name else f" Short names are {', '.join(KNOWN_SETS)}."
        raise DataError(
            f"The data set {source.name!r} (subset {source.subset}, split {source.split}) cannot be loaded: "
            f"{lines[0] if lines else type(error).__name__}. Check its name and the network, or use a local file."
            + short
        ) from error
