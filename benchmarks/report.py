"""Write docs/performance.md and its figure from the committed results of the benchmarks.

python benchmarks/report.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from report_common import size, where
from report_models import (
    compiled_section,
    cpu_model_section,
    eager_section,
    end_section,
    generate_section,
)
from report_operators import budget_section, decode_section, draw, encode_section
from report_paper import paper_section
from report_serving import draw_serving, serving_section

from selfindex.evaluation.markdown import head, paragraph, row

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict[str, Any]:
    """A committed result."""
    return json.loads((RESULTS / name).read_text())


def load_all(name: str) -> list[dict[str, Any]]:
    """Committed results of one benchmark, of every preset and machine."""
    return [load(path.name) for path in sorted(RESULTS.glob(f"{name}-*.json"))]


def offload_section(result: dict[str, Any]) -> list[str]:
    """The payload in host memory."""
    here, direct, there = (result[name] for name in ("resident", "direct", "offloaded"))
    budgets = " ".join(f"{x['budget']:g}" for x in here["budgets"])
    lines = ["## Payload in host memory (`offloading=True`)"]
    lines += paragraph(
        where(result, f"python benchmarks/offload.py --budgets {budgets} --output FILE"),
        f"{result['model']}, one sequence of {size(result['length'])} random tokens, which as 16-bit keys",
        f"and values would take {result['dense_gb']:.0f} GB. All on the GPU the cache takes",
        f"{here['gpu_gb']:.1f} GB, offloaded {there['gpu_gb']:.1f} GB there and {there['host_gb']:.1f} GB of",
        f"pinned host memory (filled in {there['fill_s']:.0f} s); recently selected tokens are on the GPU as",
        f"well, {there['gpu_gb'] - direct['gpu_gb']:.1f} GB of them. A copy from pinned memory moves",
        f"{result['copy_gb_per_s']:.1f} GB/s, a kernel that reads all of it",
        f"{result['mapped_gb_per_s']:.1f} GB/s. Attention is the operators of all layers, milliseconds;",
        "`direct` reads every selected token from host memory. Queries drift from step to step (cosine in",
        "the second column), so that a share of the selected tokens is missing on the GPU and crosses",
        f"the bus, {result['token_bytes']} bytes each.",
    )
    lines += head("tokens selected", "drift", "attention, on the GPU", "direct", "offloaded", "missing",
                  "MB over the bus")  # fmt: skip
    steps = []
    for rows in zip(here["budgets"], direct["budgets"], there["budgets"], strict=True):
        for each in zip(*(x["attention"] for x in rows), strict=True):
            missing = each[2]["misses"]
            times = [f"{x['ms']:.1f}" for x in each]
            crossed = missing * rows[2]["bytes_if_all_miss"] / 1e6
            lines.append(
                row(rows[2]["selected"], each[2]["keep"], *times, f"{missing:.1%}", f"{crossed:.0f}")
            )
        times = [f"{x['step']['ms']:.1f}" for x in rows]
        steps.append(
            f"{times[0]} ms on the GPU, {times[1]} direct and {times[2]} offloaded for {rows[2]['selected']} "
            f"tokens ({rows[2]['step']['misses']:.1%} missing)"
        )
    lines += [
        "",
        *paragraph("A step of the whole model, the same token over and over:", "; ".join(steps) + "."),
    ]
    return lines


def cpu_section(result: dict[str, Any]) -> list[str]:
    """A decode step's attention on a CPU."""
    found = result["environment"]
    lines = [f"## On a CPU, {found['instruction_set']}"]
    lines += paragraph(
        f"`python benchmarks/cpu_decode.py --output FILE`, {found['date']}, {found['processor']},",
        f"{found['threads']} threads, {found['instruction_set']}, torch {found['torch']}.",
        "One row, 32 query heads, 8 KV heads, 5 % budget (at least",
        f"{result['shape']['min_tokens']:,} tokens).",
        "Microseconds; SDPA is the better of grouped heads and of query heads as rows of their KV head.",
    )
    lines += head("head_dim", "dtype", "tokens", "preset", "SDPA", "sparse", "times as fast")
    for each in result["results"]:
        times = f"{each['dense']:.0f}", f"{each['sparse']:.0f}", f"{each['ratio']:.1f}"
        lines.append(row(each["dim"], each["dtype"], f"{each['length'] // 1024}k", each["preset"], *times))
    return [*lines, ""]


