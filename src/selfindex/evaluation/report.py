"""The evaluation as Markdown."""

from __future__ import annotations

from typing import Any

from .markdown import head, row

OURS = "selfindex balanced 5"


def number(x: float, digits: int = 3) -> str:
    """Without the zero before the point."""
    text = f"{x + 0.0:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(x) < 1 and not text.startswith(("1", "-1")) else text


def interval(values: list[float], digits: int = 3) -> str:
    """Estimate and 95 % interval."""
    middle, low, high = (number(x, digits) for x in values)
    return f"{middle} [{low}, {high}]"


def bold(name: str) -> str:
    """The default preset stands out."""
    return f"**{name}**" if name.startswith(OURS) else name


def fidelity_table(found: dict[str, Any]) -> list[str]:
    """One length: a row a method, by KL."""
    lines = head("method", "bytes a token", "read a step", "KL to dense", "worst text", "top-1 agreement",
                 "perplexity")  # fmt: skip
    for name, own in sorted(found["methods"].items(), key=lambda item: item[1]["kl"][0]):
        sizes = f"{own['bytes']:.1f}", f"{own['read']:.1f}"
        kl = interval(own["kl"]), number(max(own["kl_by_text"]))
        lines.append(row(bold(name), *sizes, *kl, interval(own["top1"]), f"{own['perplexity']:.2f}"))
    return [*lines, ""]


def layer_table(found: dict[str, Any]) -> list[str]:
    """One length: a row a method, by error."""
    lines = head("method", "softmax mass read", "worst head", "output error", "worst head",
                 "oracle's tokens read")  # fmt: skip
    for name, own in sorted(found.items(), key=lambda item: item[1]["error"]["mean"]):
        cells = [own[metric][kind] for metric in ("mass", "error") for kind in ("mean", "worst")]
        lines.append(row(bold(name), *map(number, cells), number(own["overlap"]["mean"])))
    return [*lines, ""]


def task_table(tasks: dict[str, Any]) -> list[str]:
    """One length: a row a method, a column a task the dense model can do; and what it cannot do."""
    known = {name: rows for name, rows in tasks.items() if len(rows) > 1}
    failed = {name: rows["dense"] for name, rows in tasks.items() if name not in known}
    lines: list[str] = []
    methods = [m for m in next(iter(known.values()), {}) if all(m in rows for rows in known.values())]
    if known:
        lines = head("method", *known, "mean")
        means = {m: sum(rows[m]["score"][0] for rows in known.values()) / len(known) for m in methods}
        for method in sorted(methods, key=lambda m: -means[m]):
            cells = [interval(rows[method]["score"], 2) for rows in known.values()]
            lines.append(row(bold(method), *cells, number(means[method], 2)))
        samples = sorted({rows[m]["samples"] for rows in known.values() for m in methods})
        lines += ["", f"{' to '.join(map(str, samples[:: max(1, len(samples) - 1)]))} samples a task."]
    if failed:
        scores = ", ".join(f"{name} {interval(own['score'], 2)}" for name, own in failed.items())
        lines += ["", f"The dense model itself fails: {scores}. Nothing can be said about caches there."]
    return [*lines, ""]


def heat_table(found: dict[str, Any]) -> list[str]:
    """Mean over depths; the figure shows the rest."""
    lengths = list(next(iter(found.values())))
    lines = head("needles found", *(f"{int(n):,} tokens" for n in lengths))
    for method, by_length in found.items():
        cells = [number(sum(by_length[n].values()) / len(by_length[n]), 2) for n in lengths]
        lines.append(row(bold(method), *cells))
    return [*lines, ""]


def report(result: dict[str, Any], figures: list[str]) -> str:
    """A page with every part that was measured."""
    environment = result["environment"]
    machine = environment["gpu"] or f"{environment['cpus']} CPU cores"
    lines = [
        f"# Quality of {result['settings']['model']}",
        "",
        f"`{environment['command']}`, {environment['date']}, {machine}, torch {environment['torch']}, "
        f"transformers {environment['transformers']}. Brackets are 95 % bootstrap intervals.",
        "",
    ]
    sections = {
        "fidelity": ("Fidelity to the dense model", fidelity_table),
        "layers": ("Attention, layer by layer", layer_table),
        "tasks": ("Tasks", task_table),
    }
    for part, (title, table) in sections.items():
        for length, found in result[part].items():
            lines += [f"## {title}, {int(length):,} tokens", "", *table(found)]
    if result["heatmap"]:
        lines += ["## Needles over length and depth", "", *heat_table(result["heatmap"])]
    lines += [f"![{name}]({name})\n" for name in figures]
    return "\n".join(lines).rstrip() + "\n"
