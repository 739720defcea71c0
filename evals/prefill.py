"""Write docs/prefill.md from committed results: `python -m evals.prefill`, without options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from selfindex.evaluation.markdown import head, paragraph, row

from .quality import results, setting

ROOT = Path(__file__).parents[1]
CHOSEN = "mean x gaussian"
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
    return lines + paragraph(
        'The default is `prefill="exact"`. Exact in any case are prompts of up to `dense_below` tokens,',
        "later chunks (the next turn of a chat), sliding-window layers, and prompts with an attention",
        "mask of another kind than causal with padding, which a warning says once. Attention to the",
        "selected blocks is PyTorch's FlexAttention on a GPU, compiled once at the first prompt, and its",
        "flash attention over gathered blocks on a CPU. vLLM, which has a scheduler of its own for",
        "prompts, refuses the option.",
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
    return lines


def speed(result: dict[str, Any]) -> list[str]:
    """Time of the operators, and to the first token."""
    shape, found = result["shape"], result["environment"]
    lines = [f"## Time, {found['gpu']}", ""]
    lines += paragraph(
        f"`{found['command']}`, {found['date']}, {found['gpu']}, torch {found['torch']}. One row,",
        f"{shape['query_heads']} / {shape['kv_heads']} heads of {shape['head_dim']}, {shape['dtype']},",
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
    if result["first_token"]:
        ways = list(result["first_token"][0]["ms"])
        lines += paragraph("Milliseconds to the first token of a whole model with Llama-3.1-8B's shapes:")
        lines += head("tokens", "layers", *ways)
        for each in result["first_token"]:
            exact = each["ms"]["exact"]
            cells = (f"{x:.0f} ({exact / x:.1f} x)" for x in each["ms"].values())
            lines.append(row(f"{each['tokens']:,}", each["layers"], *cells))
        lines.append("")
    return lines


def main() -> None:
    """Write the page."""
    lines = introduction() + estimates(results("pages-*.json"))
    for path in sorted((ROOT / "benchmarks" / "results").glob("prefill-*.json")):
        lines += speed(json.loads(path.read_text()))
    (ROOT / "docs" / "prefill.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
