"""Figures of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GREEN, BROWN, GREY = "#1b7f5c", "#b5522b", "#8a8f98"
AXES = {
    "bytes": "bytes a cached token and head",
    "read": "bytes read a step, per cached token and head",
}


def _colour(method: str) -> str:
    if method.startswith("selfindex paper"):
        return BROWN
    return GREEN if method.startswith("selfindex") else GREY


def _save(figure: Any, target: Path) -> None:
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)
    plt.close(figure)


def _clean(axis: Any) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def pareto(by_length: dict[str, dict[str, Any]], head_dim: int, title: str, target: Path) -> None:
    """KL against the bytes held and the bytes read, one mark a method and length.

    Args:
        by_length: length -> method -> row with "bytes", "read", "kl".
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    lengths = list(by_length)
    for axis, (key, label) in zip(axes, AXES.items(), strict=True):
        for length, marker in zip(lengths, "osv^", strict=False):
            for name, row in by_length[length].items():
                if name == "dense":
                    continue
                ours = name.startswith("selfindex")
                colour = GREEN if ours else GREY
                axis.plot(row[key], row["kl"][0], marker, color=colour, markersize=7 if ours else 5)
                if length == lengths[0]:
                    axis.annotate(
                        name, (row[key], row["kl"][0]), xytext=(5, 4), textcoords="offset points",
                        fontsize=7, color=colour,
                    )  # fmt: skip
        scale = head_dim / 64
        ticks = [round(x * scale) for x in (8, 16, 32, 64, 128, 256)]
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(x) for x in ticks])
        axis.set_xlim(8 * scale, 560 * scale)
        axis.set_yscale("log")
        axis.set_xlabel(f"{label} (dense: {4 * head_dim})")
        _clean(axis)
    axes[0].set_ylabel("KL to the dense model, nats")
    shapes = ("round", "square", "triangle", "upright triangle")
    marks = ", ".join(f"{s}: {int(n):,} tokens" for n, s in zip(lengths, shapes, strict=False))
    figure.suptitle(f"{title}; {marks}", fontsize=9)
    _save(figure, target)


def layers(by_method: dict[str, Any], title: str, target: Path) -> None:
    """Mass, output error and the share of the oracle's tokens, by layer.

    Args:
        by_method: method -> metric -> {"layers": one value a layer}.
    """
    names = {
        "mass": "softmax mass read",
        "error": "relative error of the output",
        "overlap": "oracle's tokens read",
    }
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    for axis, (metric, label) in zip(axes, names.items(), strict=True):
        for method, row in by_method.items():
            if method == "dense":
                continue
            ours = method.startswith("selfindex")
            axis.plot(
                row[metric]["layers"], color=_colour(method), label=method, linewidth=1.8 if ours else 0.9,
                linestyle="-" if ours else STYLES[list(by_method).index(method) % len(STYLES)],
            )  # fmt: skip
        axis.set_xlabel("layer")
        axis.set_title(label, fontsize=10)
        _clean(axis)
    axes[1].set_yscale("log")
    axes[2].legend(frameon=False, fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontsize=9)
    _save(figure, target)


STYLES = ("-", "--", ":", "-.")


