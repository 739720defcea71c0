"""The evaluation as Markdown."""

from __future__ import annotations

from typing import Any

from .markdown import head, paragraph, row
from .methods import PREFILL, STRESS
from .tasks import GROUPS

OURS = "selfindex balanced 5"


def where(result: dict[str, Any]) -> str:
    """Of a heading: where the questions stand, unless after the document."""
    return ", the question in the prompt" if result["settings"].get("asked") == "prompt" else ""


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
    other = name.endswith(STRESS) or PREFILL in name
    return f"**{name}**" if name.startswith(OURS) and not other else name


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


WIDE = 7
"""Tasks from which on a table gives their scores without intervals."""


def task_tables(tasks: dict[str, Any], means: dict[str, Any] | None = None) -> list[str]:
    """One length: a table a group of tasks, a row a method; and what the dense model cannot do.

    Args:
        tasks: task -> method -> samples and score.
        means: group -> method -> mean and what it is less than dense's; None where that is not known.
    """
    known = {name: rows for name, rows in tasks.items() if len(rows) > 1}
    failed = {name: rows["dense"] for name, rows in tasks.items() if name not in known}
    lines: list[str] = []
    left = dict(known)
    groups = (
        {}
        if means is None
        else {name: [t for t in members if t in known] for name, members in GROUPS.items()}
    )
    for group, members in groups.items():
        if members:
            table = {name: left.pop(name) for name in members}
            lines += [*_task_table(table, (means or {}).get(group, {})), ""]
    if left:
        lines += [*_task_table(left, {}), ""]
    if failed:
        scores = ", ".join(f"{name} {interval(own['score'], 2)}" for name, own in failed.items())
        lines += [f"The dense model itself fails: {scores}. Nothing can be said about caches there.", ""]
    return lines


def _task_table(tasks: dict[str, Any], means: dict[str, Any]) -> list[str]:
    methods = [m for m in next(iter(tasks.values())) if all(m in rows for rows in tasks.values())]
    values = {m: [rows[m]["score"][0] for rows in tasks.values() if "score" in rows[m]] for m in methods}
    plain = {m: sum(own) / len(tasks) for m, own in values.items() if len(own) == len(tasks)}
    sizes = all("read" in own for rows in tasks.values() for m in plain for own in [rows[m]])
    columns = ["method", *(["bytes a token", "read a step"] if sizes else []), *tasks]
    lines = head(*columns, "mean", *(["less than dense"] if means else []))
    for method in sorted(methods, key=lambda m: -plain.get(m, -1)):
        first = next(iter(tasks.values()))[method]
        cells = [f"{first[key]:.1f}" if key in first else "" for key in ("bytes", "read")] if sizes else []
        cells += [_task_cell(rows[method], len(tasks) > WIDE) for rows in tasks.values()]
        own = means.get(method)
        cells.append(interval(own["mean"], 3) if own else number(plain[method], 2) if method in plain else "")
        if means:
            cells.append(interval(own["less"], 3) if own else "")
        lines.append(row(bold(method), *cells))
    exact = [name for name, rows in tasks.items() if any("exact" in rows[m] for m in plain)]
    samples = sorted({rows[m]["samples"] for rows in tasks.values() for m in plain})
    lines += ["", f"{' to '.join(map(str, samples[:: max(1, len(samples) - 1)]))} samples a task."]
    for name in exact:
        hits = ", ".join(f"{m} {number(tasks[name][m]['exact'][0], 2)}" for m in plain)
        lines += ["", f"Exactly right in {name}: {hits}."]
    return lines


def _task_cell(own: dict[str, Any], short: bool) -> str:
    if "score" not in own:
        return str(own["failed"])
    return number(own["score"][0], 2) if short else interval(own["score"], 2)


def batch_table(found: dict[str, Any]) -> list[str]:
    """Scores with one prompt at a time and with several, and how many replies are the same."""
    lines = head("task", "method", "samples", "score alone", "score together", "same replies")
    for task, rows in found.items():
        for method, own in rows.items():
            cells = [number(own[key], 2) for key in ("score", "together", "same")]
            lines.append(row(task, bold(method), own["samples"], *cells))
    return [*lines, ""]


def heat_table(found: dict[str, Any]) -> list[str]:
    """Mean over depths; the figure shows the rest."""
    lengths = list(next(iter(found.values())))
    lines = head("needles found", *(f"{int(n):,} tokens" for n in lengths))
    for method, by_length in found.items():
        cells = [number(sum(by_length[n].values()) / len(by_length[n]), 2) for n in lengths]
        lines.append(row(bold(method), *cells))
    return [*lines, ""]


def not_measured(result: dict[str, Any]) -> list[str]:
    """What has no row, and why."""
    why = [f"{name}: {reason}" for name, reason in result.get("unavailable", {}).items()]
    why += result.get("failed", [])
    return paragraph(f"Not measured: {'; '.join(why)}.") if why else []


def report(result: dict[str, Any], figures: list[str]) -> str:
    """A page with every part that was measured."""
    environment = result["environment"]
    machine = environment["gpu"] or f"{environment['cpus']} CPU cores"
    lines = [
        f"# Quality of {result['settings']['model']}",
        "",
        f"`{environment['command']}`, {environment['date']}, {machine}, torch {environment['torch']}, "
        f"transformers {environment['transformers']}. Brackets are 95 % intervals: "
        "Wilson's for single tasks, else the bootstrap's.",
        "",
    ]
    sections = {
        "fidelity": ("Fidelity to the dense model", fidelity_table),
        "layers": ("Attention, layer by layer", layer_table),
    }
    for part, (title, table) in sections.items():
        for length, found in result[part].items():
            lines += [f"## {title}, {int(length):,} tokens", "", *table(found)]
    for length, found in result["tasks"].items():
        title = f"Tasks, {int(length):,} tokens{where(result)}"
        lines += [f"## {title}", "", *task_tables(found, result["means"][length])]
    if result["batches"]:
        lines += ["## One prompt at a time or several", "", *batch_table(result["batches"])]
    if result["heatmap"]:
        lines += ["## Needles over length and depth", "", *heat_table(result["heatmap"])]
    lines += not_measured(result)
    lines += [f"![{name}]({name})\n" for name in figures]
    return "\n".join(lines).rstrip() + "\n"
