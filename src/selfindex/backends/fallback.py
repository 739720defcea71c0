"""A fast implementation of an operator where it serves the call, the reference elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

Observer = Callable[[str, bool, tuple[Any, ...]], None]

_observers: tuple[Observer, ...] = ()


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Within the block, tell `observer` of every call, in any thread, that may be served fast.

    It gets the operator's name, whether the fast implementation served the call, and its arguments.
    """
    global _observers
    _observers = (*_observers, observer)
    try:
        yield
    finally:
        _observers = tuple(other for other in _observers if other is not observer)


def _tell(name: str, fast: bool, arguments: tuple[Any, ...]) -> None:
    for observer in _observers:
        observer(name, fast, arguments)


@cache
def announce(place: str, reason: str) -> None:
    """Say once that the slower implementation runs."""
    warnings.warn(
        f"selfindex runs its slower PyTorch implementation on the {place}: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def with_fallback(
    place: str,
    fast: Callable[..., Any],
    reference: Callable[..., Any],
    supported: Callable[..., bool],
    unavailable: type[Exception],
    silent: tuple[type[Exception], ...] = (),
) -> Callable[..., Any]:
    """The function to register for an operator; all callables take the operator's arguments.

    Args:
        place: "CPU" or "GPU", for the announcement.
        supported: whether `fast` serves a call; `reference` serves the others.
        unavailable: what `fast` raises where it cannot run at all: announced once, then `reference`.
        silent: subclasses of it that the user asked for and need not be told.
    """
    name = reference.__name__

    @wraps(reference)
    def run(*arguments: Any) -> Any:
        if supported(*arguments):
            try:
                result = fast(*arguments)
            except unavailable as error:
                if not isinstance(error, silent):
                    announce(place, str(error))
            else:
                _tell(name, True, arguments)
                return result
        _tell(name, False, arguments)
        return reference(*arguments)

    return run
