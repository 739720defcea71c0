"""Writing a file as `open` would: whole or not at all, with the mode that users expect."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file; until it is whole, an older file of that name stays as it is.

    A new file gets the mode that the umask gives, an older one keeps its own. A symbolic link stays
    one: what it points to is written.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    mode = _mode(target)
    # Beside its place, then renamed into it: a crash or a full disk leaves no half of a file.
    temporary = target.parent / f".selfindex-{secrets.token_hex(8)}"
    try:
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if mode is None else mode)
        created = stat.S_IMODE(os.fstat(handle).st_mode)
        os.close(handle)
        save_file(tensors, temporary, metadata=metadata)
        # safetensors puts a file of its own here, which only the owner may read.
        os.chmod(temporary, created if mode is None else mode)
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _mode(target: Path) -> int | None:
    """Mode of the file that is there and may be written, None if there is none."""
    try:
        # A pipe that nobody reads would keep `open` waiting.
        handle = os.open(target, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        return None
    try:
        mode = os.fstat(handle).st_mode
    finally:
        os.close(handle)
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "only a regular file can be written", str(target))
    return stat.S_IMODE(mode)
