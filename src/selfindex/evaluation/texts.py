"""Long real texts that are available without a network.

====== ======================================================== =============================
name   text                                                     where it comes from
====== ======================================================== =============================
manual reference manual of CPython (`pydoc_data.topics`)        the standard library
stdlib sources of CPython's library, concatenated               the standard library
kjv    the King James Bible, verse numbers removed              Debian `bible-kjv`
jargon the Jargon File                                          Debian `jargon-text`
====== ======================================================== =============================

The last two need `apt-get install bible-kjv jargon-text`. Any other text can be given as the
path of a UTF-8 file.
"""

from __future__ import annotations

import gzip
import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from ..manual import manual

JARGON_PATH = Path("/usr/share/doc/jargon-text/jargon.txt.gz")


def stdlib(max_chars: int = 4_000_000) -> str:
    """The top-level modules of CPython's library in alphabetical order."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: list[str] = []
    total = 0
    for path in sorted(root.glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        parts.append(f"# {path.name}\n{source}")
        total += len(source)
        if total >= max_chars:
            break
    return "\n".join(parts)


def kjv() -> str:
    """The King James Bible, one verse a line."""
    if shutil.which("bible") is None:
        raise FileNotFoundError("the text 'kjv' needs the Debian package bible-kjv")
    command = ["bible", "-f", "Gen1:1-Rev22:21"]
    raw = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.sub(r"(?m)^\S+?\d+:\d+ ", "", raw)


def jargon() -> str:
    """The Jargon File (a dictionary with long entries, and essays)."""
    if not JARGON_PATH.exists():
        raise FileNotFoundError("the text 'jargon' needs the Debian package jargon-text")
    with gzip.open(JARGON_PATH, "rt", encoding="utf-8", errors="replace") as stream:
        return stream.read()


TEXTS: dict[str, Callable[[], str]] = {
    "manual": manual,
    "stdlib": stdlib,
    "kjv": kjv,
    "jargon": jargon,
}


def load_text(name_or_path: str) -> str:
    """A named text of this module, or the content of a UTF-8 file."""
    if name_or_path in TEXTS:
        return TEXTS[name_or_path]()
    path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(f"{name_or_path!r} is neither one of {sorted(TEXTS)} nor a file")
    return path.read_text(encoding="utf-8", errors="replace")


RECENT = re.compile(r"Copyright.{0,20}20(?:2[5-9]|[3-9]\d)")
"""A licence notice of 2025 or later."""


@lru_cache(maxsize=1)
def recent_code() -> dict[str, str]:
    """Sources by path, sorted, that today's models have hardly seen: the files of the installed transformers
    whose licence notice is of 2025 or later, by and by the folders that came with new models.
    """
    root = Path(importlib.util.find_spec("transformers").submodule_search_locations[0])  # type: ignore
    found = {}
    for path in sorted(root.rglob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        if RECENT.search(source[:600]) and "\r" not in source and "\f" not in source:
            found[path.relative_to(root.parent).as_posix()] = source
    return found


def excerpt(text: str, part: int, parts: int, max_chars: int) -> str:
    """The beginning of the `part`-th of `parts` equal stretches of `text`, from a line start."""
    start = len(text) * part // parts
    newline = text.find("\n", start) if start else -1
    start = newline + 1 if newline >= 0 else start
    return text[start : start + max_chars]
