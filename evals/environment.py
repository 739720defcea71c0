"""What a result was measured with, and how results are shown."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import selfindex


def describe(module: str) -> dict[str, Any]:
    """Date, command and versions, to be stored beside a result of evals/`module`.py."""
    return {
        "date": datetime.date.today().isoformat(),
        # File names without their folders: where they lay says nothing to a reader.
        "command": shlex.join(["python", "-m", f"evals.{module}", *(Path(a).name for a in sys.argv[1:])]),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "selfindex": selfindex.__version__,
    }


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
