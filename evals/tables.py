"""Print the tables of ablation results as Markdown: `python -m evals.tables FILE.json ...`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LABELS = {
    "mass": "mass",
    "mass_diff": "mass, difference",
    "err": "output error",
    "err_diff": "output error, difference",
    "key_err": "key error",
    "value_err": "value error",
    "kl": "KL",
    "kl_diff": "KL, difference",
    "top1": "top-1",
    "loss": "loss rise",
}
PLAIN = ("key_err", "value_err")  # no spread to speak of over queries


def cell(metric: str, row: dict[str, Any]) -> str:
    """`estimate [low, high]`."""
    if metric not in row:
        return ""
    estimate, low, high = (f"{x:.4f}" for x in row[metric])
    return estimate if metric in PLAIN else f"{estimate} [{low}, {high}]"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One Markdown table; columns that are zero or one throughout are left out."""
    metrics = [m for m in LABELS if any(any(0 < abs(x) != 1 for x in r.get(m, ())) for r in rows.values())]
    lines = ["| | " + " | ".join(LABELS[m] for m in metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(cell(m, row) for m in metrics) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print every table of the given files."""
    for name in sys.argv[1:]:
        report = json.loads(Path(name).read_text())
        print(f"\n`{report['command']}` ({report['date']})")
        result = report["result"]
        if "/" in report["command"].split()[0] or "operator" in report["command"].split():
            for group, rows in result.items():
                print(f"\n**{group}**\n\n{table(rows)}")
        else:
            print(f"\n{table(result)}")


if __name__ == "__main__":
    main()
