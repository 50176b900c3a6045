"""The order in which waiting requests come to be decoded: clients take turns, each client's own requests stay in order.

A client who sends a hundred requests delays another's single one by one request, not by a hundred (round-robin fair
queueing, as in Nagle, RFC 970, counted in requests).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """At most `limit` items of any number of clients."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()  # whose turn is next comes first; none is empty
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, client: str, item: T) -> bool:
        """False if the queue is full, and the item is not in it."""
        if self._length >= self.limit:
            return False
        self._waiting.setdefault(client, deque()).append(item)
        self._length += 1
        return True

    def pop(self) -> T:
        """The next item.

        Raises:
            IndexError: there is none.
        """
        if not self._length:
            raise IndexError("the queue is empty")
        client, items = self._waiting.popitem(last=False)
        item = items.popleft()
        if items:
            self._waiting[client] = items  # behind all others
        self._length -= 1
        return item

    def remove(self, client: str, item: T) -> bool:
        """Take an item out that nobody waits for any more; False if it is not there."""
        items = self._waiting.get(client, deque())
        if item not in items:
            return False
        items.remove(item)
        if not items:
            del self._waiting[client]
        self._length -= 1
        return True
