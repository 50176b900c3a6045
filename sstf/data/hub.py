"""Rows of a data set that the `datasets` library loads by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sstf.data.config import HubSource
from sstf.errors import DataError


def hub_rows(source: HubSource) -> Iterator[Any]:
    """The rows of one split, in order.

    Raises:
        DataError: There is no such data set, split or subset, or it cannot be reached.
    """
    # Takes seconds to import, and only this source needs it.
    import datasets

    try:
        rows = datasets.load_dataset(
            source.name, source.subset, split=source.split, revision=source.revision, streaming=source.streaming
        )
        yield from rows
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # The library's messages are long; the first line says what happened. Network errors are OSErrors.
        lines = str(error).strip().splitlines()
        raise DataError(
            f"The data set {source.name!r} (subset {source.subset}, split {source.split}) cannot be loaded: "
            f"{lines[0] if lines else type(error).__name__}. Check its name and the network, or use a local file."
        ) from error
