"""Which versions of transformers this release was tested with."""

from __future__ import annotations

import warnings
from importlib import metadata

OLDEST, NEWEST = (5, 17), (5, 24)
"""Minor versions of transformers that the test suite runs on, and all between them."""


def transformers_problem(version: str) -> str | None:
    """What is to be said about a version of transformers; None if it was tested."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if OLDEST <= (major, minor) <= NEWEST:
        return None
    tested = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    return f"transformers {version} was not tested with this release of selfindex, {tested} were"


def check_transformers() -> None:
    """Called before anything of transformers is used.

    A newer version gets a warning and no more: most change nothing here, and an upper bound among
    the dependencies would keep users from models that only newer versions have. An older one
    lacks what the cache is built on.

    Raises:
        ImportError: transformers is older than `OLDEST`.
    """
    version = metadata.version("transformers")
    problem = transformers_problem(version)
    if problem is None:
        return
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise ImportError(f'{problem}: pip install "transformers>={OLDEST[0]}.{OLDEST[1]}"')
    warnings.warn(
        f"{problem}; if something is wrong, try {NEWEST[0]}.{NEWEST[1]}", RuntimeWarning, stacklevel=2
    )
