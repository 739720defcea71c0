"""Time per token and to the first token of `model.generate`, as people call it.

    python benchmarks/generate.py --output generate.json --models qwen2.5-1.5b --lengths 2048 32768

Random bfloat16 weights (their values do not change the time), random prompts, greedy, one GPU:
  - selfindex: `model.generate` with a SelfIndexCache, 5 % budget, defaults.
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
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

import selfindex
from selfindex.evaluation.environment import describe
from selfindex.integrations.transformers.models import cache_argument

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-1.5b": (
        "Qwen2Config",
        {
            "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
            "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
        },
    ),
    "llama-3.1-8b": (
        "LlamaConfig",
        {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8,
        },
    ),
    "gemma-3-270m": (
        "Gemma3TextConfig",
        {
            "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
            "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
        },
    ),
}  # fmt: skip
WARM_UP = 8


class Clock(StoppingCriteria):
    """Notes when generate asks whether to stop, which it does once a token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def measure(model: Any, batch: int, length: int, steps: int, way: str) -> dict[str, float]:
    """Seconds to the first token, milliseconds a token, memory."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(3, model.config.vocab_size, (batch, length), device="cuda")
    given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    given |= {"max_new_tokens": steps, "eos_token_id": model.config.vocab_size, "pad_token_id": 0}
    cache = None
    if way in ("selfindex", "compiled"):
        cache = selfindex.SelfIndexCache(model, budget=0.05, compile=way == "compiled")
        given[cache_argument(model)] = cache
    elif way == "static":
        given["cache_implementation"] = "static"
    clock = Clock()
    start = time.perf_counter()
    model.generate(ids, **given, stopping_criteria=StoppingCriteriaList([clock]))
    each = [1e3 * (b - a) for a, b in zip(clock.times, clock.times[1:], strict=False)][WARM_UP:]
    found = {
        "first_s": clock.times[0] - start,
        "ms": statistics.median(each),
        "p90_ms": sorted(each)[int(0.9 * len(each))],
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }
    if cache is not None:
        found["replayed"] = cache.replay.steps / (steps - 1)
        found["cache_gb"] = cache.report().memory.total / 1e9
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
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    command = shlex.join(["python", "benchmarks/generate.py", *(Path(a).name for a in sys.argv[1:])])

    def keep() -> None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        result = {"environment": describe(command), "results": rows}
        args.output.write_text(json.dumps(result, indent=1) + "\n")

    for name in args.models:
        kind, shape = SHAPES[name]
        config = getattr(transformers, kind)(max_position_embeddings=1 << 20, **shape)
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        for batch in args.batches:
            for length in args.lengths:
                row: dict[str, Any] = {"model": name, "batch": batch, "length": length}
                # Twice: libraries prepare their kernels for every length that they have not seen.
                for way in ["dynamic", "selfindex"] * 2 + ["static", "compiled"] * (
                    2 * (length in args.static)
                ):
                    try:
                        row[way] = measure(model, batch, length, args.steps, way)
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
