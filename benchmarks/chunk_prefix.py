"""Time of a long chunk's attention to an encoded prefix against the best dense kernel over the same tokens.

    python benchmarks/chunk_prefix.py --output chunk_prefix.json [--preset paper] [--rows 1]

32 query heads, 8 KV heads, head_dim 128, bfloat16, one GPU; milliseconds, medians of replays of a CUDA graph:
  - place: `dense_attend`, which decodes pages in registers;
  - memory: pages decoded to memory and PyTorch's kernel over them, merged with one more part, as `attend`
    does; decode and merge: of that, those two alone;
  - cudnn, flash: PyTorch's kernels over bf16 keys and values, flash3: vLLM's, where it can be imported.
"ratio" is memory over the fastest dense kernel; "host" is what launching memory without a graph takes;
"shape" is the first call of PyTorch's kernel for a length that it has not seen, both in wall clock time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from decode_attention import BACKENDS, DIM, GROUPS, HEADS, PAGE, encoded_pages, environment, graph_time
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from selfindex.attention import decoded
from selfindex.attention.attend import BLOCK
from selfindex.attention.kernels import attend_plain
from selfindex.attention.parts import Parts
from selfindex.backends import ops
from selfindex.codec import PageFormat
from selfindex.config import PRESETS

SCALING = DIM**-0.5


def gpu_time(work: Callable[[], object]) -> float:
    """Milliseconds that a GPU takes, whatever the host does meanwhile."""
    return graph_time(work, repeats=8) / 1000


def launch_time(work: Callable[[], object]) -> float:
    """Milliseconds that the host takes, whatever the GPU does meanwhile."""
    times = []
    for _ in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def store_of(fmt: PageFormat, rows: int, tokens: int) -> Any:
    """As much of a store as attention to encoded tokens reads."""
    index, payload, constants = encoded_pages(fmt, 512)
    pages = tokens // PAGE
    table = torch.randint(512, (rows, pages), dtype=torch.int32, device="cuda")
    counts = torch.full_like(table, PAGE)
    held = [SimpleNamespace(counts=[PAGE] * pages) for _ in range(rows)]
    return SimpleNamespace(
        table=SimpleNamespace(rows=held, tensors=lambda: (table, counts)),
        pool=SimpleNamespace(index=index, payload=payload, offloading=False),
        constants=constants,
        format=fmt,
        batch=rows,
    )


def dense_kernels(query: Tensor, keys: Tensor, values: Tensor) -> dict[str, Callable[[], object]]:
    """Dense attention, not causal, by whoever has it."""

    def through(backend: Any) -> Callable[[], object]:
        def run() -> object:
            with sdpa_kernel(backend):
                return attend_plain(query, keys, values, SCALING, False)

        return run

    found = {name: through(backend) for name, backend in BACKENDS.items()}
    try:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func
    except ImportError:
        return found
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, keys, values))
    rows, most = query.shape[0], (query.shape[2], keys.shape[2])
    bounds = [torch.arange(rows + 1, dtype=torch.int32, device="cuda") * n for n in most]

    def flash3() -> object:
        options = {"max_seqlen_q": most[0], "max_seqlen_k": most[1], "softmax_scale": SCALING}
        options |= {"cu_seqlens_q": bounds[0], "cu_seqlens_k": bounds[1], "return_softmax_lse": True}
        return flash_attn_varlen_func(q, k, v, fa_version=3, **options)

    return found | {"flash3": flash3}


@torch.inference_mode()
def measure(queries: int, tokens: int, rows: int, fmt: PageFormat) -> dict[str, Any]:
    """One number of new tokens over one prefix."""
    torch.manual_seed(0)
    store = store_of(fmt, rows, tokens)

    def normal(heads: int, n: int) -> Tensor:
        return torch.randn(rows, n, heads, DIM, device="cuda").bfloat16().transpose(1, 2)

    query, output = normal(HEADS * GROUPS, queries), normal(HEADS * GROUPS, queries)
    own = normal(HEADS * GROUPS, queries), torch.randn(rows, HEADS * GROUPS, queries, device="cuda")
    table, counts = store.table.tensors()
    pools = store.pool.index, store.pool.payload

    def place() -> None:
        for q, out, *exact in zip(*(x.split(BLOCK, 2) for x in (query, output, *own)), strict=True):
            parts = Parts()
            stored = *pools, table, counts, store.constants, SCALING
            parts.add(*ops.dense_attend(q, *stored, fmt.name))
            parts.add(exact[0], exact[1])
            parts.write(out)

    def memory() -> None:
        parts = Parts()
        assert decoded.decoded_parts(store, slice(0, rows), query, SCALING, parts)
        parts.add(*own)
        parts.write(output)

    step = min(tokens // PAGE, decoded.pages_at_a_time(HEADS, DIM, PAGE, query.dtype, rows))
    room = torch.empty(2, rows * step * PAGE, HEADS, DIM, dtype=query.dtype, device="cuda").transpose(1, 2)
    starts = torch.arange(rows, dtype=torch.int32, device="cuda") * step * PAGE

    def decode() -> None:
        for first in range(0, tokens // PAGE, step):
            at = slice(first, first + step)
            stored = *pools, table[:, at], counts[:, at], starts, *room, store.constants
            ops.decode_pages(*stored, fmt.name)

    def merge() -> None:
        ops.merge_into([own[0], own[0]], [own[1], own[1]], None, output)

    found: dict[str, Any] = {"queries": queries, "tokens": tokens, "rows": rows}
    for name, work in (("place", place), ("memory", memory), ("decode", decode), ("merge", merge)):
        found[name] = gpu_time(work)
    found["host"] = launch_time(memory)
    keys, values = normal(HEADS, tokens), normal(HEADS, tokens)
    dense = {}
    for name, work in dense_kernels(query, keys, values).items():
        try:
            dense[name] = gpu_time(work)
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)
    found["dense"], found["ratio"] = dense, found["memory"] / min(dense.values())
    torch.cuda.synchronize()
    start = time.perf_counter()
    attend_plain(query, keys[:, :, :-PAGE], values[:, :, :-PAGE], SCALING, False)
    torch.cuda.synchronize()
    found["shape"] = 1e3 * (time.perf_counter() - start)
    return found


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--queries", type=int, nargs="+", default=[128, 256, 512, 2048, 8192])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--rows", type=int, default=1, help="rows of the batch")
    parser.add_argument("--preset", choices=PRESETS, default="balanced")
    options = parser.parse_args()
    fmt = PageFormat(options.preset, HEADS, DIM, PAGE)
    results = []
    print(
        f"{'new':>5} {'prefix':>7} {'place':>8} {'memory':>8} {'decode':>7} {'merge':>6}  dense  ratio  shape"
    )
    for tokens in options.tokens:
        for queries in options.queries:
            row = measure(queries, tokens, options.rows, fmt)
            results.append(row)
            dense = "  ".join(f"{name} {ms:.3f}" for name, ms in row["dense"].items())
            own = f"{row['place']:>8.3f} {row['memory']:>8.3f} {row['decode']:>7.3f} {row['merge']:>6.3f}"
            rest = f"{row['ratio']:.2f}  {row['host']:.2f} {row['shape']:.0f}"
            print(f"{queries:>5} {tokens:>7} {own}  {dense}  {rest}", flush=True)
    if options.output:
        settings = {name: value for name, value in vars(options).items() if name != "output"}
        result = {"environment": environment(), "settings": settings, "results": results}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
