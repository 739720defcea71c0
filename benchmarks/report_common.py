"""What the sections of docs/performance.md have in common; `report.py` writes the page."""

from __future__ import annotations

from typing import Any

from selfindex.codec import PageFormat
from selfindex.config import PRESETS

Result = dict[str, Any]


def size(length: int) -> str:
    """A length in units of 1024 tokens."""
    return f"{length // 1024}k"


def where(result: Result, command: str) -> str:
    """The command, and what it ran on."""
    found = result["environment"]
    return f"`{command}`, {found['date']}, {found['device']}, torch {found['torch']}, CUDA {found['cuda']}."


def lengths(result: Result) -> str:
    """The lengths that were measured, as arguments."""
    return " ".join(map(str, sorted({row["length"] for row in result["results"]})))


def preset(result: Result) -> str:
    """The preset that was measured."""
    return (
        PageFormat.parse(result["format"]).preset if "format" in result else result.get("preset", "balanced")
    )


def preset_option(result: Result) -> str:
    """How a command asks for it."""
    return "" if preset(result) == "balanced" else f" --preset {preset(result)}"


def by_machine(results: list[Result]) -> list[list[Result]]:
    """Results that belong into one table: of one machine, one a preset. The newest machine comes first."""
    machines: dict[str, dict[str, Result]] = {}
    for result in sorted(results, key=lambda each: each["environment"]["date"]):
        name = result["environment"]["device"]
        machines[name] = machines.pop(name, {}) | {preset(result): result}
    return [[found[name] for name in PRESETS if name in found] for found in reversed(machines.values())]


def in_turn(results: list[Result], rows: str = "results") -> list[tuple[Result, Result]]:
    """(result, row of it) of all presets, sizes in order."""
    pairs = [(result, row) for result in results for row in result[rows]]
    return sorted(pairs, key=lambda pair: [pair[1].get(x, 0) for x in ("batch", "queries", "length")])
