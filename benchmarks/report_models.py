"""Sections of docs/performance.md about whole models; `report.py` writes the page."""

from __future__ import annotations

from typing import Any

from report_common import Result, by_machine, in_turn, lengths, preset, preset_option, size, where

from selfindex.config import PRESETS
from selfindex.evaluation.markdown import head, paragraph, row


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
    plain = [result for result in results if not any("pinned" in each for each in result["results"])]
    for each in latest(plain):
        ways = ("dynamic", "selfindex", "static", "compiled")
        ms = {way: each[way]["ms"] for way in ways if each.get(way)}
        times = [f"{ms[way]:.1f}" if way in ms else "" for way in ways]
        ratio = f"{ms['dynamic'] / ms['selfindex']:.1f}" if {"dynamic", "selfindex"} <= ms.keys() else ""
        first = [f"{each[way]['first_s']:.3f}" if each.get(way) else "" for way in ("dynamic", "selfindex")]
        size_of = f"{each['batch']} x {size(each['length'])}"
        lines.append(row(each["model"], size_of, *times[:2], ratio, *times[2:], *first))
    lines.append("")
    pinned = [result for result in results if result not in plain]
    if pinned:
        lines += paragraph(
            "With 128 tokens that the prompt's last queries pin (the command with `--pinned`), beside the",
            "default in the same run:",
        )
        lines += head("model", "batch x length", "selfindex", "pinned", "first token, selfindex", "pinned")
        for each in latest(pinned):
            ways = ("selfindex", "pinned")
            cells = [f"{each[way]['ms']:.2f}" for way in ways] + [
                f"{each[way]['first_s']:.3f}" for way in ways
            ]
            lines.append(row(each["model"], f"{each['batch']} x {size(each['length'])}", *cells))
        lines.append("")
    return lines


def cpu_model_section(result: dict[str, Any]) -> list[str]:
    """A small model's decode steps on a CPU."""
    found = result["environment"]
    lines = [f"## A whole model on a CPU, {found['instruction_set']}"]
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
        for ours in (name for name in PRESETS if name in ms):
            ratios = [f"{ms[way] / ms[ours]:.2f}" for way in ("transformers", "in place")]
            lines.append(row(each["dtype"], size(each["length"]), *dense, ours, f"{ms[ours]:.0f}", *ratios))
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


def end_section(results: list[Result]) -> list[str]:
    """A whole model."""
    lines = ["## A whole model"]
    lines += paragraph(
        f"{results[0]['model']} ({results[0]['weights_gb']:.1f} GB). selfindex is a loop of 128 steps that",
        "replays one graph, the encoding of a page included (`model.generate` replays it now, see above);",
        "dense is the same model in a",
        "captured graph with the best dense SDPA kernel on exactly the tokens that exist.",
        "Milliseconds per token.",
    )
    for machine in by_machine(results):
        for result in machine:
            command = f"python benchmarks/end_to_end.py --lengths {lengths(result)}"
            lines += paragraph(where(result, f"{command}{preset_option(result)} --output FILE"))
        lines += head("batch x length", "preset", "dense", "selfindex", "ratio",
                      "dense cache, GB", "selfindex cache, GB")  # fmt: skip
        for result, found in in_turn(machine):
            ours, dense = found["selfindex"], found["dense"]
            lines.append(
                row(
                    f"{found['batch']} x {size(found['length'])}",
                    preset(result),
                    f"{dense['ms']:.2f} ({dense['kernel']})",
                    f"{ours['ms']:.2f}",
                    f"{dense['ms'] / ours['ms']:.2f}",
                    f"{dense['cache_gb']:.2f}",
                    f"{ours['cache_gb']:.2f}",
                )
            )
        lines.append("")
        for result in machine:
            dense, ours = result["largest"]["dense"], result["largest"]["selfindex"]
            lines += paragraph(
                f"The largest batch of {size(ours['length'])} tokens that runs: dense {_full(dense)},",
                f"`{preset(result)}` {_full(ours)}: {ours['batch'] / dense['batch']:.1f} times the batch,",
                f"{ours['tokens_per_s'] / dense['tokens_per_s']:.1f} times the throughput.",
            )
    return lines


def _full(found: dict[str, Any]) -> str:
    """The largest batch that ran."""
    return (
        f"{found['batch']} ({found['ms']:.1f} ms a step, {found['tokens_per_s']:.0f} tokens/s, "
        f"peak {found['peak_gb']:.1f} GB)"
    )


def compiled_section(results: list[Result]) -> list[str]:
    """The same step with the model run through torch.compile."""
    lines = paragraph(
        "`selfindex.generate(compile=True)` runs the model through torch.compile, which fuses its many small",
        "kernels; dense is compiled alike. Fewer layers: compiling all 32 takes minutes.",
    )
    for result in results:
        plain = {found["length"]: found for found in result["results"]}
        sizes = " ".join(str(found["length"]) for found in result["compiled"])
        command = f"python benchmarks/end_to_end.py --lengths {lengths(result)} --layers {result['layers']}"
        command += f" --compile {sizes} --skip-largest{preset_option(result)} --output FILE"
        lines += paragraph(f"{result['layers']} layers, `{preset(result)}`.", where(result, command))
        lines += head("batch x length", "dense", "selfindex", "ratio", "dense compiled", "selfindex compiled",
                      "ratio", "StaticCache compiled")  # fmt: skip
        for found in result["compiled"]:
            cells = [f"{found['batch']} x {size(found['length'])}"]
            for way in (plain[found["length"]], found):
                dense, ours = way["dense"]["ms"], way["selfindex"]["ms"]
                cells += [f"{dense:.2f}", f"{ours:.2f}", f"{dense / ours:.2f}"]
            cells.append(f"{found['static']['ms']:.2f}" if "static" in found else "")
            lines.append(row(*cells))
        lines.append("")
    return lines
