"""Time per token of SmolLM2-135M on a CPU over long caches, dense and self-indexing, on the same threads.

    python benchmarks/cpu_model.py --output cpu_model-avx2.json

Caches are filled with random keys and values, whose content does not change the time; positions beyond
the 8k tokens that the model was trained for do not either. Steps of the ways to decode take turns, so
that what else the machine does meets all of them; medians.
  - transformers: its DynamicCache with SDPA, as users have it. Every step copies the cache.
  - in place: SDPA on keys and values that lie in place, the better of grouped heads and of query heads
    as rows of their KV head: the strongest dense step.
  - selfindex: SelfIndexCache with its defaults, and with preset="paper".
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cpu_decode import DTYPES, environment
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

import selfindex
from selfindex.config import PRESETS
from selfindex.evaluation.models import load, quiet
from selfindex.integrations.transformers.attention import NewKeys

WARM_UP = 2


class InPlace(CacheLayerMixin):
    """Keys and values in place; attends to all of them, the newest token last."""

    is_sliding = False
    is_compileable = False

    def __init__(self, keys: Tensor, values: Tensor, rows: bool) -> None:
        super().__init__()
        self.keys, self.values, self.rows, self.is_initialized = keys, values, rows, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return NewKeys(self, key_states, value_states), value_states

    def attend(self, module: Any, query: Tensor, new: Any, mask: Any, scaling: float, *rest: Any) -> Tensor:
        self.keys[:, :, -1:], self.values[:, :, -1:] = new.new_keys, new.new_values
        shape = query.shape
        if self.rows:
            query = query.reshape(shape[0], self.keys.shape[1], -1, shape[3])
        out = F.scaled_dot_product_attention(
            query, self.keys, self.values, scale=scaling, enable_gqa=not self.rows
        )
        return out.view(shape).transpose(1, 2).contiguous()

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, *args: Any) -> None:
        """Filled from the start."""


def ways(model: Any, length: int, dtype: torch.dtype, presets: list[str]) -> dict[str, Callable[[], object]]:
    """A decode step of every way, over `length` tokens."""
    config, ids = model.config, torch.zeros(1, 1, dtype=torch.long)
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    ours = {preset: selfindex.SelfIndexCache(model, preset=preset) for preset in presets}
    dynamic, grouped, rows = DynamicCache(config=config), [], []
    for i in range(config.num_hidden_layers):
        keys, values = torch.randn(2, 1, heads, length, dim).to(dtype)
        query = torch.randn(1, config.num_attention_heads, length, dim).to(dtype)
        for cache in ours.values():
            layer = cache.compressed_layers[i]
            layer.lazy_initialization(keys, values)
            layer.store.append(keys, values, query, None, dim**-0.5)
            layer.positions = length
        dynamic.update(keys, values, i)
        grouped.append(InPlace(keys, values, rows=False))
        rows.append(InPlace(keys, values, rows=True))

    def forward(cache: Any) -> Callable[[], object]:
        return lambda: model(input_ids=ids, past_key_values=cache, use_cache=True).logits

    return {
        "transformers": forward(dynamic),
        "grouped": forward(Cache(layers=grouped)),
        "rows": forward(Cache(layers=rows)),
        **{preset: forward(cache) for preset, cache in ours.items()},
    }


def measure(model: Any, length: int, dtype: torch.dtype, steps: int, presets: list[str]) -> dict[str, float]:
    """Median milliseconds a step of every way; the better way in place as `in place`."""
    times: dict[str, list[float]] = {}
    calls = ways(model, length, dtype, presets)
    for _ in range(steps):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
    found = {name: statistics.median(each[WARM_UP:]) for name, each in times.items()}
    return found | {"in place": min(found["grouped"], found["rows"])}


@torch.inference_mode()
def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << (10 + i) for i in range(6)])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    quiet()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    results = []
    for name in options.dtypes:
        model = load("smollm2", "cpu", name).model
        for length in options.lengths:
            found = measure(model, length, DTYPES[name], options.steps, options.presets)
            results.append({"dtype": name, "length": length, "ms": found})
            shown = ("transformers", "in place", *options.presets)
            times = ", ".join(f"{way} {found[way]:.1f}" for way in shown)
            ratios = ", ".join(f"{found['in place'] / found[way]:.2f}x" for way in options.presets)
            print(f"{name} {length}: {times} ms; {ratios}", flush=True)
            gc.collect()
    if options.output:
        result = {
            "environment": environment(options.threads),
            "model": "SmolLM2-135M-Instruct",
            "steps": options.steps - WARM_UP,
            "results": results,
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
