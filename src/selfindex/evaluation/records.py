"""Finished measurements, one JSON line each, so that a run goes on where it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError

Key = tuple[Any, ...]
KEYS = ("part", "name", "length", "sample", "method")
"""Fields that tell records apart."""


class Records:
    """The lines of a file, and new ones to come.

    Args:
        path: created where it is missing; its first line holds the settings.
        settings: what all records have in common.

    Raises:
        ConfigError: the file holds records of other settings, or cannot be read.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path, self.rows = path, list[dict[str, Any]]()
        if path.exists():
            self._read(settings)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
        self._keys = {self._key(row) for row in self.rows}

    def _read(self, settings: dict[str, Any]) -> None:
        whole = self._path.read_text(encoding="utf-8")
        # A line that was being written when the run ended has no end.
        kept = whole[: whole.rfind("\n") + 1]
        try:
            first, *self.rows = [json.loads(line) for line in kept.splitlines()]
            before = first["settings"]
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{self._path} is not a file of results ({error}); remove it") from error
        before = {"asked": "later"} | before  # older files do not say it
        # As JSON gives them back: tuples have become lists.
        now = json.loads(json.dumps(settings))
        other = [name for name in now if before.get(name) != now[name]]
        if other:
            raise ConfigError(
                f"{self._path} holds results with another {', '.join(other)}; choose another folder, or "
                "remove the file to start anew"
            )
        if kept != whole:
            self._path.write_text(kept, encoding="utf-8")

    @staticmethod
    def _key(row: dict[str, Any]) -> Key:
        return tuple(row.get(name) for name in KEYS)

    def has(self, **key: Any) -> bool:
        """Whether a record with these values of KEYS exists."""
        return self._key(key) in self._keys

    def add(self, **row: Any) -> None:
        """Append a record; it is on disk when this returns."""
        self.rows.append(row)
        self._keys.add(self._key(row))
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def of(self, part: str) -> list[dict[str, Any]]:
        """Records of one part of the evaluation, in order."""
        return [row for row in self.rows if row["part"] == part]
