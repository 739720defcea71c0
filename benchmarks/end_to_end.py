"""Time per token of a whole model, and the largest batch of long sequences that fits one GPU.

    python benchmarks/end_to_end.py --output end_to_end.json [--compile 8192 131072] [--preset paper]

Llama-3.1-8B's shapes with random bfloat16 weights (their values do not change the time). The caches
are filled with random content. Ways to decode:
  - selfindex: forward passes as `model.generate` makes them, 5 % budget, defaults; 128 steps, so that every
    layer encodes one page on the way.
  - dense: the same model and the same kind of graph-captured step, with keys and values in place
    and the best dense SDPA kernel on exactly the tokens that exist, without a mask.
At the lengths after --compile also both of these with the model run through torch.compile, and
transformers' StaticCache compiled, as users have it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from decode_attention import BACKENDS, encoded_pages, environment
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin

import selfindex
from selfindex.config import PRESETS
from selfindex.integrations.transformers.attention import NewKeys
from selfindex.integrations.transformers.models import cache_argument
from selfindex.integrations.transformers.prepare import prepare

STEPS = 128
DTYPE = torch.bfloat16


def llama(layers: int) -> Any:
    """A Llama-3.1-8B with random weights, on the GPU."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=1 << 20,
        rope_theta=500000.0,
    )
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation="sdpa").eval()


def time_steps(step: Callable[[], object], steps: int) -> float:
    """Milliseconds a step over `steps` steps, after three to warm up."""
    for _ in range(3):
        step()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(steps):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / steps


def filled_cache(model: Any, batch: int, length: int, **options: Any) -> selfindex.SelfIndexCache:
    """A cache of `batch` rows of `length` random tokens, every row with pages of its own."""
    cache = selfindex.SelfIndexCache(model, budget=0.05, **options)
    config = cache.config
    window = config.sinks + config.recent
    pages = (length - window) // config.page_size
    window = length - pages * config.page_size
    for layer in cache.compressed_layers:
        like = torch.randn(batch, 8, window, 128, device="cuda", dtype=DTYPE)
        layer.lazy_initialization(like, like)
        store: Any = layer.store
        index, payload, constants = encoded_pages(store.format, 128)
        own = constants.repeat(batch, 1, 1)  # of every row
        store.statistics = replace(store.statistics, constants=own, has_constants=(True,) * batch)
        store.reserve(batch * (pages + 2), window)
        for b in range(batch):
            source = torch.randint(index.shape[0], (pages,), device="cuda")
            store.table.append(b, store.pool.add(index[source], payload[source]), [config.page_size] * pages)
            store.window.put(slice(b, b + 1), 0, like[b], like[b])
        layer.positions = length
    return cache


def steps_of(model: Any, cache: selfindex.SelfIndexCache, batch: int) -> Callable[[], object]:
    """A forward pass of one token a row, which the cache replays as a graph."""
    token, argument = torch.zeros(batch, 1, dtype=torch.long, device="cuda"), cache_argument(model)
    return lambda: model(input_ids=token, **{argument: cache}, use_cache=True).logits.float()


def time_sparse(
    model: Any, batch: int, length: int, compile: bool = False, preset: str = "balanced"
) -> dict[str, float]:
    """Milliseconds a step and bytes, of the self-indexing cache."""
    torch.cuda.reset_peak_memory_stats()
    cache = filled_cache(model, batch, length, compile=compile, preset=preset)
    size = cache.report(missed=False).memory.total
    found = time_steps(steps_of(model, cache, batch), STEPS)
    return {"ms": found, "cache_gb": size / 1e9, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}


class DenseLayer(CacheLayerMixin):
    """Keys and values in place; attends to all of them, the newest token last."""

    is_sliding = False
    is_compileable = False

    def __init__(self, batch: int, length: int, backend: Any) -> None:
        super().__init__()
        self.keys, self.values = (
            torch.randn(batch, 8, length, 128, device="cuda", dtype=DTYPE) for _ in range(2)
        )
        self.last = torch.tensor([length - 1], device="cuda")
        self.length, self.backend, self.is_initialized = length, backend, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return NewKeys(self, key_states, value_states), value_states

    def attend(self, module: Any, query: Tensor, new: Any, mask: Any, scaling: float, *rest: Any) -> Tensor:
        self.keys.index_copy_(2, self.last, new.new_keys)
        self.values.index_copy_(2, self.last, new.new_values)
        with sdpa_kernel(self.backend):
            out = F.scaled_dot_product_attention(
                query, self.keys, self.values, scale=scaling, enable_gqa=True
            )
        return out.transpose(1, 2).contiguous()

    def get_seq_length(self) -> int:
        return self.length - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, *args: Any) -> None:
        pass


