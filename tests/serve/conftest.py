"""A server with the tiny target."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from loopback_server import Running, lookup, running

from sstf.decode import SpeculativeDecoder
from sstf.targets import Target


@pytest.fixture(scope="module")
def served(tiny_target: Target) -> Iterator[Running]:
    with running(lookup(tiny_target)) as server:
        yield server


@pytest.fixture
def decoder(tiny_target: Target) -> SpeculativeDecoder:
    """What a server's text must equal."""
    return SpeculativeDecoder(tiny_target)
