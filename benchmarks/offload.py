"""Time of a decode step with the payload plane in host memory, against everything on the GPU.

    python benchmarks/offload.py --output offload.json

A model of Llama-3.1-8B's shapes with random bfloat16 weights and one sequence of a million random
tokens, which as 16-bit keys and values would take 137 GB. Both caches go through the same code; the
offloaded one pins about 18 GB of host memory. Three ways: resident (all on the GPU), direct (attention
reads every selected token from host memory) and offloaded (the default of `offloading=True`: tokens
that were selected lately are on the GPU as well, in four selections of entries).

Per budget: the attention operators of all layers in one graph, while queries drift from replay to
replay (q <- keep q + sqrt(1 - keep^2) noise), and a step of the whole model (its token is always the
same, so that its queries only turn with the position). `misses` is the share of selected tokens that
crossed the bus. evals/reuse.py measures it on a real model. Bytes are the 32-byte sectors that such a
token touches.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from decode_attention import environment, graph_time
from end_to_end import DTYPE, filled_cache, llama, steps_of, time_steps

from selfindex.backends.cuda import recent
from selfindex.backends.cuda.offloaded import prepared

HEADS, GROUPS, DIM = 8, 4, 128
TOKEN_BYTES = 3 * 32
"""Sectors that a token touches: its magnitudes, its values, its value scale."""
STEPS = 16
KEEP = (0.99, 0.9, 0.0)


def copy_gb_per_s() -> float:
    """Bandwidth of a large copy from pinned host memory."""
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        device.copy_(host, non_blocking=True)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return (1 << 30) / min(times) / 1e6


def mapped_gb_per_s(payload: torch.Tensor) -> float:
    """Bandwidth of a kernel that reads an offloaded payload plane from end to end."""
    words = payload.view(torch.int64)
    return payload.nbytes / graph_time(lambda: words.sum(), 5) / 1e3


def fetched(cache: Any) -> int | None:
    """Tokens that came over the bus so far, by count of the kernels; None without such a count."""
    pools = [layer.store.pool for layer in cache.compressed_layers]
    if any(pool.recent is None or not pool.recent.sets for pool in pools):
        return None
    return sum(pool.recent.fetched for pool in pools)


def attention(cache: Any, budget: int, keep: float) -> dict[str, float | None]:
    """Milliseconds of the attention operators of all layers, and the share of misses."""
    calls = []
    wanted = torch.full((1,), budget, dtype=torch.int32, device="cuda")
    queries = torch.randn(len(cache.compressed_layers), 1, HEADS * GROUPS, 1, DIM, device="cuda")
    inputs = queries.to(DTYPE)
    for layer, query in zip(cache.compressed_layers, inputs, strict=True):
        store = layer.store
        pools = store.pool.index, store.pool.payload
        rest = store.constants, DIM**-0.5, store.format.name, store.pool.recent_tokens(budget)
        calls.append(prepared(query, *pools, *store.table.tensors(), wanted, budget, *rest))
    for call in calls:
        call.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call.run()
    times = []
    for i in range(STEPS + 6):
        if i == 6:  # the first steps fill the cache of recent tokens
            before = fetched(cache)
        queries.mul_(keep).add_(torch.randn_like(queries), alpha=(1 - keep**2) ** 0.5)
        inputs.copy_(queries)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    after, selected = fetched(cache), STEPS * len(calls) * HEADS * budget
    misses = None if before is None or after is None else (after - before) / selected
    return {"keep": keep, "ms": statistics.median(times[6:]), "misses": misses}


def step(model: Any, cache: Any, budget: float | int, selected: int) -> dict[str, float | None]:
    """Milliseconds of a step of the whole model, and the share of misses."""
    cache.set_budget(budget)
    run = steps_of(model, cache, 1)
    for _ in range(STEPS):
        run()
    before = fetched(cache)
    ms = time_steps(run, STEPS)
    after, read = fetched(cache), (STEPS + 3) * len(cache.compressed_layers) * HEADS * selected
    return {"ms": ms, "misses": None if before is None or after is None else (after - before) / read}


def budgets_of(model: Any, cache: Any, budgets: list[float], length: int, name: str) -> list[dict[str, Any]]:
    """Attention and steps for every budget."""
    rows = []
    for budget in budgets:
        selected = int(budget) if budget >= 1 else round(budget * length)
        each = [attention(cache, selected, keep) for keep in KEEP]
        row: dict[str, Any] = {"budget": budget, "selected": selected, "attention": each}
        row["bytes_if_all_miss"] = len(cache.compressed_layers) * HEADS * selected * TOKEN_BYTES
        row["step"] = step(model, cache, int(budget) if budget >= 1 else budget, selected)
        rows.append(row)
        print(f"{name}, {selected} tokens: step {row['step']}, attention {each}", flush=True)
    return rows


def size_of(cache: Any, before: int) -> dict[str, float]:
    """GB on the GPU, since `before` bytes were there, and in host memory."""
    torch.cuda.synchronize()
    gc.collect()
    host = cache.report(missed=False).memory.host
    return {"gpu_gb": (torch.cuda.memory_allocated() - before) / 1e9, "host_gb": host / 1e9}


@torch.inference_mode()
def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--length", type=int, default=1 << 20)
    parser.add_argument("--budgets", type=float, nargs="+", default=[2048, 0.05])
    options = parser.parse_args()
    torch.manual_seed(0)
    peak = copy_gb_per_s()
    print(f"copy from pinned memory: {peak:.1f} GB/s", flush=True)
    model = llama(options.layers)
    result: dict[str, Any] = {
        "environment": environment(),
        "model": f"Llama-3.1-8B shapes, {options.layers} layers, random bfloat16 weights",
        "length": options.length,
        "dense_gb": options.layers * options.length * HEADS * DIM * 4 / 1e9,
        "copy_gb_per_s": peak,
        "token_bytes": TOKEN_BYTES,
    }
    selections = recent.SELECTIONS
    for offloading in (False, True):
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        cache = filled_cache(model, 1, options.length, offloading=offloading)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        print(f"offloading={offloading}: filled in {seconds:.1f} s, {size_of(cache, before)}", flush=True)
        for name in ("direct", "offloaded") if offloading else ("resident",):
            recent.SELECTIONS = 0 if name == "direct" else selections
            rows = budgets_of(model, cache, options.budgets, options.length, name)
            result[name] = {"budgets": rows, "fill_s": seconds} | size_of(cache, before)
        if offloading:
            payload = cache.compressed_layers[0].store.pool.payload
            result["mapped_gb_per_s"] = mapped_gb_per_s(payload)
            print(f"a kernel reads host memory at {result['mapped_gb_per_s']:.1f} GB/s", flush=True)
        del cache
        gc.collect()
        torch.cuda.empty_cache()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
