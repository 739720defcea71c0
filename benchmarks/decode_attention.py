"""Time of sparse decode attention against the best dense kernel of PyTorch, on one GPU.

    python benchmarks/decode_attention.py --output decode_attention.json [--preset paper]

32 query heads, 8 KV heads, head_dim 128, bfloat16, 5 % budget. Everything is timed as replays of a
CUDA graph that goes through several input sets, so that small sizes do not live in the cache.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from selfindex.backends import ops
from selfindex.backends.cuda.decode import Decode
from selfindex.codec import PageFormat
from selfindex.config import PRESETS, SelfIndexConfig

HEADS, GROUPS, DIM, PAGE = 8, 4, 128, 128
DEFAULT = SelfIndexConfig()
"""Whose budget is read."""
FLUSH = 256 << 20
"""Bytes of input that one replay goes through at least (several times the L2 cache), sets permitting."""
MOST_SETS = 8
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def graph_time(work: Callable[[], object], repeats: int = 40) -> float:
    """Median microseconds of one replay of `work`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for i in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def constants_of(fmt: PageFormat, keys: torch.Tensor) -> torch.Tensor:
    """What pages share: a balance of ones, or the paper preset's statistics of keys [n, H, P, d]."""
    if fmt.preset == "paper":
        return ops.prompt_statistics(keys.transpose(0, 1).flatten(1, 2))[None]
    return torch.ones(1, fmt.kv_heads, fmt.head_dim, device="cuda")


