"""Keeps a cache whole: one thread at a time, and no change cut short goes unnoticed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...errors import StateError


class Guard:
    """Refuses a cache to a second thread, and after a change that an exception cut short.

    Whatever can fail for a reason (memory, bad input) is worked out before `change` begins. An
    exception inside it, or an interrupt at any instruction, leaves `interrupted` set.

    Attributes:
        interrupted: a change began and did not end; only `restart` gets out of this.
        stream: the CUDA stream that a cache with forks runs on; None if it has none.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self.stream: int | None = None
        self._lock = threading.RLock()

    def of_fork(self, one_at_a_time: bool) -> Guard:
        """The guard of a fork; with `one_at_a_time`, a thread in one of them keeps the others closed."""
        new = Guard()
        new.stream = self.stream
        if one_at_a_time:
            new._lock = self._lock
        return new

    @contextmanager
    def use(self) -> Iterator[None]:
        """Run a block that reads the cache.

        Raises:
            StateError: another thread is in such a block, or the cache is interrupted.
        """
        self._enter()
        try:
            if self.interrupted:
                raise StateError(
                    "a change of this cache was cut short by an exception or an interrupt, and its layers "
                    "may no longer agree; call cache.reset() and fill it again"
                )
            if self.stream is not None and torch.cuda.current_stream().cuda_stream != self.stream:
                raise StateError(
                    "forks of a cache share pages and have to run on the CUDA stream that fork() was called "
                    "on; copy.deepcopy(cache) gives a cache that shares nothing"
                )
            yield
        finally:
            self._lock.release()

    @contextmanager
    def change(self) -> Iterator[None]:
        """Run a block that must run to its end. Raises as `use`."""
        with self.use():
            self.interrupted = True
            yield
            self.interrupted = False

    @contextmanager
    def restart(self) -> Iterator[None]:
        """Run a block that empties the cache, interrupted or not; one that is cut short can be repeated."""
        self._enter()
        try:
            self.interrupted = True
            yield
            self.interrupted = False
        finally:
            self._lock.release()

    def _enter(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise StateError(
                "this cache is in use by another thread; a cache serves one thread at a time. "
                "cache.fork() gives each its own, at the cost of its full-precision tokens"
            )
