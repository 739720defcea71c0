"""Time of a decode step with the payload plane in host memory, against everything on the GPU.

    python benchmarks/offload.py --output offload.json

A model of Llama-3.1-8B's shapes with random bfloat16 weights and one sequence of a million random
tokens, which as 16-bit keys and values would take 137 GB. Both caches go through the same code; the
offloaded one pins about 18 GB of host memory. Per budget: a step of the whole model (the loop behind
`selfindex.generate`), the attention operators of all layers alone, and the kernel that reads the
payload alone. Bytes over PCIe are counted in the 32-byte sectors that a selected token touches.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from decode_attention import environment, graph_time
from end_to_end import DTYPE, filled_cache, llama, time_steps

from selfindex.backends.cuda.decode import Decode
from selfindex.integrations.transformers.loop import DecodeLoop

HEADS, GROUPS, DIM = 8, 4, 128
SECTORS = 3
"""Of 32 bytes, that a selected token touches: its magnitudes, its values, its value scale."""
STEPS = 24


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


def attention(cache: Any, budget: int) -> dict[str, float]:
    """Milliseconds of the attention operators of all layers, and of their last kernels alone."""
    calls = []
    wanted = torch.full((1,), budget, dtype=torch.int32, device="cuda")
    for layer in cache.compressed_layers:
        store = layer.store
        query = torch.randn(1, HEADS * GROUPS, 1, DIM, device="cuda").to(DTYPE)
        pools = store.pool.index, store.pool.payload
        tables = store.table.tensors()
        constants = store.constants, DIM**-0.5, store.format.name
        calls.append(Decode(query, *pools, *tables, wanted, budget, *constants))
    return {
        "attention_ms": graph_time(lambda: [call.run() for call in calls], 12) / 1e3,
        "read_ms": graph_time(lambda: [call.run(("attend",)) for call in calls], 12) / 1e3,
    }


def step_ms(model: Any, cache: Any, budget: float | int) -> float:
    """Milliseconds of a step of the whole model."""
    cache.set_budget(budget)
    loop = DecodeLoop(model, cache, STEPS + 3)
    token = torch.zeros(1, dtype=torch.long, device="cuda")
    found = time_steps(lambda: loop.step(token), STEPS)
    loop.close()
    return found


def measure(model: Any, length: int, budgets: list[float], offloading: bool) -> dict[str, Any]:
    """All figures of one kind of cache."""
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    cache = filled_cache(model, 1, length, offloading=offloading)
    torch.cuda.synchronize()
    found: dict[str, Any] = {"fill_s": time.perf_counter() - start}
    memory = cache.report().memory
    found |= {"gpu_gb": (torch.cuda.memory_allocated() - before) / 1e9, "host_gb": memory.host / 1e9}
    print(f"filled in {found['fill_s']:.1f} s: {found['gpu_gb']:.2f} GB GPU, {found['host_gb']:.2f} GB host")
    if offloading:
        found["mapped_gb_per_s"] = mapped_gb_per_s(cache.compressed_layers[0].store.pool.payload)
        print(f"a kernel reads host memory at {found['mapped_gb_per_s']:.1f} GB/s", flush=True)
    found["budgets"] = []
    for budget in budgets:
        encoded = cache.compressed_layers[0].store.encoded(0)
        selected = int(budget) if budget >= 1 else round(budget * length)
        row = {"budget": budget, "selected": min(selected, encoded)} | attention(cache, selected)
        row["step_ms"] = step_ms(model, cache, int(budget) if budget >= 1 else budget)
        row["bytes"] = len(cache.compressed_layers) * HEADS * row["selected"] * 32 * SECTORS
        row["read_gb_per_s"] = row["bytes"] / row["read_ms"] / 1e6
        found["budgets"].append(row)
        print(
            f"{'offloaded' if offloading else 'resident'}, {row['selected']} tokens: "
            f"step {row['step_ms']:.2f} ms, "
            f"attention {row['attention_ms']:.2f}, reading {row['read_ms']:.2f} ms, "
            f"{row['bytes'] / 1e6:.0f} MB at {row['read_gb_per_s']:.1f} GB/s",
            flush=True,
        )
    return found


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
    }
    for name, offloading in (("resident", False), ("offloaded", True)):
        result[name] = measure(model, options.length, options.budgets, offloading)
        gc.collect()
        torch.cuda.empty_cache()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
