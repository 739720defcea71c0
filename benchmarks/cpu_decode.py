"""Time of a decode step's attention on a CPU against PyTorch's SDPA on the same threads.

    python benchmarks/cpu_decode.py --output cpu_decode-avx2.json

One row, 8 KV heads and 4 query heads each, the default budget, the compiled operators.
Ways to attend take turns in random order, so that what else the machine does meets all of them; medians.
The inputs of one size go round through several sets, so that small ones do not stay in the cache of the
processor.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import random
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
from selfindex.config import PRESETS, SelfIndexConfig

HEADS, GROUPS, PAGE = 8, 4, 128
DEFAULT = SelfIndexConfig()
"""Whose budget is read."""
FLUSH = 256 << 20
"""Bytes that one round through the sets reads at least."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


Calls = list[Callable[[], object]]


def timed(ways: dict[str, Calls], seconds: float) -> dict[str, float]:
    """Median microseconds of a call of every way, measured for `seconds` in all, at least five times."""
    for calls in ways.values():
        for call in calls[:2]:
            call()
    times: dict[str, list[float]] = {name: [] for name in ways}
    rounds = {name: itertools.cycle(calls) for name, calls in ways.items()}
    order, shuffled = list(ways), random.Random(0)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        # A long call uses up the process's share of the processor: the next one may be interrupted.
        shuffled.shuffle(order)
        for name in order:
            call = next(rounds[name])
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(each) for name, each in times.items()}


def sets_of(size: int) -> int:
    """Sets of `size` bytes that make up FLUSH."""
    return max(1, min(16, -(-FLUSH // size)))


def sparse(
    preset: str, dim: int, length: int, dtype: torch.dtype, config: SelfIndexConfig = DEFAULT
) -> Calls:
    """`sparse_decode`."""
    fmt = PageFormat(preset, HEADS, dim, PAGE)
    pages = length // PAGE
    keys, values = (torch.randn(64, HEADS, PAGE, dim) for _ in range(2))
    if preset == "paper":
        constants = ops.prompt_statistics(keys.transpose(0, 1).flatten(1, 2))[None]
    else:
        constants = torch.ones(1, HEADS, dim)
    full = torch.full((64,), PAGE, dtype=torch.int32)
    index, payload = ops.encode(keys, values, full, constants, fmt.name)
    budget = config.budget_tokens(length, length)
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
                query, *pools, table, counts, wanted, budget, constants, dim**-0.5, fmt.name
            )

        calls.append(call)
    return calls


def dense(dim: int, length: int, dtype: torch.dtype) -> dict[str, Calls]:
    """SDPA with grouped heads, and with the query heads of a group as rows."""
    calls: dict[str, Calls] = {"grouped": [], "rows": []}
    for _ in range(sets_of(2 * HEADS * length * dim * dtype.itemsize)):
        query = torch.randn(1, HEADS * GROUPS, 1, dim).to(dtype)
        keys, values = (torch.randn(1, HEADS, length, dim).to(dtype) for _ in range(2))
        # The heads of a group as queries of one KV head: the same sums, keys read once.
        rows = query.view(1, HEADS, GROUPS, dim)
        calls["grouped"].append(
            lambda q=query, k=keys, v=values: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        )
        calls["rows"].append(lambda q=rows, k=keys, v=values: F.scaled_dot_product_attention(q, k, v))
    return calls


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
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--min-tokens", type=int, default=DEFAULT.min_tokens, help="floor under the budget")
    parser.add_argument("--seconds", type=float, default=2.8, help="per size, for all ways together")
    options = parser.parse_args()
    config = SelfIndexConfig(min_tokens=options.min_tokens)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    rows = []
    print(f"{'d':>4} {'dtype':>9} {'tokens':>7} {'preset':>9} {'SDPA us':>9} {'sparse us':>9}  ratio")
    for dim, (name, dtype), length in itertools.product(options.dims, DTYPES.items(), options.lengths):
        ways = {preset: sparse(preset, dim, length, dtype, config) for preset in options.presets}
        times = timed(ways | dense(dim, length, dtype), options.seconds)
        best = min(times["grouped"], times["rows"])
        for preset in options.presets:
            size = {"dim": dim, "dtype": name, "length": length, "preset": preset}
            ratio = best / times[preset]
            rows.append(size | {"dense": best, "sparse": times[preset], "ratio": ratio})
            numbers = f"{best:>9.0f} {times[preset]:>9.0f} {ratio:>6.2f}"
            print(f"{dim:>4} {name:>9} {length:>7} {preset:>9} {numbers}", flush=True)
    if options.output:
        result = {
            "environment": environment(options.threads),
            "shape": {
                "query_heads": HEADS * GROUPS,
                "kv_heads": HEADS,
                "budget": config.budget,
                "min_tokens": config.min_tokens,
            },
            "results": rows,
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
