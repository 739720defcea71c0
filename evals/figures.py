"""Draw the README's figure from a result of `evals.fidelity`.

python -m evals.figures evals/results/fidelity-smollm2.json docs/figures/fidelity.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"balanced": "#1b7f5c", "paper": "#b5522b"}


def draw(source: Path, target: Path) -> None:
    """KL to the dense model against the budget, one panel a context length, with intervals."""
    lengths = json.loads(source.read_text())["lengths"]
    figure, axes = plt.subplots(
        1, len(lengths), figsize=(4.6 * len(lengths), 3.4), sharey=True, squeeze=False
    )
    for axis, (length, rows) in zip(axes[0], lengths.items(), strict=True):
        for preset, colour in COLOURS.items():
            named = {name: row for name, row in rows.items() if name.startswith(f"{preset} ")}
            budgets = [float(name.split()[1]) for name in named]
            low, mid, high = ([row["kl"][i] for row in named.values()] for i in (1, 0, 2))
            size = next(iter(named.values()))["bytes"]
            axis.fill_between(budgets, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.plot(budgets, mid, "o-", color=colour, label=f"{preset}, {size:.0f} of 256 bytes a token")
        axis.set_xscale("log")
        axis.set_xticks([5, 7.5, 10, 100], ["5", "7.5", "10", "100"])
        axis.minorticks_off()
        axis.set_title(f"{int(length):,} tokens of context", fontsize=10)
        axis.set_xlabel("budget: encoded tokens attended, %")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylim(0, max(row["kl"][2] for rows in lengths.values() for row in rows.values()) * 1.05)
    axes[0][0].set_ylabel("KL to the dense model, nats")
    axes[0][0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
