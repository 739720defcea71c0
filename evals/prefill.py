"""Write docs/prefill.md from committed results: `python -m evals.prefill`, without options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from selfindex.evaluation.markdown import head, paragraph, row
from selfindex.evaluation.report import interval

from .quality import results, setting

ROOT = Path(__file__).parents[1]
CHOSEN = "mean x mean"
TARGET = 1
"""Of the targets in a result, the one that is shown: .95."""


def percent(share: float) -> str:
    """A share for people."""
    return f"{100 * share:.1f} %"


def introduction() -> list[str]:
    """What the option does."""
    lines = ["# Sparse prefill", ""]
    lines += paragraph(
        "Written by `python -m evals.prefill` from evals/results/ and benchmarks/results/.",
    )
    lines += paragraph(
        '`SelfIndexCache(model, prefill="sparse")` has a prompt attend to selected blocks of itself',
        "instead of everything. Blocks are 128 tokens, as pages are. Every block of queries of a KV head",
        "(its query heads together) keeps the blocks of keys with the largest estimated share of its",
        "softmax, until these shares sum up to `prefill_mass`, but at most `prefill_density` of the",
        "blocks before it; and always the first block, its own and the one before it. `prefill_mass=1.0,",
        "prefill_density=0.1` is a fixed density. Keys and values are in full precision, what is stored",
        "afterwards is encoded as always, and steps after the prompt are the same.",
    )
    lines += paragraph(
        "A later chunk, such as the next of `prefill_chunk_size` or a long document in the next turn of a",
        "chat, selects from all of its row: encoded tokens are decoded to memory and lie where they were in",
        "the text, between the sinks and the recent tokens, and the chunk's queries are the last ones of",
        "that. What this takes is bounded: a row at a time, and of its KV heads as many as fit into 1 GiB,",
        "but one at least.",
    )
    return lines + paragraph(
        'The default is `prefill="exact"`. Exact in any case are rows of up to `dense_below` tokens, the',
        "last 256 queries of a prompt or chunk or a few more, where a question may stand that the mean of",
        "a block hides, chunks of up to 512 tokens, sliding-window layers, and prompts with an attention",
        "mask of another kind than causal with padding, which a warning says once. Attention to the",
        "selected blocks is PyTorch's FlexAttention on a GPU, compiled once at the first prompt and once at",
        "the first later chunk, and its flash attention over gathered blocks on a CPU. vLLM, which has a",
        "scheduler of its own for prompts, refuses the option.",
    )


def estimates(found: list[dict[str, Any]]) -> list[str]:
    """How well estimates find the blocks."""
    lines = ["## Which estimate", ""]
    lines += paragraph(
        "Every block of 128 queries against the true softmax mass of the blocks (mean over queries, heads",
        "and texts; in brackets the worst layer's mean), at equal density. Rows are queries x keys: the",
        "mean of the block's queries, or some of them with a softmax each, against a page's mean, its",
        "Gaussian (mean and variance of every channel), the bound that its ranges of channels give, or",
        "eight tokens in one bit a channel; and sums along antidiagonals of 8 x 8 or 16 x 16 pairs.",
        '"needed" is the density at which the order of an estimate holds 95 % of every block\'s mass;',
        '"target" what keeping an estimated 95 % reads, and the true mass of that. In bold what',
        "`select_blocks` does.",
    )
    for result in found:
        for run in result["runs"]:
            lines += [f"**{result['model']}, {run['tokens']:,} tokens, pages of {run['page']}**", ""]
            shares = [f"{100 * density:g} %" for density in result["densities"]]
            lines += head("estimate", *shares, "needed", "target: read", "true mass")
            for name, own in sorted(run["estimates"].items(), key=lambda item: -item[1]["recall"][1]):
                pairs = zip(own["recall"], own["worst_layer"], strict=True)
                density, mass = own["reached"][TARGET]
                cells = [f"{mean:.3f} ({worst:.3f})" for mean, worst in pairs]
                cells += [percent(own["needed"]), percent(density), f"{mass:.3f}"]
                lines.append(row(f"**{name}**" if name == CHOSEN else name, *cells))
            lines.append("")
        texts = sorted({text for run in result["runs"] for text in run["texts"]})
        lines += setting(result | {"texts": texts})
    return lines + paragraph(
        "Chosen is the mean of the queries against the mean of the keys: in the 1.5B model it is within",
        ".005 of the best at every density, and keeps .948 to .950 where .95 are asked for; in SmolLM2 it",
        "is .003 behind the Gaussian at 20 %. Antidiagonals find a little more in Qwen, for an eighth or a",
        "sixteenth of all logits instead of one product for a pair of blocks and query head. At equal",
        "density all but the single bits are close to the oracle and to each other: most of the mass is in",
        "the blocks that are always kept, and what the others hold is spread thinly. The bound reads less",
        "for the same true mass in SmolLM2 and more in Qwen. Pages of 64 tokens, with as many queries in a",
        "block, gain little. No estimate is a promise: where a block of 128 is to keep .95 of the mass, it",
        "truly keeps .88 to .95 on average.",
    )


def machine(result: dict[str, Any]) -> str:
    """What a result was measured on."""
    found = result["environment"]
    return found["gpu"] or f"{found['cpus']} CPU cores"


def measured(result: dict[str, Any]) -> str:
    """Command, date and machine of a result, and the shape of its heads."""
    shape, found = result["shape"], result["environment"]
    return (
        f"`{found['command']}`, {found['date']}, {machine(result)}, torch {found['torch']}. One row, "
        f"{shape['query_heads']} / {shape['kv_heads']} heads of {shape['head_dim']}, {shape['dtype']},"
    )


def speed(result: dict[str, Any]) -> list[str]:
    """Time of a prompt's operators, and to the first token."""
    found = result["environment"]
    lines = [f"## Time, {machine(result)}", ""]
    if result["results"]:
        lines += paragraph(
            measured(result),
            'random content, so that the density is given and not found; "read" includes the blocks that are',
            "always kept. Milliseconds; dense is the faster of cuDNN and FlashAttention through SDPA.",
        )
        lines += head("tokens", "density", "read", "dense", "selection", "attention", "times as fast")
        for each in result["results"]:
            for own in each["sparse"]:
                times = (f"{x:.1f}" for x in (each["dense_best"], own["selection"], own["attention"]))
                shares = f"{own['density']:.0%}", percent(own["read"])
                lines.append(row(f"{each['tokens']:,}", *shares, *times, f"{own['ratio']:.1f}"))
        lines.append("")
    else:
        lines += paragraph(
            f"`{found['command']}`, {found['date']}, {machine(result)}, torch {found['torch']}."
        )
    if result["first_token"]:
        ways = list(result["first_token"][0]["ms"])
        model = result["first_token"][0].get("model") or "a whole model with Llama-3.1-8B's shapes"
        lines += paragraph(f"Milliseconds to the first token of {model}:")
        lines += head("tokens", "layers", *ways)
        for each in result["first_token"]:
            exact = each["ms"]["exact"]
            cells = (f"{x:.0f} ({exact / x:.1f} x)" for x in each["ms"].values())
            lines.append(row(f"{each['tokens']:,}", each["layers"], *cells))
        lines.append("")
    return lines


