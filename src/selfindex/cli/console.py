"""What the commands share in talking to people: consoles, progress, errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..config import SelfIndexConfig
from ..errors import ConfigError, SelfIndexError

# Results go to stdout, everything else to stderr, so that output can be piped.
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class CommandError(SelfIndexError):
    """A command cannot be carried out; the message says why and what to do."""


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn this package's exceptions, and files that cannot be written, into a red line and exit code 1."""
    try:
        yield
    except (SelfIndexError, OSError) as error:
        show_error(error)
        raise typer.Exit(1) from None


def show_error(error: Exception) -> None:
    """One red line on stderr."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    err.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)


def progress(live: bool = True) -> Progress:
    """A progress display that disappears when the work is done.

    Args:
        live: redraw it all the time; else only where an update asks for it, so that nothing is drawn
            while something is timed.
    """
    return Progress(
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description:<36}"),
        BarColumn(bar_width=32),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        auto_refresh=live,
    )


def check_output(file: Path) -> None:
    """Raise CommandError if the folder of a file to write is missing: before the work, not after it."""
    if not file.parent.is_dir():
        raise CommandError(f"no such folder: {file.parent}")


def parse_budget(text: str) -> float | int:
    """A budget as typed: "0.05" or "5%" of the tokens, or "2048" tokens.

    Raises:
        ConfigError: not a number. Its range is checked by `SelfIndexConfig`.
    """
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ConfigError(
            f"budget must be a fraction (0.05), a percentage (5%) or a number of tokens (2048), got {text!r}"
        ) from None


def budget_text(budget: float | int, least: int = 1) -> str:
    """A budget for people: "5 %", "5 %, at least 1,024 tokens" or "2,048 tokens"."""
    if isinstance(budget, int):
        return f"{budget:,} tokens"
    return f"{100 * budget:g} %" + (f", at least {least:,} tokens" if least > 1 else "")


BUDGET = typer.Option(
    "0.05",
    help="Encoded tokens read per query: a share (0.05 or 5%; at least "
    f"{SelfIndexConfig.min_tokens:,} of them) or a number (2048).",
)
PRESET = typer.Option("balanced", help="How the cache is encoded: balanced or paper.")
PREFILL = typer.Option(
    "exact", help="How a prompt attends to itself: exact, sparse, sparse=0.9 (mass) or sparse=10% (density)."
)
DEVICE = typer.Option("auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1 ...")
