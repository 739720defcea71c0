"""Write docs/quality.md and its figure from committed results.

No options: `python -m evals.quality`.
"""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "evals" / "results"
FIGURE = "figures/pareto.png"
COLUMNS = (
    "method", "bytes a token", "bytes read a step", "KL to dense", "worst text", "top-1 agreement",
    "perplexity",
)  # fmt: skip
AXES = {
    "bytes": "bytes a cached token and head",
    "read": "bytes read a step, per cached token and head",
}


def number(x: float, digits: int) -> str:
    """Without the zero before the point."""
    return f"{x:.{digits}f}".replace("0.", ".", 1) if abs(x) < 1 else f"{x:.{digits}f}"


def interval(values: list[float], digits: int = 3) -> str:
    """Estimate and 95 % interval."""
    middle, low, high = (number(x + 0.0, digits) for x in values)
    return f"{middle} [{low}, {high}]"


def wilson(hits: int, total: int) -> list[float]:
    """Share and its 95 % Wilson score interval, for independent tries."""
    if total == 0:
        return [0.0, 0.0, 1.0]
    share, z = hits / total, 1.96
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return [share, max(0.0, centre - half), min(1.0, centre + half)]


def paragraph(*parts: str) -> list[str]:
    """Text in lines of readable length, and an empty line."""
    return [*textwrap.wrap(" ".join(parts), 116, break_long_words=False, break_on_hyphens=False), ""]


def table(result: dict[str, Any], length: str) -> list[str]:
    """One length: a row a method, by KL."""
    rows = result["lengths"][length]
    lines = [
        f"### {int(length):,} tokens",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    for name, row in sorted(rows.items(), key=lambda item: item[1]["kl"][0]):
        bold = "**" if name.startswith("selfindex balanced 5") else ""
        lines.append(
            f"| {bold}{name}{bold} | {row['bytes']:.1f} | {row['read']:.1f} | {interval(row['kl'])} | "
            f"{number(max(row['kl_by_text']), 3)} | {interval(row['top1'])} | {row['perplexity']:.2f} |"
        )
    return [*lines, ""]


def needle_table(found: dict[str, Any]) -> list[str]:
    """Needles found, of those that dense finds."""
    total = found["dense finds"]
    lines = [
        "### Needles",
        "",
        *paragraph(
            f"A phone number in {found['length']:,} tokens of each text, the question asked after",
            "compression, every query selecting its own tokens.",
            f"Of {found['asked']} needles the dense cache finds {total}; of those:",
        ),
        "| method | found | share, 95 % Wilson interval |",
        "|---|---|---|",
    ]
    rows = {name: row for name, row in found.items() if isinstance(row, dict)}
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["found"]):
        lines.append(f"| {name} | {row['found']} of {total} | {interval(wilson(row['found'], total), 2)} |")
    return [*lines, ""]


def draw(result: dict[str, Any], target: Path) -> None:
    """KL against the bytes held and the bytes read, one mark a method and length."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    lengths = list(result["lengths"])
    for axis, (key, label) in zip(axes, AXES.items(), strict=True):
        for length, marker in zip(lengths, "os", strict=False):
            for name, row in result["lengths"][length].items():
                if name == "dense":
                    continue
                ours = name.startswith("selfindex")
                colour = "#1b7f5c" if ours else "#8a8f98"
                axis.plot(row[key], row["kl"][0], marker, color=colour, markersize=7 if ours else 5)
                if length == lengths[0]:
                    axis.annotate(
                        name, (row[key], row["kl"][0]), xytext=(5, 4), textcoords="offset points",
                        fontsize=7, color=colour,
                    )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_xticks([8, 16, 32, 64, 128, 256], ["8", "16", "32", "64", "128", "256"])
        axis.set_xlim(8, 560)
        axis.set_yscale("log")
        axis.set_xlabel(f"{label} (dense: {4 * result['head_dim']})")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("KL to the dense model, nats")
    marks = ", ".join(f"{m} {int(n):,} tokens" for n, m in zip(lengths, ("round:", "square:"), strict=False))
    figure.suptitle(f"{result['model']}; {marks}", fontsize=9)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)


def setting(result: dict[str, Any]) -> str:
    """Command, date and machine of a result."""
    found = result["environment"]
    machine = found["gpu"] or f"{found['cpus']} CPU cores"
    return (
        f"`{found['command']}`, {found['date']}, {machine}, torch {found['torch']}, "
        f"transformers {found['transformers']}."
    )


def main() -> None:
    """Write the page and the figure."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("compare-*.json"))]
    lines = ["# Quality", ""]
    lines += paragraph(
        "Written by `python -m evals.quality` from evals/results/ and evals/notes.md.",
        "How the defaults were chosen: design-notes.md and ablation.md.",
    )
    lines += ["## Beside other caches", ""]
    lines += paragraph(
        "SmolLM2-135M-Instruct (d = 64), teacher-forced over the last tokens of each text; brackets are 95 %",
        "bootstrap intervals over tokens. Sparse methods read the same share of the tokens, and all keep 16",
        "sinks and 64 recent tokens in full precision (KIVI its own 128). Bytes are per token and KV head,",
        'scales and index included; "read" is what one decode step reads of them. The methods, with their',
        "sources: src/selfindex/evaluation/rivals/.",
    )
    for result in results:
        for length in result["lengths"]:
            lines += table(result, length)
            lines += paragraph(f"Texts: {', '.join(result['texts'])}. {setting(result)}")
    lines += [f"![Fidelity against bytes held and read]({FIGURE})", ""]
    lines += ["![KL against the budget, four texts](figures/fidelity.png)", ""]
    for result in results:
        if result["needles"]:
            lines += needle_table(result["needles"])
            lines += paragraph(f"Texts: {', '.join(result['texts'])}. {setting(result)}")
    lines += (ROOT / "evals" / "notes.md").read_text().splitlines()
    (ROOT / "docs" / "quality.md").write_text("\n".join(lines).rstrip() + "\n")
    together = dict(results[0], lengths={n: rows for r in results for n, rows in r["lengths"].items()})
    draw(together, ROOT / "docs" / FIGURE)


if __name__ == "__main__":
    main()
