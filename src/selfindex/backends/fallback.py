"""A fast implementation of an operator where it serves the call, the reference elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any


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

    @wraps(reference)
    def run(*arguments: Any) -> Any:
        if supported(*arguments):
            try:
                return fast(*arguments)
            except unavailable as error:
                if not isinstance(error, silent):
                    announce(place, str(error))
        return reference(*arguments)

    return run
