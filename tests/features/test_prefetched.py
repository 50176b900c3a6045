"""Items that a thread loads ahead: same order, same errors, never more than asked for ahead, no thread left."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from sstf.features import prefetched

BEFORE: set[threading.Thread] = set()  # of tests that ran earlier in this process


@pytest.fixture(autouse=True)
def _others() -> None:
    BEFORE.update(threading.enumerate())


def alive() -> list[str]:
    now = set(threading.enumerate()) - BEFORE
    return [thread.name for thread in now if thread.name.startswith("prefetch")]


def wait_until(condition: object) -> None:
    deadline = time.monotonic() + 5
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_items_come_in_order_from_another_thread() -> None:
    here, where = threading.get_ident(), set()

    def load(key: int) -> int:
        where.add(threading.get_ident())
        time.sleep(0.002 * (key % 3))
        return key * key

    assert list(prefetched(load, range(20))) == [key * key for key in range(20)]
    assert here not in where
    assert alive() == []


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_no_more_than_so_many_are_held(ahead: int) -> None:
    loaded: list[int] = []
    items = prefetched(lambda key: loaded.append(key) or key, range(100), ahead)
    assert next(items) == 0
    # The first was handed out; `ahead` others are loaded or being loaded, and there it stops.
    wait_until(lambda: len(loaded) == ahead + 1)
    time.sleep(0.02)
    assert loaded == list(range(ahead + 1))
    items.close()  # type: ignore[attr-defined]
    wait_until(lambda: alive() == [])
    assert loaded == list(range(ahead + 1))


def test_an_error_comes_in_the_place_of_its_item() -> None:
    def load(key: int) -> int:
        if key == 3:
            raise ValueError("broken shard")
        return key

    items = prefetched(load, range(10))
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="broken shard"):
        next(items)
    wait_until(lambda: alive() == [])


def test_keys_are_read_lazily() -> None:
    asked: list[int] = []

    def keys() -> object:
        for key in range(50):
            asked.append(key)
            yield key

    items = prefetched(lambda key: key, keys(), ahead=2)  # type: ignore[arg-type]
    next(items)
    assert asked == [0, 1, 2]
    items.close()  # type: ignore[attr-defined]


LEFT_HALF_WAY = """
import concurrent.futures.thread, gc, threading, time
from sstf.features import prefetched

class Holder:
    def __init__(self):
        self.items = prefetched(self.load, range(100))  # a cycle, as a trainer's feed has
        next(self.items)

    def load(self, key):
        return key

gc.disable()
Holder()
time.sleep(0.5)  # until the thread has loaded ahead, and waits
with threading._shutdown_locks_lock, concurrent.futures.thread._global_shutdown_lock:
    gc.collect()
print(sum(isinstance(one, Holder) for one in gc.get_objects()))
"""


def test_the_garbage_collector_may_close_it_where_locks_are_held() -> None:
    """A thread holds these locks while it starts, and collects garbage there: once a training hung for good."""
    command = [sys.executable, "-W", "ignore", "-c", LEFT_HALF_WAY]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout.split()) == (0, ["0"]), found.stderr


def test_nothing_to_load() -> None:
    assert list(prefetched(lambda key: key, [])) == []