def encoded_pages(fmt: PageFormat, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random pages and their constants: Gaussian keys around a mean, a few percent of them loud."""
    keys = torch.randn(count, HEADS, PAGE, DIM, device="cuda") + torch.randn(1, HEADS, 1, DIM, device="cuda")
    keys *= 1 + (torch.rand(count, HEADS, PAGE, 1, device="cuda") < 0.05)
    values = torch.randn(count, HEADS, PAGE, DIM, device="cuda")
    constants = constants_of(fmt, keys.bfloat16())
    counts = torch.full((count,), PAGE, dtype=torch.int32, device="cuda")
    return *ops.encode(keys.bfloat16(), values.bfloat16(), counts, constants, fmt.name), constants


def arguments(
    batch: int, length: int, fmt: PageFormat, sets: int, config: SelfIndexConfig
) -> list[tuple[Any, ...]]:
    """Arguments of `sparse_decode` on `sets` independent caches."""
    index, payload, constants = encoded_pages(fmt, 256)
    pages = length // PAGE
    budget = config.budget_tokens(length, length)
    found: list[tuple[Any, ...]] = []
    for _ in range(sets):
        source = torch.randint(index.shape[0], (batch * pages,), device="cuda")
        table = torch.randperm(batch * pages, device="cuda").int().view(batch, pages)
        counts = torch.full((batch, pages), PAGE, dtype=torch.int32, device="cuda")
        counts[:, -1] -= torch.arange(batch, device="cuda") % PAGE
        query = torch.randn(batch, HEADS * GROUPS, 1, DIM, device="cuda").bfloat16()
        wanted = torch.full((batch,), budget, dtype=torch.int32, device="cuda")
        planes = query, index[source], payload[source], table, counts
        found.append((*planes, wanted, budget, constants, DIM**-0.5, fmt.name))
    return found


def time_sparse(
    batch: int, length: int, fmt: PageFormat, config: SelfIndexConfig = DEFAULT
) -> dict[str, float]:
    """Microseconds of a call, and of each of its stages alone."""
    size = batch * (length // PAGE) * (fmt.index_bytes + fmt.payload_bytes)
    read = batch * length // PAGE * fmt.index_bytes
    sets = arguments(
        batch, length, fmt, max(1, min(MOST_SETS, -(-FLUSH // read), (24 << 30) // size)), config
    )
    # As in a model, the calls of a graph take turns in the same workspace.
    found = {"call": graph_time(lambda: [ops.sparse_decode(*given) for given in sets])}
    found["decode"] = graph_time(lambda: [Decode(*given).run(("decode",)) for given in sets])
    calls = [Decode(*given) for given in sets]
    for call in calls:
        call.run()
    found["attend"] = graph_time(lambda: [call.run(("attend",)) for call in calls])
    return {name: time / len(sets) for name, time in found.items()}


def time_dense(batch: int, length: int) -> dict[str, float]:
    """Microseconds of each dense kernel that runs."""
    size = 4 * batch * HEADS * length * DIM
    sets = max(1, min(MOST_SETS, -(-FLUSH // size)))
    query = torch.randn(batch, HEADS * GROUPS, 1, DIM, device="cuda").bfloat16()
    shape = (batch, HEADS, length, DIM)
    caches = [
        [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)] for _ in range(sets)
    ]
    found = {}
    for name, backend in BACKENDS.items():

        def work(backend: SDPBackend = backend) -> None:
            with sdpa_kernel(backend):
                for keys, values in caches:
                    F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

        try:
            found[name] = graph_time(work, 20) / sets
        except RuntimeError as error:
            print(f"dense {name} at {batch} x {length}: {error}", flush=True)
    return found


def copy_bandwidth() -> float:
    """TB/s of a large device-to-device copy, bytes read plus bytes written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_(0, 255)
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_time(lambda: target.copy_(source)) / 1e6


def environment() -> dict[str, str]:
    """What the numbers depend on."""
    found = {"date": datetime.date.today().isoformat()}
    found |= {"python": platform.python_version(), "torch": torch.__version__}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found |= {"cuda": str(torch.version.cuda), "device": device}
    for name in ("selfindex", "cuda-core", "nvidia-cuda-nvrtc", "nvidia-cudnn-cu13"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def crossover(rows: list[dict[str, Any]], batch: int) -> int | None:
    """Shortest measured length from which on sparse decode is never slower than dense."""
    best = None
    for row in sorted((r for r in rows if r["batch"] == batch), key=lambda r: -r["length"]):
        if row["ratio"] < 1:
            break
        best = row["length"]
    return best


def table(rows: list[dict[str, Any]], bandwidth: float, fmt: PageFormat) -> str:
    """The results as text."""
    lines = [f"copy {bandwidth:.2f} TB/s; microseconds", ""]
    lines.append(
        f"{'batch':>5} {'length':>7} {'dense':>8} {'best':>6} {'sparse':>8} {'ratio':>6}  "
        f"{'decode':>7} {'attend':>7}  index TB/s"
    )
    for row in rows:
        stages, ratio = row["sparse"], row["ratio"]
        read = row["batch"] * row["length"] / PAGE * fmt.index_bytes
        lines.append(
            f"{row['batch']:>5} {row['length']:>7} {row['dense_best']:>8.1f} {row['dense_kernel']:>6} "
            f"{stages['call']:>8.1f} {ratio:>5.1f}x  {stages['decode']:>7.1f} "
            f"{stages['attend']:>7.1f}  {read / stages['decode'] / 1e6:.2f}"
        )
    for batch in sorted({row["batch"] for row in rows}):
        lines.append(f"batch {batch}: sparse is faster from {crossover(rows, batch)} tokens on")
    return "\n".join(lines)


def main() -> None:
    """Measure, write JSON, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--preset", choices=PRESETS, default="balanced")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8 << (10 + i) for i in range(7)])
    parser.add_argument("--budget", type=float, default=DEFAULT.budget, help="share of the tokens")
    parser.add_argument("--min-tokens", type=int, default=DEFAULT.min_tokens, help="floor under it")
    parser.add_argument("--memory", type=float, default=60.0, help="GB that a size may take")
    options = parser.parse_args()
    config = SelfIndexConfig(budget=options.budget, min_tokens=options.min_tokens)
    torch.manual_seed(0)
    fmt = PageFormat(options.preset, HEADS, DIM, PAGE)
    bandwidth = copy_bandwidth()
    rows: list[dict[str, Any]] = []
    for batch in options.batches:
        for length in options.lengths:
            if 4e-9 * batch * HEADS * length * DIM > options.memory:
                continue
            torch.cuda.empty_cache()
            sparse = time_sparse(batch, length, fmt, config)
            torch.cuda.empty_cache()
            dense = time_dense(batch, length)
            kernel = min(dense, key=dense.__getitem__)
            rows.append(
                {
                    "batch": batch,
                    "length": length,
                    "sparse": sparse,
                    "dense": dense,
                    "dense_best": dense[kernel],
                    "dense_kernel": kernel,
                    "ratio": dense[kernel] / sparse["call"],
                }
            )
            print(f"{batch} x {length}: {rows[-1]['ratio']:.2f}x", flush=True)
    batches = sorted({row["batch"] for row in rows})
    result = {
        "environment": environment(),
        "shape": {
            "query_heads": HEADS * GROUPS,
            "kv_heads": HEADS,
            "head_dim": DIM,
            "budget": config.budget,
            "min_tokens": config.min_tokens,
        },
        "format": fmt.name,
        "copy_tb_per_s": bandwidth,
        "crossover": {str(batch): crossover(rows, batch) for batch in batches},
        "results": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows, bandwidth, fmt))


if __name__ == "__main__":
    main()
