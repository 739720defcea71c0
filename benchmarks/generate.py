"""Time per token and to the first token of `model.generate`, as people call it.

    python benchmarks/generate.py --output generate.json --models qwen2.5-1.5b --lengths 2048 32768

Random bfloat16 weights (their values do not change the time), random prompts, greedy, one GPU:
  - selfindex: `model.generate` with a SelfIndexCache, 5 % budget, defaults; pinned (with --pinned N): with
    pinned_tokens=N besides.
  - dynamic: the same with transformers' DynamicCache, its default.
  - static (at the lengths after --static): with `cache_implementation="static"`, which transformers
    compiles; and compiled: SelfIndexCache with `compile=True`.
A token's time is from one call of the stopping criteria to the next: generate waits for the GPU
there. Medians over the steps after a warm-up.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

import selfindex
from selfindex.evaluation.environment import describe
from selfindex.evaluation.shapes import SHAPES, random_model
from selfindex.evaluation.timing import measure


def run(
    model: Any, ids: torch.Tensor, steps: int, way: str, chunk: int = 0, **config: Any
) -> dict[str, float]:
    """Seconds to the first token, milliseconds a token, memory."""
    cache = None
    if way in ("selfindex", "pinned", "compiled"):
        cache = selfindex.SelfIndexCache(model, budget=0.05, compile=way == "compiled", **config)
    options: dict[str, Any] = {"cache_implementation": "static"} if way == "static" else {}
    if chunk:
        options["prefill_chunk_size"] = chunk
    timing = measure(model, ids, steps, cache, **options)
    found = {"first_s": timing.first, "ms": timing.ms, "p90_ms": timing.p90_ms}
    found["peak_gb"] = timing.peak / 1e9
    if cache is not None:
        found |= {"replayed": timing.replayed, "cache_gb": timing.cache / 1e9}
    return found


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["qwen2.5-1.5b"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument(
        "--static", type=int, nargs="*", default=[], help="lengths to run the static cache at"
    )
    parser.add_argument("--chunk", type=int, default=0, help="tokens of a prompt that are read at a time")
    parser.add_argument("--pinned", type=int, default=0, help="pinned_tokens of a further row")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    command = shlex.join(["python", "benchmarks/generate.py", *(Path(a).name for a in sys.argv[1:])])

    def keep() -> None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        result = {"environment": describe(command), "results": rows}
        args.output.write_text(json.dumps(result, indent=1) + "\n")

    for name in args.models:
        model = random_model(name, "cuda", torch.bfloat16)
        for batch in args.batches:
            for length in args.lengths:
                row: dict[str, Any] = {"model": name, "batch": batch, "length": length}
                if args.chunk:
                    row["chunk"] = args.chunk
                ids = torch.randint(3, model.config.vocab_size, (batch, length), device="cuda")
                # Twice: libraries prepare their kernels for every length that they have not seen.
                ways = ["dynamic", "selfindex"] + ["pinned"] * bool(args.pinned)
                for way in ways * 2 + ["static", "compiled"] * (2 * (length in args.static)):
                    pinned = {"pinned_tokens": args.pinned} if way == "pinned" else {}
                    try:
                        row[way] = run(model, ids, args.steps, way, args.chunk, **pinned)
                    except torch.OutOfMemoryError:
                        row[way] = None
                    if row[way] is None:
                        torch.cuda.empty_cache()
                rows.append(row)
                keep()
                print(json.dumps(row), flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