def time_dense(model: Any, batch: int, length: int, compile: bool = False) -> dict[str, Any]:
    """Milliseconds a step of the better dense kernel."""
    prepare(model)
    torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {}
    layers = [DenseLayer(batch, length, None) for _ in range(model.config.num_hidden_layers)]
    size = sum(x.nbytes for layer in layers for x in (layer.keys, layer.values))
    cache, ids = Cache(layers=layers), torch.zeros(batch, 1, dtype=torch.long, device="cuda")
    at = torch.full((batch, 1), length - 1, device="cuda")
    run = torch.compile(model.forward, fullgraph=True) if compile else model
    for name, backend in BACKENDS.items():
        for layer in layers:
            layer.backend = backend

        def forward() -> None:
            run(input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True).logits.float()

        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                forward()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    forward()
            torch.cuda.synchronize()
            found[name] = time_steps(graph.replay, 20)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            print(f"dense {name} at {batch} x {length}: {error}", flush=True)
    best = min(found, key=found.__getitem__)
    peak = torch.cuda.max_memory_allocated() / 1e9
    return {"ms": found[best], "kernel": best, "all": found, "cache_gb": size / 1e9, "peak_gb": peak}


def time_static(model: Any, batch: int, length: int) -> dict[str, float]:
    """Milliseconds a step of StaticCache and torch.compile(mode="reduce-overhead")."""
    cache = StaticCache(config=model.config, max_cache_len=length)
    ids = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
    model(input_ids=ids, past_key_values=cache)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(length - 64)
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    at = torch.full((batch, 1), length - 64, device="cuda")

    def run() -> None:
        step(input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True)

    for _ in range(3):
        run()
    times = [time_steps(run, 1) for _ in range(8)]
    return {"ms": statistics.median(times)}


def clean() -> None:
    """Give memory back between sizes."""
    gc.collect()
    torch.cuda.empty_cache()


def largest(
    way: Callable[[Any, int, int], dict[str, Any]], model: Any, length: int, guess: int
) -> dict[str, Any]:
    """The largest batch of `length` tokens that runs, from `guess` downwards, and its time."""
    for batch in range(guess, 0, -1):
        clean()
        try:
            return {"batch": batch, "length": length} | way(model, batch, length)
        except torch.OutOfMemoryError:
            print(f"{batch} x {length} does not fit", flush=True)
    return {"batch": 0, "length": length}


@torch.inference_mode()
def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--preset", choices=PRESETS, default="balanced")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 65536, 131072])
    parser.add_argument("--guess", type=int, nargs=2, default=[3, 22], help="largest batches to try first")
    parser.add_argument("--compile", type=int, nargs="*", default=[], help="lengths to run compiled as well")
    parser.add_argument("--skip-largest", action="store_true", help="no search for the largest batch")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = llama(options.layers)
    weights = torch.cuda.memory_allocated() / 1e9
    rows: list[dict[str, Any]] = []
    sparse_way = partial(time_sparse, preset=options.preset)
    sparse_way(model, 1, options.lengths[0])  # the first run compiles kernels and warms the GPU up
    for length in options.lengths:
        clean()
        sparse = sparse_way(model, 1, length)
        clean()
        dense = time_dense(model, 1, length)
        rows.append({"batch": 1, "length": length, "selfindex": sparse, "dense": dense})
        ratio = dense["ms"] / sparse["ms"]
        print(
            f"1 x {length}: dense {dense['ms']:.2f} ms ({dense['kernel']}), selfindex {sparse['ms']:.2f} ms, "
            f"{ratio:.2f}x; cache {dense['cache_gb']:.2f} and {sparse['cache_gb']:.2f} GB",
            flush=True,
        )
    most = options.lengths[-1]
    full: dict[str, dict[str, Any]] = {}
    if not options.skip_largest:
        full["dense"] = largest(time_dense, model, most, options.guess[0])
        full["selfindex"] = largest(sparse_way, model, most, options.guess[1])
    for name, row in full.items():
        row["tokens_per_s"] = 1000 * row["batch"] / row["ms"]
        print(
            f"largest {name}: {row['batch']} x {most}, {row['ms']:.2f} ms, "
            f"{row['tokens_per_s']:.0f} tokens/s, peak {row['peak_gb']:.1f} GB",
            flush=True,
        )
    compiled: list[dict[str, Any]] = []
    for length in options.compile:
        compiled.append({"batch": 1, "length": length})
        for name, way in (("selfindex", sparse_way), ("dense", time_dense)):
            clean()
            compiled[-1][name] = way(model, 1, length, True)
            print(f"compiled {name} 1 x {length}: {compiled[-1][name]['ms']:.2f} ms", flush=True)
    for row in compiled[-1:]:
        clean()
        row["static"] = time_static(model, 1, row["length"])
        print(f"StaticCache compiled 1 x {row['length']}: {row['static']['ms']:.2f} ms", flush=True)
    result = {
        "environment": environment(),
        "model": f"Llama-3.1-8B shapes, {options.layers} layers, random bfloat16 weights",
        "layers": options.layers,
        "preset": options.preset,
        "weights_gb": weights,
        "budget": 0.05,
        "results": rows,
        "compiled": compiled,
        "largest": full,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
