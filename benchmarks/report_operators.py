"""Sections of docs/performance.md about the operators on a GPU; `report.py` writes the page."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from report_common import Result, by_machine, in_turn, lengths, preset, preset_option, size, where

from selfindex.codec import PageFormat
from selfindex.evaluation.markdown import head, paragraph, row

FIGURE = "figures/decode.png"
PAGE = 128


def decode_section(results: list[Result]) -> list[str]:
    """The decode operator against dense attention."""
    lines = ["## Decode attention"]
    lines += paragraph(
        "32 query heads, 8 KV heads, head_dim 128, bf16, 5 % budget. Microseconds per layer, medians of",
        "CUDA-graph replays over rotating inputs; dense is the best of PyTorch's flash and cuDNN kernels in",
        "the same run. The sparse call covers scoring, exact selection, attention to the selected tokens and",
        "the combine; the full-precision window is not in it. Stages are timed alone and overlap in a call.",
    )
    for machine in by_machine(results):
        for result in machine:
            command = f"python benchmarks/decode_attention.py --lengths {lengths(result)}"
            copy = f"A device copy moved {result['copy_tb_per_s']:.2f} TB/s."
            lines += paragraph(where(result, f"{command}{preset_option(result)} --output FILE"), copy)
        lines += head("batch x length", "preset", "dense", "sparse", "ratio", "score + select",
                      "index, TB/s", "attend")  # fmt: skip
        for result, found in in_turn(machine):
            stages, batch, length = found["sparse"], found["batch"], found["length"]
            plane = PageFormat.parse(result["format"]).index_bytes
            lines.append(
                row(
                    f"{batch} x {size(length)}",
                    preset(result),
                    f"{found['dense_best']:.0f} ({found['dense_kernel']})",
                    f"{stages['call']:.0f}",
                    f"{found['ratio']:.2f}",
                    f"{stages['decode']:.1f}",
                    f"{batch * length / PAGE * plane / stages['decode'] / 1e6:.2f}",
                    f"{stages['attend']:.1f}",
                )
            )
        lines += ["", *stage_table(machine)]
        for result in machine:
            crossings = ", ".join(
                f"batch {batch}: {'nowhere' if length is None else size(length)}"
                for batch, length in result["crossover"].items()
            )
            lines += paragraph(
                "Shortest measured length from which on sparse is never slower,",
                f"`{preset(result)}`: {crossings}.",
            )
    return [*lines, f"![Decode attention, times as fast as dense]({FIGURE})", ""]


def budget_section(results: list[Result]) -> list[str]:
    """What it costs to read more tokens."""
    lines = ["## Decode attention by the tokens that it reads"]
    lines += paragraph(
        "As above, in one process after the other. By default a step reads 5 % of the tokens, at least",
        "1,024. Tables of steps on a GPU, here and below, were measured when that was at least 128, which",
        "makes a difference up to 20k tokens: at most what the second column of times is slower than the",
        "first.",
    )
    shape = results[0]["shape"]
    command = f"python benchmarks/decode_attention.py --batches 1 8 --lengths {lengths(results[0])}"
    options = f"--budget {shape['budget']} --min-tokens {shape['min_tokens']} --output FILE"
    lines += paragraph(where(results[0], f"{command} {options}"), "Microseconds.")
    names = (f"{own['shape']['budget']:.0%}, at least {own['shape']['min_tokens']:,}" for own in results)
    lines += head("batch x length", "dense", *names)
    for rows in zip(*(own["results"] for own in results), strict=True):
        dense = min(each["dense_best"] for each in rows)
        times = (f"{each['sparse']['call']:.1f}" for each in rows)
        lines.append(row(f"{rows[0]['batch']} x {size(rows[0]['length'])}", f"{dense:.1f}", *times))
    return [*lines, ""]


def stage_table(machine: list[Result]) -> list[str]:
    """What the stages have to read, and the time that would take at the bandwidth of dense attention."""
    lines = paragraph(
        "What the stages have to read at least (the index of all tokens; codes, magnitudes, values and",
        "scales of the selected ones), the time that takes at the bandwidth which dense attention reaches at",
        "the same size, and the time they take:",
    )
    lines += head("batch x length", "preset", "stage", "MB", "at dense's bandwidth, us", "takes, us")
    for result, found in in_turn(machine):
        batch, length = found["batch"], found["length"]
        if length != 128 << 10 or batch not in (1, 8):
            continue
        fmt, shape = PageFormat.parse(result["format"]), result["shape"]
        # Of a token: its signs and payload; with `balanced` also the scale in the index.
        token = fmt.head_dim // 8 + fmt.payload_bytes // (fmt.kv_heads * PAGE) + (fmt.preset == "balanced")
        dense = 4 * batch * shape["kv_heads"] * length * shape["head_dim"]
        selected = batch * shape["kv_heads"] * shape["budget"] * length
        read = {"decode": batch * length / PAGE * fmt.index_bytes, "attend": selected * token}
        for stage, name in (("decode", "score + select"), ("attend", "attend")):
            least = read[stage] / dense * found["dense_best"]
            what = f"{batch} x {size(length)}", fmt.preset, name, f"{read[stage] / 1e6:.1f}"
            lines.append(row(*what, f"{least:.1f}", f"{found['sparse'][stage]:.1f}"))
    return [*lines, ""]


def encode_section(results: list[Result]) -> list[str]:
    """Encoding, and attention to the whole encoded prefix."""
    lines = ["## Encoding, and attention to everything"]
    lines += paragraph(
        "One layer. Encoding a prompt in one call, as the store does it, against the causal attention of the",
        "same prompt; `paper` also takes statistics of the prompt and chooses the tokens that it pins.",
    )
    for machine in by_machine(results):
        for result in machine:
            command = f"python benchmarks/encode.py{preset_option(result)} --output FILE"
            lines += paragraph(where(result, command))
        lines += head("prompt", "preset", "encode, ms", "statistics, ms", "pinned tokens, ms",
                      "dense attention, ms", "share")  # fmt: skip
        for result, found in in_turn(machine, "prompt"):
            parts = [found.get(name) for name in ("encode_one_call", "statistics", "pinned")]
            best, spent = min(found["dense"].values()), sum(part or 0 for part in parts)
            times = ["" if part is None else f"{part / 1e3:.2f}" for part in parts]
            name = size(found["length"]), preset(result)
            lines.append(row(*name, *times, f"{best / 1e3:.1f}", f"{spent / best:.2%}"))
        lines.append("")
        for result in machine:
            step = result["decode"]
            lines += paragraph(
                f"Encoding a page of `{preset(result)}` takes {step['page']:.1f} us once in 128 steps:",
                f"{step['share']:.2%} of a dense decode step at {size(step['length'])}.",
            )
        lines += paragraph(
            "`dense_attend` (a chunk of new queries, or a step below the length where selection pays)",
            "against dense attention to a 16-bit prefix, microseconds:",
        )
        lines += head("queries x prefix", "preset", "dense_attend", "best dense", "times as fast")
        for result, found in in_turn(machine, "dense_attend"):
            name = f"{found['queries']} x {size(found['length'])}", preset(result)
            best = min(found["dense"].values())
            lines.append(row(*name, f"{found['dense_attend']:.0f}", f"{best:.0f}", f"{found['ratio']:.2f}"))
        lines.append("")
    return lines


def draw(results: list[Result], folder: Path) -> None:
    """Speed over dense against the length, one line a batch size and preset, of the newest machine."""
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    machine = by_machine(results)[0]
    known = sorted({found["length"] for result in machine for found in result["results"]})
    for result in machine:
        name, style = (" paper", "s--") if preset(result) == "paper" else ("", "o-")
        for i, batch in enumerate(sorted({found["batch"] for found in result["results"]})):
            rows = [found for found in result["results"] if found["batch"] == batch]
            at, ratios = [r["length"] / 1024 for r in rows], [r["ratio"] for r in rows]
            axis.plot(at, ratios, style, color=f"C{i}", label=f"batch {batch}{name}", markersize=4)
    axis.axhline(1, color="0.5", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks([length / 1024 for length in known], [size(length) for length in known])
    axis.set_xlabel("tokens of context")
    axis.set_ylabel("times as fast as dense")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    (folder / FIGURE).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / FIGURE, dpi=130)
