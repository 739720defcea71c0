"""What encoding costs beside the attention it is for, and attention to the whole encoded prefix.

    python benchmarks/encode.py --output encode.json [--preset paper]

One layer, 32 query heads, 8 KV heads, head_dim 128, bfloat16:
  - encoding a prompt, in one call as the store does, against the dense causal attention of the same
    prompt; with the paper preset also its statistics and the choice of pinned tokens;
  - encoding a page of new tokens, per token, against one dense decode step;
  - `dense_attend` of a chunk of new queries and of one query, against attention to a 16-bit prefix.
Dense attention is the best of PyTorch's flash and cuDNN kernels. Times are medians of CUDA events;
prompts and chunks are timed as eager calls, single steps as replays of a CUDA graph.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from decode_attention import (
    BACKENDS,
    DIM,
    GROUPS,
    HEADS,
    MOST_SETS,
    PAGE,
    constants_of,
    encoded_pages,
    environment,
    graph_time,
    time_dense,
)
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from selfindex.backends import ops
from selfindex.codec import PageFormat
from selfindex.codec.votes import choose_pinned
from selfindex.config import PRESETS, SelfIndexConfig
from selfindex.store.pinned import OBSERVED_QUERIES

TARGET = 0.02
"""Most of a prompt's dense attention that encoding it may take."""


