"""Write docs/quality.md and its figures from committed results.

No options: `python -m evals.quality`. Sections without a result in evals/results/ are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from selfindex.evaluation import figures
from selfindex.evaluation.markdown import head, paragraph, row
from selfindex.evaluation.report import (
    batch_table,
    fidelity_table,
    heat_table,
    interval,
    layer_table,
    not_measured,
    number,
    task_tables,
    where,
)

from .designs import open_choices

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "evals" / "results"
FIGURES = ROOT / "docs" / "figures"


def results(pattern: str) -> list[dict[str, Any]]:
    """Committed results of a kind."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]


def setting(result: dict[str, Any]) -> list[str]:
    """Texts, command, date and machine of a result."""
    found = result.get("environment") or result | result["versions"]
    machine = found["gpu"] or f"{found['cpus']} CPU cores"
    texts = result.get("texts") or result.get("settings", {}).get("texts")
    used = f"Texts: {', '.join(texts)}. " if texts else ""
    return paragraph(
        f"{used}`{found['command']}`, {found['date']}, {machine}, torch {found['torch']}, "
        f"transformers {found['transformers']}.",
    )


def by_size(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest model first; results of one model in the order of their files."""
    return sorted(evaluations, key=lambda result: -result["settings"].get("parameters", 0))


def beside_others(evaluations: list[dict[str, Any]]) -> list[str]:
    """Fidelity of all methods."""
    lines = ["## Beside other caches", ""]
    lines += paragraph(
        "Teacher-forced over the last tokens of each text, every query selecting what it reads; brackets are",
        "95 % bootstrap intervals over tokens. Sparse methods read the same share of the tokens, and all",
        "keep 16 sinks and 64 recent tokens in full precision (KIVI its own 128, paper 64 of its choice).",
        'Bytes are per token and KV head, scales and index included; "read" is what one decode step reads of',
        "them. The",
        "methods, with their sources: src/selfindex/evaluation/baselines/.",
    )
    for result in evaluations:
        for length, rows in result["fidelity"].items():
            lines += [heading(result, length), "", *fidelity_table(rows)]
        lines += [*not_measured(result), *setting(result)]
    leading = evaluations[0]
    tables = {length: rows["methods"] for length, rows in leading["fidelity"].items()}
    figures.pareto(tables, leading["settings"]["head_dim"], name_of(leading), FIGURES / "pareto.png")
    lines += ["![Fidelity against bytes held and read](figures/pareto.png)", ""]
    return [*lines, "![KL against the budget, four texts](figures/fidelity.png)", ""]


def name_of(result: dict[str, Any]) -> str:
    """The model's name."""
    return result["settings"]["model"]


def heading(result: dict[str, Any], length: str) -> str:
    """Of the tables of one model at one length."""
    return f"### {name_of(result)} (d = {result['settings']['head_dim']}), {int(length):,} tokens"


def tasks(evaluations: list[dict[str, Any]]) -> list[str]:
    """RULER, code completion, long answers, and passkey."""
    lines = ["## Tasks", ""]
    lines += paragraph(
        "RULER's thirteen tasks (arXiv 2404.06654), completion of code as in LongBench's LCC and",
        "RepoBench-P, programs by a specification in the document (judged by running tests), passages quoted",
        "word for word, chats of ten turns, and passkey: made from their published definitions by",
        "src/selfindex/evaluation/tasks/, which says what differs. The haystack is the texts below; the",
        "passages that qa_1 and qa_2 ask about are invented, and code is that of models that came to",
        "transformers since 2025. The document is read and compressed before the question is known; replies",
        "are greedy. All methods answer the same samples. Brackets are 95 % intervals: Wilson's over the",
        "samples of a task, the bootstrap's for means over tasks and for what they are less than dense's,",
        'sample by sample. Rows "every query" are a stress test: the question itself reads only what it',
        "selects. In the others it reads everything that is stored, as by default, and the steps that decode",
        "the reply select. Where it says so the question is in the prompt: it is read with the document, as",
        "`model.generate` reads a prompt, and steps that select follow. Pinned tokens count as bytes of all.",
    )
    for result in evaluations:
        for length, found in result["tasks"].items():
            means = result.get("means", {}).get(length)
            lines += [heading(result, length) + where(result), "", *task_tables(found, means)]
        if "policies" not in result["suite"]:
            lines += paragraph("Measured with every query selecting; the intervals are the bootstrap's.")
        lines += [*not_measured(result), *setting(result)]
    return lines


def batches(evaluations: list[dict[str, Any]]) -> list[str]:
    """Whether replies depend on the batch."""
    lines = ["## One prompt at a time or eight", ""]
    lines += paragraph(
        "The same samples answered alone and in a batch, whose products of other shapes round differently.",
    )
    for result in evaluations:
        lines += [f"### {name_of(result)}", "", *batch_table(result["batches"]), *setting(result)]
    return lines


def heat(result: dict[str, Any], draw: bool) -> list[str]:
    """Needles over length and depth, with the figure if it is this result's."""
    lines = [f"## Needles over length and depth, {name_of(result)}", ""]
    suite = result["suite"]
    lines += paragraph(
        f"Single needles in the texts (RULER's niah_single_2), {suite['heat_samples']} at each of",
        f"{suite['depths']} depths.",
    )
    lines += heat_table(result["heatmap"])
    if draw:
        figures.heatmap(result["heatmap"], name_of(result), FIGURES / "needles.png")
        lines += ["![Needles over length and depth](figures/needles.png)", ""]
    return [*lines, *setting(result)]


def layers(result: dict[str, Any], draw: bool) -> list[str]:
    """What attention reads and misses, with the figures if they are this result's."""
    length = list(result["layers"])[-1]
    lines = [f"## Attention of {name_of(result)}, layer by layer", ""]
    lines += paragraph(
        f"At {int(length):,} tokens: the softmax mass on the tokens that are read, the relative error of",
        "the output, and the share of the oracle's tokens that are read, over the last 64",
        "queries. Every layer",
        "gets the dense model's queries, keys and values, so that errors of earlier layers do not count.",
    )
    lines += layer_table(result["layers"][length])
    if draw:
        title = f"{name_of(result)}, {int(length):,} tokens"
        figures.layers(result["layers"][length], title, FIGURES / "layers.png")
        lines += ["![By layer](figures/layers.png)", ""]
    if draw and len(result["layers"]) > 1:
        figures.error_by_length(result["layers"], name_of(result), FIGURES / "error-by-length.png")
        lines += ["![Error against the length of the context](figures/error-by-length.png)", ""]
    return [*lines, *setting(result)]


def positions(result: dict[str, Any]) -> list[str]:
    """KL by the distance from the compressed prefix."""
    length, found = list(result["fidelity"].items())[-1]
    shown = {
        m: own["position"]
        for m, own in found["methods"].items()
        if m.startswith(("selfindex balanced 5", "selfindex paper", "oracle", "KIVI-2", "Quest"))
    }
    ends = [32 * (i + 1) for i in range(len(next(iter(shown.values()))["kl"]))]
    lines = [
        "## By position",
        "",
        *paragraph(
            f"KL to the dense {name_of(result)}, {int(length):,} tokens, averaged over 32 tokens up to the",
            "given one",
            "after the compressed prefix. What follows the prefix is in full precision, so a",
            "distance that grows",
            "would be an error that feeds on itself.",
        ),
        *head("method", *(f"to {n}" for n in ends)),
    ]
    for method, own in shown.items():
        lines.append(row(method, *map(number, own["kl"])))
    return [*lines, ""]


def drift(streams: list[dict[str, Any]], chats: list[dict[str, Any]]) -> list[str]:
    """Long decoding and chat turns."""
    lines = ["## Drift", ""]
    for result in streams:
        source = "text that the dense model samples" if result["generated"] else "a real text"
        lines += paragraph(
            f"{result['prompt']} tokens of prompt, then {source}, {result['step']} tokens at a time: almost",
            "all that is cached was written while decoding. At the end the cache is",
            f"{min(result['ratio']):.1f} times smaller than in 16 bits.",
        )
        names = {"kl": "KL to dense", "top1": "top-1 agreement", "entropy": "entropy of dense"}
        shown = [key for key in names if key in result["rows"][0]]
        lines += head("tokens", *(names[key] for key in shown))
        for part in result["rows"]:
            stretch = f"{part['from']:,} to {part['to']:,}"
            lines.append(row(stretch, *(interval(part[key]) for key in shown)))
        lines += ["", *setting(result)]
    for result in chats:
        lines += paragraph(
            "A chat: each turn gives a passage and asks about it, the dense model answers, and the",
            "compressed cache reads the same turns. Over the tokens of each reply, every one",
            "selecting for itself:",
        )
        lines += head("turn", "cached tokens", "KL to dense", "top-1 agreement")
        for part in result["rows"]:
            lines.append(
                row(part["turn"], f"{part['tokens']:,}", interval(part["kl"]), interval(part["top1"]))
            )
        lines += ["", *setting(result)]
    return lines


def choices(ablations: list[dict[str, Any]], profiles: list[dict[str, Any]]) -> list[str]:
    """What could be added to the default, per byte read."""
    lines = ["## Choices that were measured and are not in the default", ""]
    lines += paragraph(
        "Simulated end to end by evals/ablation.py: fake-quantised caches that differ from",
        "the default preset",
        'in one thing. "Read" is the share of the encoded tokens that a step attends to,',
        '"bytes" what it reads',
        "per encoded token and KV head, index included. Compare rows at equal bytes: a larger budget buys KL",
        "as well.",
    )
    order = list(open_choices())
    for result in ablations:
        lines += head("design", "read", "bytes", "KL to dense", "KL less the default's at 5 %",
                      "top-1 agreement")  # fmt: skip
        rows = sorted(result["result"].items(), key=lambda x: (order.index(x[0].split(" @ ")[0]), x[0]))
        for name, own in rows:
            cells = (interval(own[metric]) for metric in ("kl", "kl_diff", "top1"))
            read = f"{100 * own['read'][0]:.1f} %", f"{own['bytes_read']:.1f}"
            lines.append(row(label(name), *read, *cells))
        lines += ["", *setting(result)]
    for result in profiles:
        lines += paragraph(
            "The balance of `selfindex profile` on another text, against the prompt's first page:"
        )
        lines += head("balance", "KL to dense", "top-1 agreement")
        for length, found in result["lengths"].items():
            lines += [
                row(f"{name}, {int(length):,} tokens", interval(own["kl"]), interval(own["top1"]))
                for name, own in found.items()
                if name != "dense"
            ]
        lines += ["", *setting(result)]
    return lines


def changes(found: list[dict[str, Any]]) -> list[str]:
    """One change to the default at a time."""
    lines = ["## One change at a time", ""]
    lines += paragraph(
        "Simulated by evals/variants.py, 5 % where nothing else is said, every query selecting. Bytes are",
        "per encoded token and KV head: what is stored, and what a step reads. Missed mass and error are of",
        "attention layer by layer, with the dense model's queries, keys and values; differences are paired",
        'by token. "Needles" are among other needles (niah_multikey_2), of those that the dense model finds.',
    )
    for result in found:
        settings, rows = result["settings"], []
        needles = settings["needles"] > 0
        names = ["change", "stored", "read", "missed mass", "error", "KL to dense", "KL less the default's",
                 "top-1 agreement"]  # fmt: skip
        names += ["needles found", "KL of their answers"] if needles else []
        for name, own in result["variants"].items():
            cells = [f"{own['bytes']:.1f}", f"{own['bytes_read']:.1f}", number(1 - own["mass"][0])]
            cells += [number(own["err"][0]), *(interval(own[m], 4) for m in ("kl", "kl_diff"))]
            cells.append(interval(own["top1"]))
            if needles:
                cells += [interval(own["needles"], 2), interval(own["needle_kl"])]
            rows.append(row(name, *cells))
        lines += study(f"{settings['model']}, {settings['prefix']:,} tokens", names, rows, result)
    return lines


def study(title: str, names: list[str], rows: list[str], result: dict[str, Any]) -> list[str]:
    """A table of one model, and how it was measured."""
    return [f"### {title}", "", *head(*names), *rows, "", *setting(result)]


def depths(found: list[dict[str, Any]]) -> list[str]:
    """Designs whose layers differ."""
    lines = ["## At which depth errors matter", ""]
    lines += paragraph(
        "Simulated by evals/depth.py: a document, a question that reads everything, and the tokens of the",
        "right answer, each of which selects; 5 % where nothing else is said. Thirds are of the layers.",
        "Ratios are of the KL between the answer's tokens to that of the default, paired by sample,",
        "geometric means; then the KL of every task, and the share of answers all of whose tokens are the",
        "dense model's. Bytes of what is exact are those of the default. Brackets are from resampling the",
        "samples of each task: of so few they are too narrow.",
    )
    for result in found:
        settings, rows = result["settings"], []
        title = f"{settings['model']}, {settings['length']:,} tokens, {settings['samples']} samples a task"
        tasks = [f"KL of {task}" for task in settings["tasks"]]
        names = ["design", "stored", "read", "KL by the default's", *tasks, "same answers"]
        for name, own in result["designs"].items():
            cells = [f"{own['bytes']:.1f}", f"{own['bytes_read']:.1f}", interval(own["ratio"], 2)]
            cells += [number(own["tasks"][task], 4) for task in settings["tasks"]]
            rows.append(row(name, *cells, interval(own["same"], 2)))
        lines += study(title, names, rows, result)
    return lines


def honesty(found: list[dict[str, Any]]) -> list[str]:
    """What a cache says of itself, against the truth."""
    lines = ["## What `cache.report()` says it missed", ""]
    lines += paragraph(
        "The share of a step's softmax mass on tokens that it did not read: true, of 16-bit keys, and as",
        "`cache.report()` gives it, of decoded ones; means over steps, layers and heads. Differences are",
        "absolute, of means over heads.",
    )
    lines += head("model", "tokens", "budget", "true", "reported", "mean difference", "worst layer")
    for result in found:
        for own in result["rows"]:
            shares = (own[key] for key in ("missed", "reported", "difference", "worst_layer_difference"))
            cells = (f"{100 * share:.1f} %" for share in shares)
            budget = f"{100 * own['budget']:g} %"
            lines.append(row(result["model"], f"{result['length']:,}", budget, *cells))
    lines.append("")
    for result in found:
        lines += setting(result)
    return lines


def label(name: str) -> str:
    """A design and its budget for people."""
    design, budget = name.split(" @ ")
    return f"{design.removeprefix('default, ')}, {100 * float(budget):g} %"


def main() -> None:
    """Write the page and the figures."""
    evaluations = by_size(results("eval-*.json"))
    lines = ["# Quality", ""]
    lines += paragraph(
        "Written by `python -m evals.quality` from evals/results/ and evals/notes.md.",
        "How the defaults were chosen: design-notes.md and ablation.md.",
    )
    lines += beside_others([result for result in evaluations if result["fidelity"]])
    lines += tasks([result for result in evaluations if result["tasks"]])
    several = [result for result in evaluations if result.get("batches")]
    lines += batches(several) if several else []
    drawn: set[str] = set()
    for result in evaluations:
        for part, section in {"heatmap": heat, "layers": layers}.items():
            if result[part]:
                lines += section(result, draw=part not in drawn)
                drawn.add(part)
        lines += positions(result) if result["fidelity"] else []
    streams, chats = results("stream*.json"), results("chat*.json")
    lines += drift(streams, chats) if streams or chats else []
    ablations, profiles = results("ablation-model-*-open*.json"), results("fidelity-profile*.json")
    lines += choices(ablations, profiles) if ablations or profiles else []
    studies = results("variants-*.json")
    lines += changes(studies) if studies else []
    layered = results("depth-*.json")
    lines += depths(layered) if layered else []
    missed = results("missed-*.json")
    lines += honesty(missed) if missed else []
    lines += (ROOT / "evals" / "notes.md").read_text().splitlines()
    (ROOT / "docs" / "quality.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
