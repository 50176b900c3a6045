"""Where training takes its features from: a store on disk, or the target itself (`online`). The trainer sees no
difference."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Any, Protocol, TypeVar, cast

from torch import Tensor

from sstf.targets import FrozenHead, TargetSpec
from sstf.types import FeatureBatch

Key = TypeVar("Key")
Item = TypeVar("Item")


class FeatureSource(Protocol):
    """Conversations by index, in a fixed order. All calls may come from several threads."""

    @property
    def name(self) -> str:
        """For messages: which data this is."""

    @property
    def target(self) -> TargetSpec:
        """The target whose hidden states these are."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers read, as 0-based layer outputs."""

    @property
    def ids(self) -> Sequence[str]:
        """Names of the conversations."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each conversation."""

    @property
    def trained(self) -> Sequence[int]:
        """Tokens of each conversation that the assistant wrote."""

    def made_from(self) -> dict[str, Any]:
        """For the record of a run: `data`, the SHA-256 of the conversations' names, tokens and masks, the same for
        every source of them; and what else decides their features."""

    def place(self, index: int) -> str:
        """Where a conversation is to be found, for messages."""

    def tokens_of(self, index: int) -> tuple[Tensor, Tensor]:
        """Token ids [seq] int64 and loss mask [seq] bool of one conversation."""

    def batch(self, indices: Sequence[int]) -> FeatureBatch:
        """Aligned rows of some conversations, one after the other; see `dataset`."""

    def frozen_head(self) -> FrozenHead:
        """The frozen parts of the target."""


def prefetched(load: Callable[[Key], Item], keys: Iterable[Key], ahead: int = 2) -> Iterator[Item]:
    """`load(key)` for each key, in order; a thread loads up to `ahead` items before they are asked for.

    An error of `load` is raised where its item would have come. Closing the iterator ends the thread.

    An iterator that is left half-way may be closed by the garbage collector, at any place and in any thread, one that
    is just being started too. So its end takes no lock and waits for nobody: `SimpleQueue.put` may be called anywhere.
    """
    asked: SimpleQueue[tuple[Callable[[Key], Item], Key] | None] = SimpleQueue()  # None ends the thread
    loaded: SimpleQueue[tuple[Item | None, BaseException | None]] = SimpleQueue()
    left, waiting, closed = iter(keys), 0, [False]

    def ask(count: int) -> int:
        some = list(islice(left, count))
        for key in some:
            asked.put((load, key))
        return len(some)

    thread = Thread(target=_load_on_demand, args=(asked, loaded, closed), name="prefetch", daemon=True)
    _LOADING[thread] = asked
    thread.start()
    try:
        waiting = ask(ahead)
        while waiting:
            item, error = loaded.get()
            if error is not None:
                raise error
            waiting += ask(1) - 1
            yield cast(Item, item)
        asked.put(None)
        thread.join()
    finally:
        closed[0] = True
        asked.put(None)


def _load_on_demand(asked: SimpleQueue[Any], loaded: SimpleQueue[Any], closed: list[bool]) -> None:
    """The thread. While it waits it holds nothing of who asks, or what was left would never become garbage."""
    while (work := asked.get()) is not None and not closed[0]:
        load, key = work
        try:
            loaded.put((load(key), None))
        except BaseException as error:
            loaded.put((None, error))
        del work, load, key
    _LOADING.pop(current_thread(), None)


_LOADING: dict[Thread, SimpleQueue[Any]] = {}  # threads at work, and what they are asked for


@atexit.register
def _end_loading() -> None:
    """A thread that the end of the process meets inside a kernel would abort it."""
    for thread, asked in list(_LOADING.items()):
        asked.put(None)
        thread.join(timeout=10)