def event_time(work: Callable[[], object], repeats: int) -> float:
    """Median microseconds of an eager call of `work`, gaps between its launches included."""
    times = []
    for i in range(repeats + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        if i:
            times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def normal(*shape: int) -> Tensor:
    """Gaussian bfloat16 numbers on the GPU."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def best_dense(queries: int, keys: int, causal: bool, repeats: int) -> dict[str, float]:
    """Microseconds of each dense kernel that runs, for one row."""
    query = normal(1, HEADS * GROUPS, queries, DIM)
    k, v = normal(1, HEADS, keys, DIM), normal(1, HEADS, keys, DIM)
    found = {}
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                found[name] = event_time(
                    lambda: F.scaled_dot_product_attention(query, k, v, is_causal=causal, enable_gqa=True),
                    repeats,
                )
        except RuntimeError as error:
            print(f"dense {name} of {queries} x {keys}: {error}", flush=True)
    return found


def time_prompt(length: int, fmt: PageFormat) -> dict[str, Any]:
    """Encoding of a prompt against its attention."""
    # Pages as the store cuts them from [H, n, d]: strided views.
    keys, values = (normal(HEADS, length // PAGE, PAGE, DIM).transpose(0, 1) for _ in range(2))
    counts = torch.full((length // PAGE,), PAGE, dtype=torch.int32, device="cuda")
    constants = constants_of(fmt, keys)

    found: dict[str, Any] = {
        "length": length,
        "encode_one_call": event_time(lambda: ops.encode(keys, values, counts, constants, fmt.name), 20),
    }
    spent = found["encode_one_call"]
    if fmt.preset == "paper":
        whole = keys.transpose(0, 1).reshape(HEADS, length, DIM)
        asking = normal(HEADS, GROUPS, OBSERVED_QUERIES, DIM)
        sinks = SelfIndexConfig(preset="paper").sinks
        found["statistics"] = event_time(lambda: ops.prompt_statistics(whole), 20)
        found["pinned"] = event_time(
            lambda: choose_pinned(whole[None], asking[None], int(sinks), DIM**-0.5), 20
        )
        spent += found["statistics"] + found["pinned"]
    found["dense"] = best_dense(length, length, True, 3)
    found["share"] = spent / min(found["dense"].values())
    return found


def time_step(length: int, fmt: PageFormat) -> dict[str, float]:
    """Encoding of a page, per token of it, against a dense decode step."""
    keys, values = normal(1, HEADS, PAGE, DIM), normal(1, HEADS, PAGE, DIM)
    counts = torch.full((1,), PAGE, dtype=torch.int32, device="cuda")
    constants = constants_of(fmt, keys)

    def page() -> tuple[Tensor, Tensor]:
        return ops.encode(keys, values, counts, constants, fmt.name)

    step, encode, call = min(time_dense(1, length).values()), graph_time(page), event_time(page, 40)
    return {
        "length": length,
        "page": encode,
        "page_call": call,
        "token": encode / PAGE,
        "dense_step": step,
        "share": encode / PAGE / step,
    }


def time_attention(queries: int, length: int, fmt: PageFormat) -> dict[str, Any]:
    """`dense_attend` against dense attention to a 16-bit prefix."""
    pages, sets = length // PAGE, MOST_SETS if queries == 1 else 1
    index, payload, constants = encoded_pages(fmt, 256)
    source = torch.randint(index.shape[0], (sets * pages,), device="cuda")
    index, payload = index[source], payload[source]
    tables = torch.randperm(sets * pages, device="cuda").int().view(sets, 1, pages)
    counts = torch.full((1, pages), PAGE, dtype=torch.int32, device="cuda")
    query = normal(1, HEADS * GROUPS, queries, DIM)

    def work() -> list[tuple[Tensor, Tensor]]:
        return [
            ops.dense_attend(query, index, payload, table, counts, constants, DIM**-0.5, fmt.name)
            for table in tables
        ]

    found: dict[str, Any] = {"queries": queries, "length": length}
    found["dense_attend"] = (graph_time(work) if queries == 1 else event_time(work, 10)) / sets
    found["dense"] = time_dense(1, length) if queries == 1 else best_dense(queries, length, False, 10)
    found["ratio"] = min(found["dense"].values()) / found["dense_attend"]
    flops = 4 * HEADS * GROUPS * queries * length * DIM
    found["tflops"] = flops / found["dense_attend"] / 1e6
    return found


def table(result: dict[str, Any]) -> str:
    """The results as text."""
    lines = ["prompt: encoding against causal attention, milliseconds"]
    for row in result["prompt"]:
        encode, dense = row["encode_one_call"] / 1e3, min(row["dense"].values()) / 1e3
        more = [f", {name} {row[name] / 1e3:.2f}" for name in ("statistics", "pinned") if name in row]
        lines.append(
            f"{row['length']:>7}  {encode:.2f}{''.join(more)}, dense {dense:.1f}: {row['share']:.2%}"
        )
    step = result["decode"]
    lines.append(
        f"decode: a page {step['page']:.1f} us, {step['token']:.3f} us a token, dense step at "
        f"{step['length']} {step['dense_step']:.1f} us: {step['share']:.2%}"
    )
    lines.append("dense_attend, microseconds")
    for row in result["dense_attend"]:
        dense = " ".join(f"{name} {time:.1f}" for name, time in row["dense"].items())
        lines.append(
            f"{row['queries']:>5} x {row['length']:>7}  {row['dense_attend']:.1f} "
            f"({row['tflops']:.0f} TFLOP/s)  dense {dense}  ratio {row['ratio']:.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, write JSON, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--preset", choices=PRESETS, default="balanced")
    parser.add_argument("--prompts", type=int, nargs="*", default=[32 << 10, 128 << 10])
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--prefixes", type=int, nargs="*", default=[32 << 10, 128 << 10])
    parser.add_argument("--steps", type=int, nargs="*", default=[1 << (10 + i) for i in range(5)])
    options = parser.parse_args()
    torch.manual_seed(0)
    fmt = PageFormat(options.preset, HEADS, DIM, PAGE)
    result: dict[str, Any] = {
        "environment": environment(),
        "shape": {"query_heads": HEADS * GROUPS, "kv_heads": HEADS, "head_dim": DIM},
        "format": fmt.name,
        "target_share": TARGET,
        "prompt": [],
        "dense_attend": [],
    }
    for length in options.prompts:
        result["prompt"].append(time_prompt(length, fmt))
        torch.cuda.empty_cache()
    result["decode"] = time_step(max(options.prompts, default=128 << 10), fmt)
    calls = [(options.chunk, n) for n in options.prefixes] + [(1, n) for n in options.steps]
    for queries, length in calls:
        result["dense_attend"].append(time_attention(queries, length, fmt))
        torch.cuda.empty_cache()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