def chunk_section(result: dict[str, Any]) -> list[str]:
    """New tokens that attend to each other in a later turn."""
    found, shape = result["environment"], result["shape"]
    machine = found["gpu"] or f"{found['threads']} CPU threads"
    lines = [f"## A long chunk after the first, {machine}"]
    lines += paragraph(
        f"`{found['command']}`, {found['date']}, {machine}, torch {found['torch']}. The exact part",
        f"of a chunk ({shape['query_heads']} / {shape['kv_heads']} heads of {shape['head_dim']},",
        f"{shape['held']} held tokens) against the faster of two ways to have SDPA compute the same:",
        "milliseconds and memory.",
    )
    lines += head("dtype", "new tokens", "exact part, ms", "MiB", "SDPA, ms", "MiB", "ratio")
    for each in result["results"]:
        best = min(("masked", "aligned"), key=each["seconds"].__getitem__)
        numbers = [
            text
            for way in ("exact", best)
            for text in (f"{1e3 * each['seconds'][way]:.2f}", f"{each['bytes'][way] / (1 << 20):.0f}")
        ]
        lines.append(row(each["dtype"], f"{each['new']:,}", *numbers, f"{each['ratio']:.2f}"))
    return [*lines, ""]


def chunk_prefix_section(result: dict[str, Any]) -> list[str]:
    """A long chunk's attention to an encoded prefix."""
    settings = result["settings"]
    lines = ["## A long chunk over an encoded prefix"]
    lines += paragraph(
        where(result, f"python benchmarks/chunk_prefix.py --preset {settings['preset']} --output FILE"),
        f"32 query heads, 8 KV heads of 128, bf16, batch {settings['rows']}, `{settings['preset']}`.",
        "Milliseconds of one layer: pages decoded in registers by `dense_attend`, decoded to memory once",
        "for PyTorch's kernel, merging included, and the fastest dense kernel over bf16 keys and values.",
    )
    lines += head("queries x prefix", "in registers", "to memory", "best dense", "in times of it")
    for found in result["results"]:
        name, best = min(found["dense"].items(), key=lambda each: each[1])
        times = f"{found['place']:.2f}", f"{found['memory']:.2f}", f"{best:.2f} ({name})"
        shape = f"{found['queries']} x {size(found['tokens'])}"
        lines.append(row(shape, *times, f"{found['ratio']:.2f}"))
    return [*lines, ""]


def main() -> None:
    """Write the page and the figure."""
    decode = load_all("decode_attention")
    whole = load_all("end_to_end")
    lines = ["# Performance", ""]
    lines += paragraph(
        "Written by `python benchmarks/report.py` from benchmarks/results/ and benchmarks/notes.md.",
        "Every section ran in one go on the machine it names.",
    )
    lines += decode_section(decode)
    lines += budget_section(load_all("decode_budget"))
    lines += paper_section(load_all("paper"))
    lines += generate_section(load_all("generate"))
    serving = load_all("serving")
    lines += serving_section(serving)
    lines += end_section([result for result in whole if not result["compiled"]])
    lines += compiled_section([result for result in whole if result["compiled"]])
    lines += encode_section(load_all("encode"))
    lines += chunk_section(load("chunk-h200.json")) + chunk_section(load("chunk-cpu.json"))
    for result in load_all("chunk_prefix"):
        lines += chunk_prefix_section(result)
    lines += [line for result in load_all("offload") for line in offload_section(result)]
    for result in load_all("cpu_decode"):
        lines += cpu_section(result)
    for result in load_all("cpu_model"):
        lines += cpu_model_section(result)
    lines += eager_section(load_all("eager_step"))
    lines += (ROOT / "benchmarks" / "notes.md").read_text().splitlines()
    (ROOT / "docs" / "performance.md").write_text("\n".join(lines).rstrip() + "\n")
    draw(decode, ROOT / "docs")
    draw_serving(serving, ROOT / "docs")


if __name__ == "__main__":
    main()
