"""Loads the compiled module and picks the instruction set it runs with."""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any

VARIABLE = "SELFINDEX_CPU"
"""Environment variable that forces an instruction set, or `reference` for plain PyTorch."""

SETS = ("avx512", "avx2", "neon", "generic")


class NativeUnavailable(Exception):
    """The compiled operators cannot run here; the text says why."""


class NativeDisabled(NativeUnavailable):
    """The user asked for plain PyTorch."""


def check_enabled() -> None:
    """Raise NativeDisabled if the user asked for plain PyTorch."""
    if os.environ.get(VARIABLE) == "reference":
        raise NativeDisabled(f"{VARIABLE}=reference")


@cache
def native() -> Any:
    """The compiled module.

    Raises:
        NativeUnavailable: the package was built without a C++ compiler, or for another machine.
    """
    try:
        return importlib.import_module(f"{__package__}._native")
    except ImportError as error:
        raise NativeUnavailable(
            f"the compiled CPU operators are not there ({error}); reinstall selfindex where a C++17 compiler "
            "(GCC or Clang) is found"
        ) from error


def instruction_set() -> str:
    """The instruction set of the compiled operators: the best one of this processor, or the forced one.

    Raises:
        NativeUnavailable: there are no compiled operators, or not for what was forced.
    """
    return _instruction_set(os.environ.get(VARIABLE, ""))


@cache
def _instruction_set(forced: str) -> str:
    if forced == "reference":
        raise NativeDisabled(f"{VARIABLE}=reference")
    if forced and forced not in SETS:
        raise NativeUnavailable(f"{VARIABLE}={forced} is none of {', '.join(SETS)}, reference")
    found = native().instruction_sets()
    if not forced:
        return str(found[0])
    if forced not in found:
        raise NativeUnavailable(f"{VARIABLE}={forced}, but this processor has only {', '.join(found)}")
    return forced


def scratch() -> int:
    """Bytes of working memory the compiled operators keep for later calls of this process, 24 MiB at most."""
    try:
        return int(native().kept_bytes())
    except NativeUnavailable:
        return 0