def chunk_speed(result: dict[str, Any]) -> list[str]:
    """Time of a later chunk's operators, and of what a layer does with it."""
    lines = [f"## Time of a later chunk, {machine(result)}", ""]
    lines += paragraph(
        measured(result),
        f"`{result['shape']['preset']}`, random content. Milliseconds of one layer: pages decoded to memory,",
        "selection and attention of all queries, these together, and what a layer does, where the last",
        "queries read everything. Dense is the fastest kernel over 16-bit keys and values of the prefix, in",
        "the same run, and its time over the others is in brackets.",
    )
    lines += head("queries x prefix", "density", "read", "dense", "decoding", "selection", "attention",
                  "together", "with exact last queries")  # fmt: skip
    for each in result["results"]:
        best = each["dense_best"]
        for own in each["sparse"]:
            parts = (f"{x:.2f}" for x in (best, each["decode"], own["selection"], own["attention"]))
            sums = (f"{own[name]:.2f} ({best / own[name]:.1f} x)" for name in ("sparse", "chunk"))
            size = f"{each['queries']:,} x {each['tokens']:,}"
            lines.append(row(size, f"{own['density']:.0%}", percent(own["read"]), *parts, *sums))
    return [*lines, ""]


def tasks(result: dict[str, Any]) -> list[str]:
    """What a sparse prefill costs on tasks."""
    lines = [f"## Tasks, {result['settings']['model']}", ""]
    lines += paragraph(
        "RULER's needles, the default mass, on the same samples; the means' brackets are 95 % intervals.",
        "The question is a chunk of its own, and reads everything that is stored.",
    )
    for length, found in result["tasks"].items():
        means = result["means"][length]["ruler"]
        lines += head(f"{int(length):,} tokens", "samples", *means)
        for name, own in found.items():
            scores = (f"{own[method]['score'][0]:.2f}" for method in means)
            lines.append(row(name, own["dense"]["samples"], *scores))
        lines.append(row("mean", "", *(interval(mean["mean"]) for mean in means.values())))
        lines.append(row("less than dense", "", *(interval(mean["less"]) for mean in means.values())))
        lines.append("")
    return lines + setting(result)


def missing() -> list[str]:
    """What is not known yet."""
    text = paragraph(
        "The other tasks of RULER, 32k tokens, and lower masses: `selfindex eval MODEL --part tasks --task",
        "ruler --prefill sparse,sparse=0.9` measures them beside exact prefill.",
    )
    return ["## What is missing", "", *text]


def main() -> None:
    """Write the page."""
    lines = introduction() + estimates(results("pages-*.json"))
    for path in sorted((ROOT / "benchmarks" / "results").glob("prefill-*.json")):
        lines += speed(json.loads(path.read_text()))
    for path in sorted((ROOT / "benchmarks" / "results").glob("sparse_chunk*.json")):
        lines += chunk_speed(json.loads(path.read_text()))
    for result in results("eval-*-prefill.json"):
        lines += tasks(result)
    lines += missing()
    (ROOT / "docs" / "prefill.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
