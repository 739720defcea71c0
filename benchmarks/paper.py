"""The experiments of the published system's efficiency section (arXiv 2603.14224), on one GPU.

    python benchmarks/paper.py --output paper.json [--parts attention steps second]
    python benchmarks/paper.py --output paper.json --merge A.json B.json

Llama-3.1-8B's shapes, bfloat16, random weights (their values do not change the time), 5 % budget, both
presets:
  - attention: the operator of one decode step against PyTorch's FlashAttention-2, which the paper compares
    with, and its cuDNN kernel; see decode_attention.py.
  - steps: a decode step of the whole model and the memory at its peak, over caches filled with random
    content, against the best dense kernel in a captured graph; see end_to_end.py.
  - second: time to the second token of `model.generate`, which is the prompt, its encoding and one step, and
    the memory at its peak, against transformers' DynamicCache; see generate.py.
Parts, and sizes of a part, may run on several GPUs of one kind at once; --merge puts their files together.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import end_to_end
import generate
import torch
from decode_attention import DIM, HEADS, PAGE, environment, time_dense, time_sparse

from selfindex.codec import PageFormat
from selfindex.config import PRESETS

Row = dict[str, Any]
PARTS = ("attention", "steps", "second")
ATTENTION_BATCHES, ATTENTION_LENGTHS = (1, 4, 8, 16), tuple(4 << (10 + i) for i in range(6))
STEP_BATCHES, STEP_LENGTHS = (1, 4), (8 << 10, 32 << 10, 128 << 10)
PROMPTS = (8 << 10, 32 << 10, 128 << 10)


def attention(batches: list[int], lengths: list[int]) -> Iterator[Row]:
    """Microseconds of a decode step's attention in one layer."""
    formats = {preset: PageFormat(preset, HEADS, DIM, PAGE) for preset in PRESETS}
    for batch in batches:
        for length in lengths:
            row: Row = {"batch": batch, "length": length}
            for preset, fmt in formats.items():
                end_to_end.clean()
                row[preset] = time_sparse(batch, length, fmt)
            end_to_end.clean()
            yield row | {"dense": time_dense(batch, length)}


def attempt(action: Callable[..., Row], *sizes: Any, **options: Any) -> Row | None:
    """What an action measures, or None if it ran out of memory."""
    end_to_end.clean()
    try:
        return action(*sizes, **options)
    except torch.OutOfMemoryError:
        return None


def steps(model: Any, batches: list[int], lengths: list[int]) -> Iterator[Row]:
    """Milliseconds of a decode step of the model, gigabytes of the cache and at the peak."""
    end_to_end.time_sparse(model, 1, lengths[0])  # compiles kernels and warms the GPU up
    for batch in batches:
        for length in lengths:
            row: Row = {"batch": batch, "length": length}
            for preset in PRESETS:
                row[preset] = attempt(end_to_end.time_sparse, model, batch, length, preset=preset)
            yield row | {"dense": attempt(end_to_end.time_dense, model, batch, length)}


def second(model: Any, lengths: list[int]) -> Iterator[Row]:
    """Seconds from the prompt to the first and to the second token, gigabytes at the peak."""
    ways = {"dense": {"way": "dynamic"}} | {name: {"way": "selfindex", "preset": name} for name in PRESETS}
    for length in lengths:
        ids = torch.randint(3, model.config.vocab_size, (1, length), device=model.device)
        row: Row = {"batch": 1, "length": length}
        # Twice: libraries prepare their kernels for every length that they have not seen.
        for name in [*ways, *ways]:
            found = attempt(generate.run, model, ids, 2, **ways[name])
            row[name] = found and {
                "first_s": found["first_s"],
                "second_s": found["first_s"] + found["ms"] / 1e3,
                "peak_gb": found["peak_gb"],
            }
        yield row


def merged(results: list[Row]) -> Row:
    """One result of several.

    Raises:
        ValueError: they do not fit together.
    """
    whole: Row = {"environment": results[0]["environment"], "layers": results[0]["layers"], "parts": {}}
    for result in results:
        for what in ("device", "torch", "cuda"):
            if result["environment"][what] != whole["environment"][what]:
                raise ValueError(f"results of different machines: {what} is not the same in all files")
        if result["layers"] != whole["layers"]:
            raise ValueError("results of models with different numbers of layers")
        for name, part in result["parts"].items():
            into = whole["parts"].setdefault(name, {"commands": [], "results": []})
            known = {(row["batch"], row["length"]) for row in into["results"]}
            twice = known & {(row["batch"], row["length"]) for row in part["results"]}
            if twice:
                batch, length = min(twice)
                raise ValueError(f"{name} was measured at {batch} x {length} in more than one file")
            into["commands"] += part["commands"]
            into["results"] += part["results"]
    for part in whole["parts"].values():
        part["results"].sort(key=lambda row: (row["batch"], row["length"]))
    return whole


def write(result: Row, target: Path) -> None:
    """Write a result as JSON."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")


@torch.inference_mode()
def run(options: argparse.Namespace) -> None:
    """Measure the parts that were asked for, writing each row as it comes."""
    torch.manual_seed(0)
    words = ["python", "benchmarks/paper.py", *(Path(word).name for word in sys.argv[1:])]
    versions = environment() | {"transformers": metadata.version("transformers")}
    result: Row = {"environment": versions, "layers": options.layers, "parts": {}}
    models = {}

    def model() -> Any:
        if not models:
            models["llama"] = end_to_end.llama(options.layers)
        return models["llama"]

    for part in options.parts:
        if part == "attention":
            rows = attention(options.batches, options.lengths)
        elif part == "steps":
            rows = steps(model(), options.step_batches, options.step_lengths)
        else:
            rows = second(model(), options.prompts)
        result["parts"][part] = {"commands": [shlex.join(words)], "results": []}
        for row in rows:
            result["parts"][part]["results"].append(row)
            write(result, options.output)
            print(part, json.dumps(row), flush=True)


def main() -> None:
    """Measure or merge, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--merge", type=Path, nargs="+", help="put these files together, and measure nothing")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batches", type=int, nargs="+", default=list(ATTENTION_BATCHES))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(ATTENTION_LENGTHS))
    parser.add_argument("--step-batches", type=int, nargs="+", default=list(STEP_BATCHES))
    parser.add_argument("--step-lengths", type=int, nargs="+", default=list(STEP_LENGTHS))
    parser.add_argument("--prompts", type=int, nargs="+", default=list(PROMPTS))
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    if options.merge:
        try:
            write(merged([json.loads(path.read_text()) for path in options.merge]), options.output)
        except ValueError as error:
            parser.error(str(error))
    else:
        run(options)


if __name__ == "__main__":
    main()
