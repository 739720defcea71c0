"""Write docs/performance.md and its figure from the committed results of the benchmarks.

python benchmarks/report.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from report_models import (
    cpu_model_section,
    eager_section,
    generate_section,
    size,
)
from report_serving import draw_serving, serving_section

from selfindex.codec import PageFormat
from selfindex.evaluation.markdown import head, paragraph, row

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = "figures/decode.png"
PAGE = 128


def load(name: str) -> dict[str, Any]:
    """A committed result."""
    return json.loads((RESULTS / name).read_text())


def where(result: dict[str, Any], command: str) -> str:
    """The command, and what it ran on."""
    found = result["environment"]
    return f"`{command}`, {found['date']}, {found['device']}, torch {found['torch']}, CUDA {found['cuda']}."


def lengths(result: dict[str, Any]) -> str:
    """The lengths that were measured, as arguments."""
    return " ".join(map(str, sorted({row["length"] for row in result["results"]})))


def decode_section(result: dict[str, Any]) -> list[str]:
    """The decode operator against dense attention."""
    lines = ["## Decode attention"]
    lines += paragraph(
        where(result, f"python benchmarks/decode_attention.py --lengths {lengths(result)} --output FILE"),
        "32 query heads, 8 KV heads, head_dim 128, bf16, 5 % budget, `balanced`. Microseconds per layer,",
        "medians of CUDA-graph replays over rotating inputs; dense is the best of PyTorch's flash and cuDNN",
        "kernels in the same run. The sparse call covers scoring, exact selection, attention to the selected",
        "tokens and the combine; the full-precision window is not in it. Stages are timed alone and overlap",
        f"in the call. A device copy moved {result['copy_tb_per_s']:.2f} TB/s.",
    )
    plane = PageFormat.parse(result["format"]).index_bytes
    lines += head("batch x length", "dense", "sparse", "ratio", "score + select",
                  "index, TB/s", "attend")  # fmt: skip
    for found in result["results"]:
        stages, batch, length = found["sparse"], found["batch"], found["length"]
        lines.append(
            row(
                f"{batch} x {size(length)}",
                f"{found['dense_best']:.0f} ({found['dense_kernel']})",
                f"{stages['call']:.0f}",
                f"{found['ratio']:.2f}",
                f"{stages['decode']:.1f}",
                f"{batch * length / PAGE * plane / stages['decode'] / 1e6:.2f}",
                f"{stages['attend']:.1f}",
            )
        )
    lines += ["", *stage_table(result)]
    crossings = ", ".join(
        f"batch {batch}: {'nowhere' if length is None else size(length)}"
        for batch, length in result["crossover"].items()
    )
    lines += [*paragraph(f"Shortest measured length from which on sparse is never slower: {crossings}.")]
    return [*lines, f"![Decode attention, times as fast as dense]({FIGURE})", ""]


def stage_table(result: dict[str, Any]) -> list[str]:
    """What the stages have to read, and the time that would take at the bandwidth of dense attention."""
    fmt, shape = PageFormat.parse(result["format"]), result["shape"]
    token = fmt.head_dim // 8 + fmt.payload_bytes // (fmt.kv_heads * PAGE) + 1
    lines = paragraph(
        "What the stages have to read at least (the index of all tokens; codes, magnitudes, values and",
        "scales of the selected ones), the time that takes at the bandwidth which dense attention reaches at",
        "the same size, and the time they take:",
    )
    lines += head("batch x length", "stage", "MB", "at dense's bandwidth, us", "takes, us")
    for found in result["results"]:
        batch, length = found["batch"], found["length"]
        if length != 128 << 10 or batch not in (1, 8):
            continue
        dense = 4 * batch * shape["kv_heads"] * length * shape["head_dim"]
        selected = batch * shape["kv_heads"] * shape["budget"] * length
        read = {"decode": batch * length / PAGE * fmt.index_bytes, "attend": selected * token}
        for stage, name in (("decode", "score + select"), ("attend", "attend")):
            least = read[stage] / dense * found["dense_best"]
            size_of = f"{batch} x {size(length)}", name, f"{read[stage] / 1e6:.1f}"
            lines.append(row(*size_of, f"{least:.1f}", f"{found['sparse'][stage]:.1f}"))
    return [*lines, ""]


def end_section(result: dict[str, Any]) -> list[str]:
    """A whole model."""
    lines = ["## A whole model"]
    lines += paragraph(
        where(result, f"python benchmarks/end_to_end.py --lengths {lengths(result)} --output FILE"),
        f"{result['model']} ({result['weights_gb']:.1f} GB). selfindex is a loop of 128 steps that",
        "replays one graph, the encoding of a page included (`model.generate` replays it now, see above);",
        "dense is the same model in a",
        "captured graph with the best dense SDPA kernel on exactly the tokens that exist.",
        "Milliseconds per token.",
    )
    lines += head("batch x length", "dense", "selfindex", "ratio", "dense cache, GB", "selfindex cache, GB")
    for found in result["results"]:
        ours, dense = found["selfindex"], found["dense"]
        lines.append(
            row(
                f"{found['batch']} x {size(found['length'])}",
                f"{dense['ms']:.2f} ({dense['kernel']})",
                f"{ours['ms']:.2f}",
                f"{dense['ms'] / ours['ms']:.2f}",
                f"{dense['cache_gb']:.2f}",
                f"{ours['cache_gb']:.2f}",
            )
        )
    dense, ours = result["largest"]["dense"], result["largest"]["selfindex"]

    def full(found: dict[str, Any]) -> str:
        return (
            f"{found['batch']} ({found['ms']:.1f} ms a step, {found['tokens_per_s']:.0f} tokens/s, "
            f"peak {found['peak_gb']:.1f} GB)"
        )

    lines.append("")
    lines += paragraph(
        f"The largest batch of {size(ours['length'])} tokens that runs: dense {full(dense)}, selfindex",
        f"{full(ours)}: {ours['batch'] / dense['batch']:.1f} times the batch,",
        f"{ours['tokens_per_s'] / dense['tokens_per_s']:.1f} times the throughput.",
    )
    return lines


def compiled_section(result: dict[str, Any]) -> list[str]:
    """The same step with the model run through torch.compile."""
    plain = {found["length"]: found for found in result["results"]}
    sizes = " ".join(str(found["length"]) for found in result["compiled"])
    command = f"python benchmarks/end_to_end.py --lengths {lengths(result)} --layers {result['layers']}"
    lines = paragraph(
        "`selfindex.generate(compile=True)` runs the model through torch.compile, which fuses its many small",
        f"kernels; dense is compiled alike. {result['layers']} layers (compiling all 32 takes minutes).",
        where(result, f"{command} --compile {sizes} --skip-largest --output FILE"),
    )
    lines += head("batch x length", "dense", "selfindex", "ratio", "dense compiled", "selfindex compiled",
                  "ratio", "StaticCache compiled")  # fmt: skip
    for found in result["compiled"]:
        cells = [f"{found['batch']} x {size(found['length'])}"]
        for way in (plain[found["length"]], found):
            dense, ours = way["dense"]["ms"], way["selfindex"]["ms"]
            cells += [f"{dense:.2f}", f"{ours:.2f}", f"{dense / ours:.2f}"]
        cells.append(f"{found['static']['ms']:.2f}" if "static" in found else "")
        lines.append(row(*cells))
    return [*lines, ""]


def encode_section(result: dict[str, Any]) -> list[str]:
    """Encoding, and attention to the whole encoded prefix."""
    lines = ["## Encoding, and attention to everything"]
    lines += paragraph(
        where(result, "python benchmarks/encode.py --output FILE"),
        "One layer. Encoding a prompt in one call, as the store does it, against the causal attention of the",
        "same prompt:",
    )
    lines += head("prompt", "encode, ms", "dense attention, ms", "share")
    for found in result["prompt"]:
        encode, best = found["encode_one_call"] / 1e3, min(found["dense"].values()) / 1e3
        lines.append(row(size(found["length"]), f"{encode:.2f}", f"{best:.1f}", f"{encode / best:.2%}"))
    step = result["decode"]
    lines.append("")
    lines += paragraph(
        f"Encoding a page takes {step['page']:.1f} us once in 128 steps:",
        f"{step['share']:.2%} of a dense decode step at {size(step['length'])}.",
    )
    lines += paragraph(
        "`dense_attend` (a chunk of new queries, or a step below the length where selection pays) against",
        "dense attention to a 16-bit prefix, microseconds:",
    )
    lines += head("queries x prefix", "dense_attend", "best dense", "times as fast")
    for found in result["dense_attend"]:
        shape = f"{found['queries']} x {size(found['length'])}"
        best = min(found["dense"].values())
        lines.append(row(shape, f"{found['dense_attend']:.0f}", f"{best:.0f}", f"{found['ratio']:.2f}"))
    return [*lines, ""]


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
    lines = ["## On a CPU"]
    lines += paragraph(
        f"`python benchmarks/cpu_decode.py --output FILE`, {found['date']}, {found['processor']},",
        f"{found['threads']} threads, {found['instruction_set']}, torch {found['torch']}.",
        "One row, 32 query heads, 8 KV heads, 5 % budget (at least 128 tokens). Microseconds; SDPA is the",
        "better of grouped heads and of query heads as rows of their KV head.",
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


def draw(result: dict[str, Any], target: Path) -> None:
    """Speed over dense against the length, one line a batch size."""
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    for batch in sorted({found["batch"] for found in result["results"]}):
        rows = [found for found in result["results"] if found["batch"] == batch]
        axis.plot(
            [r["length"] / 1024 for r in rows], [r["ratio"] for r in rows], "o-", label=f"batch {batch}"
        )
    axis.axhline(1, color="0.5", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks([8 << i for i in range(7)], [f"{8 << i}k" for i in range(7)])
    axis.set_xlabel("tokens of context")
    axis.set_ylabel("times as fast as dense")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)


def main() -> None:
    """Write the page and the figure."""
    decode = load("decode_attention-h100.json")
    lines = ["# Performance", ""]
    lines += paragraph(
        "Written by `python benchmarks/report.py` from benchmarks/results/ and benchmarks/notes.md.",
        "Every section ran in one go on the machine it names.",
    )
    lines += decode_section(decode)
    lines += generate_section([load(path.name) for path in sorted(RESULTS.glob("generate-*-h200.json"))])
    serving = [load(path.name) for path in sorted(RESULTS.glob("serving-*-h200.json"))]
    lines += serving_section(serving)
    lines += end_section(load("end_to_end-h100.json"))
    lines += compiled_section(load("end_to_end-compiled-h100.json"))
    lines += encode_section(load("encode-h100.json"))
    lines += chunk_section(load("chunk-h200.json")) + chunk_section(load("chunk-cpu.json"))
    if (RESULTS / "offload-h100.json").exists():
        lines += offload_section(load("offload-h100.json"))
    lines += cpu_section(load("cpu_decode.json"))
    lines += cpu_model_section(load("cpu_model.json"))
    lines += eager_section([load(path.name) for path in sorted(RESULTS.glob("eager_step-*.json"))])
    lines += (ROOT / "benchmarks" / "notes.md").read_text().splitlines()
    (ROOT / "docs" / "performance.md").write_text("\n".join(lines).rstrip() + "\n")
    draw(decode, ROOT / "docs" / FIGURE)
    draw_serving(serving, ROOT / "docs")


if __name__ == "__main__":
    main()
