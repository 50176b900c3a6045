"""Whose turn it is."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sstf.serve.queue import FairQueue


def filled(*pairs: tuple[str, int], limit: int = 100) -> FairQueue[int]:
    queue = FairQueue[int](limit)
    for client, item in pairs:
        assert queue.push(client, item)
    return queue


def test_clients_take_turns() -> None:
    queue = filled(("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("b", 6))
    assert [queue.pop() for _ in range(6)] == [1, 4, 5, 2, 6, 3]
    with pytest.raises(IndexError, match="empty"):
        queue.pop()


def test_who_comes_late_waits_for_one_of_each_other() -> None:
    queue = filled(*(("crowd", i) for i in range(50)))
    assert [queue.pop(), queue.pop()] == [0, 1]
    queue.push("single", 99)
    assert [queue.pop(), queue.pop()] == [2, 99]


def test_full_and_with_items_taken_out() -> None:
    queue = filled(("a", 1), ("b", 2), ("a", 3), limit=3)
    assert not queue.push("c", 4) and len(queue) == 3
    assert queue.remove("b", 2) and not queue.remove("b", 2) and not queue.remove("x", 1)
    assert queue.push("c", 4)
    assert [queue.pop() for _ in range(3)] == [1, 4, 3]
    assert len(queue) == 0


Action = tuple[str, str]


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "remove"]), st.sampled_from("abcd")), max_size=60))
def test_nothing_is_lost_and_turns_are_kept(actions: list[Action]) -> None:
    """In the order of arrival within a client; between two turns of one, no other that waited has more than one."""
    queue, waiting = FairQueue[int](20), defaultdict[str, list[int]](list)
    owner: dict[int, str] = {}
    served: list[str] = []
    since: dict[str, int] = {}  # length of `served` when a client began to wait
    for number, (action, client) in enumerate(actions):
        if action == "push":
            taken = queue.push(client, number)
            assert taken == (sum(map(len, waiting.values())) < 20)
            if taken:
                if not waiting[client]:
                    since[client] = len(served)
                waiting[client].append(number)
                owner[number] = client
        elif action == "remove" and waiting[client]:
            assert queue.remove(client, waiting[client].pop(0))
        elif action == "pop" and len(queue):
            item = queue.pop()
            assert waiting[owner[item]].pop(0) == item
            turns = served[since[owner[item]] :]
            assert max(map(turns.count, turns), default=0) <= 1  # nobody twice while it waited
            served.append(owner[item])
            since[owner[item]] = len(served)
        assert len(queue) == sum(map(len, waiting.values()))
