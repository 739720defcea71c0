"""Writes docs/reliability.md from its text, benchmarks/reliability.md, and from results.

These are benchmarks/results/NAME-*.json of benchmarks/stream.py and prefix.py, scripts/leaks.py, soak.py and
serving_soak.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from string import Template
from typing import Any

from selfindex.evaluation.markdown import head, paragraph, row

HERE = Path(__file__).parent
MIB = 1 << 20


def where(result: dict[str, Any]) -> str:
    """Command, date and machine of a result."""
    found = result["environment"]
    machine = found["gpu"] or f"{found['cpus']} CPU cores"
    return f"`{found['command']}`, {found['date']}, {machine}, torch {found['torch']}."


def stream(result: dict[str, Any]) -> str:
    """What a stream held, read and took."""
    names = {"generate": "generated", "graph": "generated, fixed shapes", "chat": "chat", "prefill": "prompt"}
    rows = []
    for name, found in result["rows"].items():
        chosen = found if name != "chat" else found[1::4] + found[-2:]
        for part in chosen:
            rows.append(
                row(
                    f"{names[name]}, {part['what']}",
                    f"{part['held']:,}",
                    f"{part['read']:,}",
                    f"{part['ms']:.2f}",
                    f"{part['accounted'] / MIB:.2f}",
                    f"{part['live'] / MIB:.2f}",
                    f"{part['resident'] / MIB:.0f}",
                )
            )
    titles = head("scenario", "tokens held", "read", "ms", "MiB accounted", "MiB live", "MiB resident")
    return "\n".join([*paragraph(where(result), f"Model: {result['model']}."), *titles, *rows])


def prefix(result: dict[str, Any]) -> str:
    """What loading took."""
    shape, size = result["shape"], result["bytes"]
    rows = [
        row(name.replace("_", ", "), f"{clock:.2f}", f"{processors:.2f}", f"{size / 1e6 / clock:.0f}")
        for name, (clock, processors) in result["seconds"].items()
    ]
    text = paragraph(
        f"{where(result)} {shape['tokens']:,} tokens, layers: {shape['layers']} of {shape['kv_heads']} KV",
        f"heads with {shape['head_dim']} channels, {size / 1e6:.0f} MB. Seconds by the clock, seconds of all",
        "processors (which other work hardly changes), and MB/s; `encode` is what making the prefix again",
        "takes beside the model's own prefill, `read` is reading the file.",
    )
    return "\n".join([*text, *head("what", "clock", "processors", "MB/s"), *rows])


def leaks(results: list[dict[str, Any]]) -> str:
    """What a repetition leaves, some columns a machine."""
    columns = [
        (result, what)
        for result in results
        for what in ("malloc", "cuda", "objects")
        if what in result["growth"]["prompt"]
    ]
    names = {"malloc": "malloc, KiB", "cuda": "GPU memory, KiB", "objects": "objects"}
    titles = [
        f"{'GPU' if result['environment']['gpu'] else 'CPU'}: {names[what]}" for result, what in columns
    ]
    rows = []
    for name in results[0]["growth"]:
        cells = []
        for result, what in columns:
            value = result["growth"].get(name, {}).get(what)
            unit = 1024 if "KiB" in names[what] else 1
            cells.append("-" if value is None else f"{round(value / unit, 1) + 0.0:.1f}")
        rows.append(row(name.replace("_", " "), *cells))
    text = [
        line for result in results for line in paragraph(where(result), f"{result['repeat']} repetitions.")
    ]
    return "\n".join([*text, *head("use", *titles), *rows])


def soak(result: dict[str, Any]) -> str:
    """What a soak did and found."""
    counts = ", ".join(f"{name} {n:,}" for name, n in sorted(result["counts"].items()))
    readings, errors = result["memory"], result["errors"]
    text = paragraph(
        f"{where(result)} {result['actions']:,} actions ({counts}), {result['forwards']:,} forward passes",
        f"over {result['tokens']:,} tokens: {len(errors)} errors or mismatches. In use with no cache left,",
        "at the end of each round:",
    )
    names = {"malloc": "malloc, MiB", "resident": "resident, MiB", "cuda": "GPU, MiB", "objects": "objects"}
    rows = [
        row(title, *(f"{r[name] / MIB:.1f}" if "MiB" in title else f"{r[name]:,}" for r in readings))
        for name, title in names.items()
        if name in readings[0]
    ]
    return "\n".join([*text, *head("round", *map(str, range(1, 1 + len(readings)))), *rows])


def serving_soak(result: dict[str, Any]) -> str:
    """Random load on vLLM, and what memory grew by."""
    same, alone = result["policy's tokens"], result["compared alone"]
    compared = result["tokens compared with the policy"]
    grown = max(growth.get("cuda", growth["malloc"]) for growth in result["growth"]) / MIB
    alike = alone - result.get("differ alone", 0)
    text = paragraph(
        f"{where(result)} {result['finished']:,} requests finished, {result['aborted']:,} were aborted,",
        f"{result['preemptions']:,} preemptions; {result['prefix tokens found']:,} tokens of prompts were",
        f"found in the cache of prefixes, {result['draft tokens accepted']:,} of drafts accepted. Of",
        f"{compared:,} tokens compared with the policy {same:,} are the same,",
        f"of {alone:,} answers asked again alone {alike:,}. {len(result['errors'])} errors;",
        f"from the middle of a round to its end memory grew by {grown:.1f} MiB at most.",
    )
    return "\n".join(text).rstrip()


def main() -> None:
    """Read, fill in, write."""
    parts = {}
    for show in (stream, prefix, soak, serving_soak):
        name = show.__name__
        files = sorted((HERE / "results").glob(f"{name}-*.json"))
        parts[name] = "\n\n".join(show(json.loads(path.read_text())) for path in files)
    files = sorted((HERE / "results").glob("leaks-*.json"))
    parts["leaks"] = leaks([json.loads(path.read_text()) for path in files])
    text = Template((HERE / "reliability.md").read_text()).substitute(parts)
    (HERE.parent / "docs" / "reliability.md").write_text(text)


if __name__ == "__main__":
    main()
