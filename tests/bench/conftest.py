"""Servers that end with their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from stand_in import StandIn


@pytest.fixture
def serve() -> Iterator[Callable[..., StandIn]]:
    """Makes stand-ins; its arguments are `StandIn`'s."""
    made: list[StandIn] = []

    def make(**settings: object) -> StandIn:
        made.append(StandIn(**settings))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for server in made:
        with suppress(OSError):
            server.stop()
