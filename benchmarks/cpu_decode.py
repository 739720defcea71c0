"""Time of a decode step's attention on a CPU against PyTorch's SDPA on the same threads.

    python benchmarks/cpu_decode.py --output cpu_decode.json

One row, 8 KV heads and 4 query heads each, 5 % budget (at least 128 tokens), the compiled operators.
Medians; the inputs of one size go round through several sets, so that small ones do not stay in the
cache of the processor.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from selfindex.backends import ops
from selfindex.backends.cpu.loader import instruction_set
from selfindex.codec import PageFormat

HEADS, GROUPS, PAGE, BUDGET = 8, 4, 128, 0.05
FLUSH = 256 << 20
"""Bytes that one round through the sets reads at least."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def timed(calls: list[Callable[[], object]], seconds: float) -> float:
    """Median microseconds of a call."""
    for call in calls[:2]:
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    for call in itertools.cycle(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if times[-1] + start > end and len(times) >= 5:
            return 1e6 * statistics.median(times)
    raise AssertionError


def sets_of(size: int) -> int:
    """Sets of `size` bytes that make up FLUSH."""
    return max(1, min(16, -(-FLUSH // size)))


def sparse(dim: int, length: int, dtype: torch.dtype, seconds: float) -> float:
    """Microseconds of `sparse_decode`."""
    fmt = PageFormat("balanced", HEADS, dim, PAGE)
    pages = length // PAGE
    balance = torch.ones(1, HEADS, dim)
    keys, values = (torch.randn(64, HEADS, PAGE, dim) for _ in range(2))
    index, payload = ops.encode(keys, values, torch.full((64,), PAGE, dtype=torch.int32), balance, fmt.name)
    budget = min(length, max(128, round(BUDGET * length)))
    counts = torch.full((1, pages), PAGE, dtype=torch.int32)
    wanted = torch.tensor([budget], dtype=torch.int32)
    calls = []
    for _ in range(sets_of(pages * fmt.index_bytes)):
        source = torch.randint(64, (pages,))
        pools = index[source], payload[source]
        table = torch.randperm(pages).int()[None]
        query = torch.randn(1, HEADS * GROUPS, 1, dim).to(dtype)

        def call(pools: Any = pools, table: Any = table, query: Any = query) -> object:
            return ops.sparse_decode(
                query, *pools, table, counts, wanted, budget, balance, dim**-0.5, fmt.name
            )

        calls.append(call)
    return timed(calls, seconds)


def dense(dim: int, length: int, dtype: torch.dtype, seconds: float) -> float:
    """Microseconds of SDPA, the better of grouped heads and of repeated query groups as rows."""
    calls: dict[str, list[Callable[[], object]]] = {"grouped": [], "rows": []}
    for _ in range(sets_of(2 * HEADS * length * dim * dtype.itemsize)):
        query = torch.randn(1, HEADS * GROUPS, 1, dim).to(dtype)
        keys, values = (torch.randn(1, HEADS, length, dim).to(dtype) for _ in range(2))
        # The heads of a group as queries of one KV head: the same sums, keys read once.
        rows = query.view(1, HEADS, GROUPS, dim)
        calls["grouped"].append(
            lambda q=query, k=keys, v=values: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        )
        calls["rows"].append(lambda q=rows, k=keys, v=values: F.scaled_dot_product_attention(q, k, v))
    return min(timed(way, seconds) for way in calls.values())


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(threads: int) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": processor(),
        "threads": threads,
        "instruction_set": instruction_set(),
        # Real-time scheduling (chrt -f 10) keeps other programs of a shared machine off the processors.
        "real_time": hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) == os.SCHED_FIFO,
    }


@torch.inference_mode()
def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << (10 + i) for i in range(6)])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.7, help="per measurement")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    rows = []
    print(f"{'d':>4} {'dtype':>9} {'tokens':>7} {'SDPA us':>9} {'sparse us':>9}  ratio")
    for dim, (name, dtype), length in itertools.product(options.dims, DTYPES.items(), options.lengths):
        found = {
            "dim": dim,
            "dtype": name,
            "length": length,
            "dense": dense(dim, length, dtype, options.seconds),
            "sparse": sparse(dim, length, dtype, options.seconds),
        }
        found["ratio"] = found["dense"] / found["sparse"]
        rows.append(found)
        times = f"{found['dense']:>9.0f} {found['sparse']:>9.0f} {found['ratio']:>6.2f}"
        print(f"{dim:>4} {name:>9} {length:>7} {times}", flush=True)
    if options.output:
        result = {
            "environment": environment(options.threads),
            "shape": {"query_heads": HEADS * GROUPS, "kv_heads": HEADS, "budget": BUDGET},
            "results": rows,
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
