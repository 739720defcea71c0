"""The section of docs/performance.md about serving, and its figure; `report.py` writes the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from report_common import size

from selfindex.evaluation.markdown import head, paragraph, row

FIGURE = "figures/serving.png"
PARTS = {"single": "length", "saturated": "prompt", "mixed": "rate"}
"""Parts of benchmarks/serving.py, and what tells their rows apart."""
STYLES = ("-", "--", ":", "-.")
Results = list[dict[str, Any]]


def merged(found: Results) -> dict[str, dict[str, Any]]:
    """By cache, what all files say together; of what was measured twice, the later."""
    together: dict[str, dict[str, Any]] = {}
    for result in sorted(found, key=lambda result: result["environment"]["date"]):
        for name, each in result["results"].items():
            cache = together.setdefault(name, {part: {} for part in PARTS})
            cache |= {key: value for key, value in each.items() if key not in PARTS}
            for part, key in PARTS.items():
                cache[part] |= {one[key]: one for one in each.get(part, ())}
    return {
        name: cache | {part: [cache[part][key] for key in sorted(cache[part])] for part in PARTS}
        for name, cache in together.items()
    }


def serving_section(found: Results) -> list[str]:
    """VLLM with this cache and with its own."""
    lines = ["## Serving with vLLM"]
    for result in found:
        machine = result["environment"]
        failed = f"Failed: {', '.join(result['failed'])}." if result["failed"] else ""
        where = f"{machine['date']}, {machine['device']}, torch {machine['torch']}."
        lines += paragraph(command(result["settings"]), where, failed)
    lines += paragraph(
        "Llama-3.1-8B's shapes, random bf16 weights, budget 5 %, prompts in chunks of 8,192 tokens,",
        "decode steps as CUDA graphs without torch.compile; baselines use FlashAttention 3. Prompts share no",
        "prefix, and prefix caching is off. Capacity is what the engine counts; one request: the best of",
        "three.",
    )
    caches = merged(found)
    return [*lines, *single_table(caches), *saturated_table(caches), *mixed_table(caches)]


def command(settings: dict[str, Any]) -> str:
    """What was run, with the options that say what was measured."""
    names = ("caches", "parts", "lengths", "saturate", "mixed", "most", "fill_seconds")
    words = []
    for name in (name for name in names if name in settings):
        value = settings[name]
        given = " ".join(map(str, value)) if isinstance(value, list) else f"{value:g}"
        words.append(f"--{name.replace('_', '-')} {given}")
    return f"`python benchmarks/serving.py {' '.join(words)} --output FILE`,"


def single_table(caches: dict[str, dict[str, Any]]) -> list[str]:
    """Capacity, and a request alone."""
    lengths = sorted({one["length"] for cache in caches.values() for one in cache["single"]})
    titles = [f"{size(length)}: first token, ms | ms a token" for length in lengths]
    lines = head("cache", "vLLM", "capacity, tokens", *" | ".join(titles).split(" | "))
    for name, cache in caches.items():
        by_length = {one["length"]: one for one in cache["single"]}
        numbers = [
            f"{by_length[length][what]:.{digits}f}" if length in by_length else ""
            for length in lengths
            for what, digits in (("first_ms", 0), ("step_ms", 2))
        ]
        held = f"{cache['capacity']:,}" if "capacity" in cache else ""
        lines.append(row(name, cache["vllm"], held, *numbers))
    return [*lines, ""]


def saturated_table(caches: dict[str, dict[str, Any]]) -> list[str]:
    """Many requests at once."""
    rows = [(name, many) for name, cache in caches.items() for many in cache["saturated"]]
    if not rows:
        return []
    lines = paragraph(
        "As many requests at once as fit, unless their number is less than that: then it was limited, or",
        "their prompts took too long to read. Decoding is timed while all of them decode.",
    )
    lines += head("prompt", "cache", "requests", "that fit", "ms a step", "tokens/s decoding",
                  "prompt tokens/s before")  # fmt: skip
    for name, many in sorted(rows, key=lambda pair: pair[1]["prompt"]):
        fit, read = (f"{many[key]:,.0f}" if key in many else "" for key in ("fit", "prompt_tokens_per_s"))
        step, rate = f"{many['step_ms']:.1f}", f"{many['decode_tokens_per_s']:,.0f}"
        lines.append(row(size(many["prompt"]), name, many["requests"], fit, step, rate, read))
    figure = [f"![Tokens/s against requests in flight]({FIGURE})", ""] if flights(caches) else []
    return [*lines, "", *figure]


def mixed_table(caches: dict[str, dict[str, Any]]) -> list[str]:
    """Requests that come at random."""
    rows = [(name, one) for name, cache in caches.items() for one in cache["mixed"]]
    if not rows:
        return []
    low, high = (size(length) for length in rows[0][1]["lengths"])
    lines = paragraph(
        f"A mixed load, `vllm bench serve` against `vllm serve`: Poisson arrivals, prompts of {low} to",
        f"{high} tokens (uniform), {rows[0][1]['new']} new ones each. Milliseconds, median and 99th",
        "percentile.",
    )
    lines += head("requests/s", "cache", "requests", "first token", "p99", "between tokens", "p99",
                  "tokens/s")  # fmt: skip
    for name, one in sorted(rows, key=lambda pair: pair[1]["rate"]):
        first, between = (
            [f"{x:,.{digits}f}" for x in one[key]] for key, digits in (("ttft_ms", 0), ("itl_ms", 1))
        )
        lines.append(
            row(f"{one['rate']:g}", name, one["completed"], *first, *between, f"{one['tokens_per_s']:.0f}")
        )
    return [*lines, ""]


def flights(caches: dict[str, dict[str, Any]]) -> list[tuple[str, int, Results]]:
    """(cache, prompt, tokens/s by requests in flight)."""
    return [
        (name, many["prompt"], many["flight"])
        for name, cache in caches.items()
        for many in cache["saturated"]
        if many.get("flight")
    ]


def draw_serving(found: Results, docs: Path) -> None:
    """Tokens/s against requests in flight: a colour for each cache, a dash for each length."""
    lines = flights(merged(found))
    if not lines:
        return
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    caches, lengths = (list(dict.fromkeys(line[i] for line in lines)) for i in (0, 1))
    for name, prompt, rows in lines:
        rows = sorted(rows, key=lambda one: one["requests"])
        style = {"color": f"C{caches.index(name)}", "linestyle": STYLES[sorted(lengths).index(prompt) % 4]}
        axis.plot([one["requests"] for one in rows], [one["tokens_per_s"] for one in rows], marker="o",
                  markersize=3, label=f"{name}, {size(prompt)}", **style)  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("requests in flight")
    axis.set_ylabel("tokens/s, all decoding")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(docs / FIGURE, dpi=130)
