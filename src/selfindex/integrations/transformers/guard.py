"""Keeps a cache whole: one thread at a time, and no change cut short goes unnoticed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...errors import StateError


class _Use:
    """`Guard.use`, written out: of a generator, every layer of every step would pay for the making."""

    __slots__ = ("_guard",)

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def __enter__(self) -> None:
        self._guard.enter()
        try:
            self._guard.check()
        except BaseException:
            self._guard.leave()
            raise

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._guard.leave()


class _Change(_Use):
    """`Guard.change`."""

    __slots__ = ()

    def __enter__(self) -> None:
        super().__enter__()
        self._guard.interrupted = True

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self._guard.interrupted = False
        finally:
            self._guard.leave()


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

    def use(self) -> _Use:
        """Run a block that reads the cache.

        Raises:
            StateError: another thread is in such a block, or the cache is interrupted.
        """
        return _Use(self)

    def change(self) -> _Change:
        """Run a block that must run to its end. Raises as `use`."""
        return _Change(self)

    @contextmanager
    def restart(self) -> Iterator[None]:
        """Run a block that empties the cache, interrupted or not; one that is cut short can be repeated."""
        self.enter()
        try:
            self.interrupted = True
            yield
            self.interrupted = False
        finally:
            self._lock.release()

    def check(self) -> None:
        """Raise StateError if the cache is interrupted, or on another stream than its forks."""
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

    def leave(self) -> None:
        """End what `enter` began."""
        self._lock.release()

    def enter(self) -> None:
        """Keep other threads out. Raises StateError if one of them is in."""
        if not self._lock.acquire(blocking=False):
            raise StateError(
                "this cache is in use by another thread; a cache serves one thread at a time. "
                "cache.fork() gives each its own, at the cost of its full-precision tokens"
            )
