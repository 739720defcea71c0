"""What the scripts have in common: their arguments, what a result was measured with, how it is shown."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from selfindex.evaluation import environment


def describe(module: str) -> dict[str, Any]:
    """Date, command and versions, to be stored beside a result of evals/`module`.py."""
    command = environment.command_line("python", "-m", f"evals.{module}", *sys.argv[1:])
    return environment.describe(command)


def arguments(doc: str | None, texts: Sequence[str]) -> argparse.ArgumentParser:
    """A parser with what every script asks for; `texts` are read where none are named."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma3-270m, or a model path")
    parser.add_argument("--texts", nargs="+", default=list(texts), help="manual, stdlib, ... or UTF-8 files")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


def save(path: Path | None, module: str, result: dict[str, Any]) -> None:
    """Write a result of evals/`module`.py and what it was measured with, if a path is given."""
    if path is not None:
        path.write_text(json.dumps({"environment": describe(module)} | result, indent=1) + "\n")


def show_table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print a fidelity table."""
    table = Table(title=title, title_justify="left")
    for column in (
        "variant",
        "B/token",
        "KL (95 %)",
        "worst text",
        "top-1 (95 %)",
        "worst text",
        "perplexity",
    ):
        table.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
    for name, row in rows.items():
        kl, top1 = row["kl"], row["top1"]
        table.add_row(
            name,
            f"{row['bytes']:.1f}" if "bytes" in row else "",
            f"{kl[0]:.4f} ({kl[1]:.4f}-{kl[2]:.4f})",
            f"{max(row['kl_by_text']):.4f}",
            f"{top1[0]:.3f} ({top1[1]:.3f}-{top1[2]:.3f})",
            f"{min(row['top1_by_text']):.3f}",
            f"{row['perplexity']:.2f}",
        )
    Console(width=120).print(table)