def error_by_length(by_length: dict[str, Any], title: str, target: Path) -> None:
    """Mean output error of attention against the length of the context."""
    figure, axis = plt.subplots(figsize=(6, 3.6))
    lengths = [int(n) for n in by_length]
    for i, method in enumerate(next(iter(by_length.values()))):
        if method == "dense":
            continue
        ours = method.startswith("selfindex")
        axis.plot(
            lengths, [rows[method]["error"]["mean"] for rows in by_length.values()], marker="o", markersize=3,
            color=_colour(method), label=method, linestyle="-" if ours else STYLES[i % len(STYLES)],
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axis.set_xlabel("tokens of context")
    axis.set_ylabel("relative error of the output")
    axis.legend(frameon=False, fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    _clean(axis)
    figure.suptitle(title, fontsize=9)
    _save(figure, target)


def speed(rows: list[dict[str, Any]], title: str, target: Path) -> None:
    """Time per token, time to the first token and the cache's memory, by length; a line style a batch.

    Args:
        rows: "batch", "length", and for "dense" and "ours" the fields of `timing.Timing`, or None.
    """
    panels = {
        "ms a token": ("ms", 1),
        "seconds to the first token": ("first", 1),
        "MiB of the cache": ("cache", 2**20),
    }
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    lengths = sorted({row["length"] for row in rows})
    for axis, (label, (key, unit)) in zip(axes, panels.items(), strict=True):
        for i, batch in enumerate(sorted({row["batch"] for row in rows})):
            for way, colour in (("dense", GREY), ("ours", GREEN)):
                points = [
                    (row["length"], row[way][key] / unit)
                    for row in rows
                    if row["batch"] == batch and row[way] is not None
                ]
                name = "selfindex" if way == "ours" else "dense"
                axis.plot(
                    [x for x, _ in points], [y for _, y in points], marker="o", markersize=3, color=colour,
                    linestyle=STYLES[i % len(STYLES)], label=f"{name}, batch {batch}",
                )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{n:,}" for n in lengths], fontsize=7)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("tokens of the prompt")
        axis.set_title(label, fontsize=10)
        _clean(axis)
    axes[0].legend(frameon=False, fontsize=7)
    figure.suptitle(title, fontsize=9)
    _save(figure, target)


def heatmap(found: dict[str, Any], title: str, target: Path) -> None:
    """Share of needles found over length and depth, a panel a method.

    Args:
        found: method -> length -> depth -> score.
    """
    figure, axes = plt.subplots(
        1, len(found), figsize=(2.2 * len(found) + 1, 3.4), squeeze=False, sharey=True
    )
    for axis, (method, by_length) in zip(axes[0], found.items(), strict=True):
        depths = list(next(iter(by_length.values())))
        grid = [[by_length[n][d] for n in by_length] for d in depths]
        axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(by_length)), [f"{int(n):,}" for n in by_length], fontsize=7, rotation=45)
        axis.set_yticks(range(len(depths)), [f"{float(d):.0%}" for d in depths], fontsize=7)
        axis.set_title(method, fontsize=8)
    axes[0][0].set_ylabel("depth of the needle")
    figure.colorbar(axes[0][0].images[0], ax=axes[0].tolist(), fraction=0.03)
    figure.suptitle(title, fontsize=9)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130, bbox_inches="tight")
    plt.close(figure)


BINS = 128


def selection(mass: Tensor, read: Tensor, heads: int, title: str, target: Path) -> None:
    """True attention, share of tokens read, and attention missed, by position and head.

    Args:
        mass, read: float32 [layers H, n], means over queries.
        heads: H, KV heads of a layer.
    """
    bins = min(BINS, mass.shape[1])
    at = torch.arange(mass.shape[1]) * bins // mass.shape[1]

    def binned(x: Tensor, mean: bool) -> Tensor:
        total = torch.zeros(x.shape[0], bins).index_add_(1, at, x)
        return total / torch.bincount(at, minlength=bins) if mean else total

    panels = {
        "true attention (log10 of mass)": (binned(mass, mean=False).clamp(min=1e-6).log10(), -4, 0),
        "share of tokens read": (binned(read, mean=True), 0, 1),
        "attention missed (log10 of mass)": (
            binned(mass * (1 - read), mean=False).clamp(min=1e-6).log10(), -4, 0,
        ),
    }  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(15, 2 + mass.shape[0] / 16), sharey=True)
    layers = mass.shape[0] // heads
    step = max(1, layers // 15)
    for axis, (name, (grid, low, high)) in zip(axes, panels.items(), strict=True):
        image = axis.imshow(
            grid.numpy(), vmin=low, vmax=high, aspect="auto", interpolation="nearest",
            extent=(0, mass.shape[1], mass.shape[0], 0),
        )  # fmt: skip
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("position of the token")
        figure.colorbar(image, ax=axis, fraction=0.04)
    axes[0].set_yticks([heads * i for i in range(0, layers, step)], range(0, layers, step))
    axes[0].set_ylabel(f"layer ({heads} KV heads each)")
    figure.suptitle(title, fontsize=9)
    _save(figure, target)


def draw(result: dict[str, Any], folder: Path) -> list[str]:
    """All figures of a result; returns the names of their files."""
    drawn, title = [], result["settings"]["model"]
    if result["fidelity"]:
        drawn.append("pareto.png")
        tables = {n: found["methods"] for n, found in result["fidelity"].items()}
        pareto(tables, result["settings"]["head_dim"], title, folder / drawn[-1])
    if result["layers"]:
        drawn.append("layers.png")
        length = list(result["layers"])[-1]
        layers(result["layers"][length], f"{title}, {int(length):,} tokens", folder / drawn[-1])
    if len(result["layers"]) > 1:
        drawn.append("error-by-length.png")
        error_by_length(result["layers"], title, folder / drawn[-1])
    if result["heatmap"]:
        drawn.append("needles.png")
        heatmap(result["heatmap"], title, folder / drawn[-1])
    return drawn
