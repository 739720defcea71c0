"""Time of a decode step that Python launches layer by layer, as `model.generate` does.

    python benchmarks/eager_step.py --device cuda --output eager_step-h100.json

SmolLM2-135M's shapes (30 layers, 9 heads, 3 KV heads of 64 channels) with random bfloat16 weights, one
sequence, 5 % budget. On a GPU such steps wait for Python, so this is what the cache itself costs there.
Three ways: transformers' DynamicCache, SelfIndexCache without graphs, and with them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.cache_utils import Cache

import selfindex
from selfindex.evaluation.environment import describe
from selfindex.integrations.transformers.models import cache_argument

LAYERS, WARM_UP = 30, 10


def seconds(step: Callable[[], object], steps: int) -> float:
    """Median of a step's time, after some to warm up: a library's first call of a shape takes longer."""
    times = []
    for i in range(steps + WARM_UP):
        start = time.perf_counter()
        step()
        if i >= WARM_UP:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.inference_mode()
def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=1 << 16,
    )
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    argument, token = cache_argument(model), torch.tensor([[5]], device=args.device)
    found = []
    for length in args.lengths:
        ids = torch.randint(3, 49152, (1, length), device=args.device)

        def filled(cache: Cache, ids: torch.Tensor = ids) -> Cache:
            model(input_ids=ids, **{argument: cache}, logits_to_keep=1)
            return cache

        def forward(cache: Cache) -> int:
            logits = model(input_ids=token, **{argument: cache}, logits_to_keep=1).logits
            return int(logits[0, -1].argmax())

        row: dict[str, float] = {"length": length}
        # Twice: cuDNN prepares attention for every length that it has not seen.
        for _ in range(2):
            dense = filled(DynamicCache(config=config))
            row["dense"] = 1e3 * seconds(lambda cache=dense: forward(cache), args.steps)
        ours = filled(selfindex.SelfIndexCache(model, budget=0.05, cuda_graphs=False))
        row["selfindex"] = 1e3 * seconds(lambda cache=ours: forward(cache), args.steps)
        replayed = filled(selfindex.SelfIndexCache(model, budget=0.05))
        row["graph"] = 1e3 * seconds(lambda cache=replayed: forward(cache), args.steps)
        print({name: round(value, 2) for name, value in row.items()}, flush=True)
        found.append(row)
    if args.output:
        command = shlex.join(["python", "benchmarks/eager_step.py", *(Path(a).name for a in sys.argv[1:])])
        result = {"environment": describe(command), "layers": LAYERS, "results": found}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
