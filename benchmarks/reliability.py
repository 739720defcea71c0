"""Writes docs/reliability.md from its text, benchmarks/reliability.md, and from results.

These are benchmarks/results/NAME-*.json of benchmarks/stream.py, benchmarks/prefix.py and scripts/soak.py.
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


def soak(result: dict[str, Any]) -> str:
    """What a soak did and found."""
    counts = ", ".join(f"{name} {n:,}" for name, n in sorted(result["counts"].items()))
    growth = ", ".join(f"{name} {n / MIB:+.1f} MiB" for name, n in result["growth"].items())
    errors = result["errors"]
    return "\n".join(
        paragraph(
            f"{where(result)} {result['actions']:,} actions ({counts}): {len(errors)} errors or mismatches.",
            f"Growth from the end of the first of {len(result['memory'])} rounds to that of the last:",
            f"{growth}.",
        )
    ).rstrip()


def main() -> None:
    """Read, fill in, write."""
    parts = {}
    for name, show in (("stream", stream), ("prefix", prefix), ("soak", soak)):
        files = sorted((HERE / "results").glob(f"{name}-*.json"))
        parts[name] = "\n\n".join(show(json.loads(path.read_text())) for path in files)
    text = Template((HERE / "reliability.md").read_text()).substitute(parts)
    (HERE.parent / "docs" / "reliability.md").write_text(text)


if __name__ == "__main__":
    main()
