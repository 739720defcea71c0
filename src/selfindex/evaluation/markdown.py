"""Lines of Markdown, for reports and for pages of docs/ that scripts write."""

from __future__ import annotations

import textwrap


def paragraph(*parts: str) -> list[str]:
    """Text in lines of readable length, and an empty line."""
    return [*textwrap.wrap(" ".join(parts), 116, break_long_words=False, break_on_hyphens=False), ""]


def row(*cells: object) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(*names: str) -> list[str]:
    """The first two lines of a table."""
    return [row(*names), "|" + "---|" * len(names)]
