"""Time and memory of a chunk's attention to full-precision tokens against PyTorch's SDPA.

    python benchmarks/chunk.py --output chunk-cpu.json
    python benchmarks/chunk.py --device cuda --output chunk-cuda.json

One row: a chunk of new tokens behind those that the window and the sinks hold, as in every chunk after
the first. Compared are, on the same tensors,
  - exact: the cache's way, with the log-sum-exp that merging with encoded tokens needs;
  - masked: SDPA with a mask of all pairs, what transformers runs behind a cache that holds tokens;
  - aligned: SDPA with `causal_lower_right`, its way to the same numbers without a mask of our own;
  - new: SDPA of the new tokens alone, without those held.
"ratio" is exact over the faster of masked and aligned. Medians of calls in turn; memory is the peak above
what was there before, including the results.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from selfindex.attention.exact import exact_part
from selfindex.attention.shared import Shared
from selfindex.evaluation.environment import command_line, describe
from selfindex.store.window import Window

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TARGET = 1.5
"""Most that `exact` may take, in times of SDPA for the same part."""


def anonymous() -> int:
    """Bytes of the process that are not mapped from files (Linux with glibc)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def peak(work: Callable[[], object], device: str) -> int:
    """Most bytes beyond those before, while `work` ran."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # What the allocator kept of earlier calls would hide what this one needs.
    ctypes.CDLL(None).malloc_trim(0)
    before, seen, over = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            seen.append(anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = work()
    seen.append(anonymous() - before)
    over.set()
    watcher.join()
    del result
    return max(seen)


def seconds(work: Callable[[], object], device: str) -> float:
    """Time of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ways(new: int, options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The four calls."""

    def normal(heads: int, tokens: int) -> Tensor:
        return torch.randn(1, heads, tokens, options.dim, device=options.device).to(dtype)

    held, heads = options.held, options.kv_heads
    window = Window(normal(heads, 0))
    window.put(slice(0, 1), 0, normal(heads, held), normal(heads, held))
    query, keys, values = (normal(n, new) for n in (heads * options.groups, heads, heads))
    scaling = options.dim**-0.5

    def sdpa(mask: Any, joined: bool = True) -> Tensor:
        pairs = ((window.keys[:, :, :held], keys), (window.values[:, :, :held], values))
        k, v = (torch.cat(pair, 2) if joined else pair[1] for pair in pairs)
        return F.scaled_dot_product_attention(query, k, v, mask, is_causal=not joined, enable_gqa=True)

    def masked() -> Tensor:
        # Layers share the mask in transformers: making it is not counted as time of each.
        return sdpa(visible)

    visible = torch.ones(new, held + new, dtype=torch.bool, device=options.device).tril(held)[None, None]
    return {
        "exact": lambda: exact_part(window, query, keys, values, None, scaling, Shared()),
        "masked": masked,
        "aligned": lambda: sdpa(causal_lower_right(new, held + new)),
        "new": lambda: sdpa(None, joined=False),
    }


@torch.inference_mode()
def measure(new: int, options: argparse.Namespace, name: str) -> dict[str, Any]:
    """One length and dtype."""
    torch.manual_seed(0)
    calls = ways(new, options, DTYPES[name])
    found: dict[str, Any] = {"new": new, "dtype": name, "seconds": {}, "bytes": {}}
    times: dict[str, list[float]] = {way: [] for way in calls}
    for way in list(calls):
        try:
            found["bytes"][way] = peak(calls[way], options.device)
        except (RuntimeError, NotImplementedError) as error:
            print(f"{way} of {new} tokens, {name}: {str(error).splitlines()[0]}", flush=True)
            del calls[way], times[way]
    for _ in range(options.repeats):
        for way, call in calls.items():
            times[way].append(seconds(call, options.device))
    found["seconds"] = {way: statistics.median(each) for way, each in times.items()}
    sdpa = [found["seconds"][way] for way in ("masked", "aligned") if way in calls]
    found["ratio"] = found["seconds"]["exact"] / min(sdpa) if sdpa else None
    return found


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512 << i for i in range(6)])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--held", type=int, default=144, help="full-precision tokens before the chunk")
    parser.add_argument("--kv-heads", type=int, help="default: 8 on a GPU, 1 on a CPU")
    parser.add_argument("--groups", type=int, default=4, help="query heads of a KV head")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    options.kv_heads = options.kv_heads or (8 if options.device == "cuda" else 1)
    torch.set_num_threads(options.threads)
    rows = []
    print(f"{'dtype':>9} {'tokens':>7}  ms and MiB of each way; exact in times of SDPA")
    for name in options.dtypes:
        for new in options.lengths:
            row = measure(new, options, name)
            rows.append(row)
            each = "  ".join(
                f"{way} {1e3 * row['seconds'][way]:.2f} {row['bytes'][way] / 2**20:.0f}"
                for way in row["seconds"]
            )
            ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
            print(f"{name:>9} {new:>7}  {each}  {ratio}", flush=True)
    if options.output:
        shape = {"query_heads": options.kv_heads * options.groups, "kv_heads": options.kv_heads}
        result = {
            "environment": describe("python benchmarks/" + command_line(*sys.argv))
            | {"threads": options.threads},
            "shape": shape | {"head_dim": options.dim, "held": options.held},
            "target_ratio": TARGET,
            "results": rows,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
