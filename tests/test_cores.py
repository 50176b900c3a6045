"""Threads that leave the cores to the one that computes; see `sstf.cores`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from io import StringIO
from typing import Any, TypeVar, cast

import pytest
import torch
from rich.console import Console

from sstf.cores import leave_cores_to_others
from sstf.errors import DataError, TargetError
from sstf.features import FeatureSource
from sstf.train.feed import Feed
from sstf.train.parallel import open_launch

T = TypeVar("T")
pytestmark = pytest.mark.skipif("USE_OPENMP=ON" not in torch.__config__.show(), reason="torch without OpenMP")


@pytest.fixture(autouse=True)
def two_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_a_thread(work: Callable[[], T]) -> T:
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_one_thread_computes_alone_and_no_other_does() -> None:
    def limited() -> int:
        leave_cores_to_others()
        return torch.get_num_threads()

    assert in_a_thread(limited) == 1
    assert torch.get_num_threads() == in_a_thread(torch.get_num_threads) == 2


def test_loading_leaves_the_cores_to_training() -> None:
    class Source:
        lengths = (8,)

        def batch(self, conversations: tuple[int, ...]) -> None:
            raise DataError(f"{torch.get_num_threads()} for {conversations}")

    feed = Feed(cast(FeatureSource, Source()), open_launch(), [[0]], 8)
    with pytest.raises(DataError, match=r"^1 for \(0,\)$"):
        next(feed.step(0))
    assert torch.get_num_threads() == 2


def test_serving_leaves_them_to_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that loads and listens starts no pool of its own; the worker's thread is another."""
    server = pytest.importorskip("sstf.serve.server")

    def opened(*given: Any) -> None:
        raise TargetError(f"{torch.get_num_threads()} here, {in_a_thread(torch.get_num_threads)} in a new thread")

    def serving() -> str:
        with pytest.raises(TargetError) as error:
            server.serve("ngram", server.ServeConfig(port=0), None, None, True, Console(file=StringIO()))
        return str(error.value)

    monkeypatch.setattr(server, "open_decoder", opened)
    assert in_a_thread(serving) == "1 here, 2 in a new thread"
