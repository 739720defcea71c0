"""Calls that run in threads at the same time."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier


def at_once(count, call):
    """[call(0), call(1), ...], each in a thread of its own, begun together."""
    barrier = Barrier(count)

    def work(i):
        barrier.wait()
        return call(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))
