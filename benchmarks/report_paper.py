"""The section of docs/performance.md about the published system; `report.py` writes the page."""

from __future__ import annotations

from typing import Any

from report_common import Result, size

from selfindex.evaluation.markdown import head, paragraph, row

WAYS = ("dense", "paper", "balanced")
STATED = {
    "attention": "6 to 7 times as fast as FlashAttention-2",
    "cache": "about a fifth of the memory",
    "steps": "up to 2 times as fast",
    "second": "about 5 % later",
}
"""Figures of arXiv 2603.14224, of its own kernels on its own GPU."""


def paper_section(results: list[Result]) -> list[str]:
    """What the paper measured, of both presets, beside its figures."""
    if not results:
        return []
    lines = ["## The experiments of the paper"]
    for result in results:
        found, parts = result["environment"], result["parts"]
        commands = dict.fromkeys(command for part in parts.values() for command in part["commands"])
        machine = f"{found['date']}, {found['device']}, torch {found['torch']}, CUDA {found['cuda']}."
        lines += paragraph(", ".join(f"`{command}`" for command in commands) + f", {machine}")
        lines += paragraph(
            f"Llama-3.1-8B's shapes, {result['layers']} layers, random bf16 weights, 5 % budget. The preset",
            "`paper` is the published system on kernels of this package.",
        )
        for name, section in (("attention", _attention), ("steps", _steps), ("second", _second)):
            if name in parts:
                lines += [*section(parts[name]["results"]), ""]
        lines += [*_figures(parts), ""]
    return lines


def _attention(rows: list[Result]) -> list[str]:
    lines = paragraph("Attention of a decode step in one layer, microseconds (see above for what it covers):")
    lines += head("batch x length", "FlashAttention-2", "cuDNN", "paper", "balanced",
                  "paper, times as fast as FlashAttention-2", "as the better", "balanced, times as fast as "
                  "FlashAttention-2", "as the better")  # fmt: skip
    for found in rows:
        dense, cells = found["dense"], []
        for way in ("paper", "balanced"):
            call = found[way]["call"]
            cells += [f"{dense['flash'] / call:.2f}", f"{min(dense.values()) / call:.2f}"]
        times = [dense["flash"], dense.get("cudnn"), found["paper"]["call"], found["balanced"]["call"]]
        lines.append(row(_size(found), *(_number(time, 0) for time in times), *cells))
    return lines


def _steps(rows: list[Result]) -> list[str]:
    lines = paragraph(
        "A decode step of the whole model, milliseconds; gigabytes of the cache, and at the peak with the",
        "weights. Dense is the better of both kernels in a captured graph.",
    )
    lines += head("batch x length", *WAYS, "paper, ratio", "balanced, ratio",
                  *(f"{what}, {way}" for what in ("cache", "peak") for way in WAYS))  # fmt: skip
    for found in rows:
        ms = [_of(found, way, "ms") for way in WAYS]
        cells = [*(_number(time, 2) for time in ms), *(_number(_ratio(ms[0], own), 2) for own in ms[1:])]
        for what in ("cache_gb", "peak_gb"):
            cells += [_number(_of(found, way, what), 1) for way in WAYS]
        lines.append(row(_size(found), *cells))
    return lines


def _second(rows: list[Result]) -> list[str]:
    lines = paragraph(
        "Time to the second token of `model.generate`: the prompt, its encoding and a step, seconds;",
        "gigabytes at the peak with the weights. Dense is transformers' DynamicCache.",
    )
    lines += head("prompt", *WAYS, "paper, later by", "balanced, later by", *(f"peak, {way}" for way in WAYS))
    for found in rows:
        times = [_of(found, way, "second_s") for way in WAYS]
        more = [_ratio(own, times[0]) for own in times[1:]]
        cells = [*(_number(time, 3) for time in times), *("" if x is None else f"{x - 1:.1%}" for x in more)]
        peaks = [_number(_of(found, way, "peak_gb"), 1) for way in WAYS]
        lines.append(row(size(found["length"]), *cells, *peaks))
    return lines


def _figures(parts: dict[str, Any]) -> list[str]:
    """The figures that the paper states beside those of the preset `paper` here."""

    def ratios(part: str, top: Any, bottom: Any) -> list[tuple[float, str]]:
        rows = parts[part]["results"] if part in parts else []
        known = [(_ratio(top(found), bottom(found)), _size(found)) for found in rows]
        return [(value, name) for value, name in known if value is not None]

    found = {
        "attention": ratios("attention", lambda x: x["dense"]["flash"], lambda x: x["paper"]["call"]),
        "cache": ratios(
            "steps", lambda x: _of(x, "dense", "cache_gb"), lambda x: _of(x, "paper", "cache_gb")
        ),
        "steps": ratios("steps", lambda x: _of(x, "dense", "ms"), lambda x: _of(x, "paper", "ms")),
        "second": ratios(
            "second", lambda x: _of(x, "paper", "second_s"), lambda x: _of(x, "dense", "second_s")
        ),
    }
    texts = {
        "attention": ("attention of a decode step", "{:.1f} to {:.1f} times as fast as FlashAttention-2"),
        "cache": ("cache", "dense takes {:.1f} to {:.1f} times as much"),
        "steps": ("a decode step, end to end", "{:.2f} to {:.2f} times as fast"),
        "second": ("time to the second token", "{:.2f} to {:.2f} times that of dense"),
    }
    lines = paragraph(
        "Figures that the paper states (arXiv 2603.14224; its kernels, its GPU, which we do not know, and",
        "its baselines) beside those of the preset `paper` in the tables above:",
    )
    lines += head("", "the paper", "here")
    for name, values in found.items():
        if values:
            what, text = texts[name]
            (low, first), (high, last) = min(values), max(values)
            lines.append(row(what, STATED[name], f"{text.format(low, high)} ({first}, {last})"))
    return lines


def _of(found: Result, way: str, what: str) -> float | None:
    """A number of one way, None if it ran out of memory."""
    return found[way] and found[way][what]


def _ratio(top: float | None, bottom: float | None) -> float | None:
    return None if top is None or bottom is None else top / bottom


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _size(found: Result) -> str:
    return f"{found['batch']} x {size(found['length'])}"
