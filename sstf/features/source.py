"""Where training takes its features from: a store on disk, or the target itself (`online`). The trainer sees no
difference."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol, TypeVar

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
    """
    with ThreadPoolExecutor(1, "prefetch") as pool:
        left = iter(keys)
        loading: deque[Future[Item]] = deque(pool.submit(load, key) for key in islice(left, ahead))
        try:
            while loading:
                item = loading.popleft().result()
                loading.extend(pool.submit(load, key) for key in islice(left, 1))
                yield item
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
