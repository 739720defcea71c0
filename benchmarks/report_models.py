"""Sections of docs/performance.md about whole models; `report.py` writes the page."""

from __future__ import annotations

from typing import Any

from selfindex.config import PRESETS
from selfindex.evaluation.markdown import head, paragraph, row


def size(length: int) -> str:
    """A length in units of 1024 tokens."""
    return f"{length // 1024}k"


def latest(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by model, batch and length: of those measured twice, the one with more ways."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for each in (each for result in results for each in result["results"]):
        place = each["model"], each["batch"], each["length"]
        if len(each) >= len(found.get(place, ())):
            found[place] = each
    return [found[place] for place in sorted(found)]


def generate_section(results: list[dict[str, Any]]) -> list[str]:
    """`model.generate`, as people call it."""
    lines = ["## `model.generate`"]
    for found in (result["environment"] for result in results):
        machine = f"{found['gpu']}, torch {found['torch']}, transformers {found['transformers']}"
        lines += paragraph(f"`{found['command']}`, {found['date']}, {machine}.")
    lines += paragraph(
        "Random bf16 weights, greedy, budget 5 %, milliseconds a token (medians, from one call of the",
        "stopping criteria to the next) and seconds to the first token. *dynamic* is transformers' default;",
        '*static* its `cache_implementation="static"`, which it compiles; *compiled* SelfIndexCache with',
        "`compile=True`. The first token of short prompts is later because each layer is encoded as soon",
        "as it has run, in kernels that Python launches.",
    )
    titles = ("model", "batch x length", "dynamic", "selfindex", "ratio", "static", "compiled")
    lines += head(*titles, "first token, dynamic", "first token, selfindex")
    for each in latest(results):
        ways = ("dynamic", "selfindex", "static", "compiled")
        ms = {way: each[way]["ms"] for way in ways if each.get(way)}
        times = [f"{ms[way]:.1f}" if way in ms else "" for way in ways]
        ratio = f"{ms['dynamic'] / ms['selfindex']:.1f}" if {"dynamic", "selfindex"} <= ms.keys() else ""
        first = [f"{each[way]['first_s']:.3f}" if each.get(way) else "" for way in ("dynamic", "selfindex")]
        size_of = f"{each['batch']} x {size(each['length'])}"
        lines.append(row(each["model"], size_of, *times[:2], ratio, *times[2:], *first))
    return [*lines, ""]


def cpu_model_section(result: dict[str, Any]) -> list[str]:
    """A small model's decode steps on a CPU."""
    found = result["environment"]
    lines = ["## A whole model on a CPU"]
    lines += paragraph(
        f"`{'chrt -f 10 ' if found['real_time'] else ''}python benchmarks/cpu_model.py --output FILE`,",
        f"{found['date']}, {found['processor']}, {found['threads']} threads, {found['instruction_set']},",
        f"torch {found['torch']}. {result['model']}, one row; milliseconds per token, medians of",
        f"{result['steps']} steps of each way in turn, over caches with random content.",
        "*transformers* is its DynamicCache with SDPA, which copies the cache in every step; *in place* is",
        "SDPA on keys and values that lie in place, the strongest dense step; *selfindex*",
        "has the default budget.",
    )
    lines += head("dtype", "tokens", "transformers", "in place", "preset", "selfindex",
                  "times as fast as transformers", "as in place")  # fmt: skip
    for each in result["results"]:
        ms = each["ms"]
        dense = [f"{ms[way]:.0f}" for way in ("transformers", "in place")]
        for preset in (name for name in PRESETS if name in ms):
            ratios = [f"{ms[way] / ms[preset]:.2f}" for way in ("transformers", "in place")]
            lines.append(
                row(each["dtype"], size(each["length"]), *dense, preset, f"{ms[preset]:.0f}", *ratios)
            )
    return [*lines, ""]


def eager_section(results: list[dict[str, Any]]) -> list[str]:
    """Steps that Python launches, of a small model."""
    lines = ["## Steps that Python launches"]
    lines += paragraph(
        "Forward passes of one token, as a CPU runs them and a GPU without graphs: the shapes of",
        "SmolLM2-135M, random bf16 weights, one sequence, budget 5 %, milliseconds a step (medians).",
    )
    for result in results:
        found = result["environment"]
        lines += paragraph(
            f"`{found['command']}`, {found['date']}, {found['gpu'] or str(found['cpus']) + ' CPU cores'},",
            f"torch {found['torch']}.",
        )
        lines += head("tokens", "DynamicCache", "SelfIndexCache")
        for each in result["results"]:
            times = [f"{each[way]:.1f}" for way in ("dense", "selfindex")]
            lines.append(row(size(int(each["length"])), *times))
        lines.append("")
    return lines
