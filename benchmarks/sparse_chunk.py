"""Time of a long chunk's sparse attention to an encoded prefix and to itself, against the best dense kernel.

    python benchmarks/sparse_chunk.py --output sparse_chunk.json [--preset paper] [--device cpu]

One row, one layer with 32 query heads over 8 KV heads of 128 (Llama-3.1-8B), bfloat16, random content, of
which the store encodes all but its full-precision tokens. What random keys select means nothing, so densities
are fixed; "read" is the density in the end, which the blocks that are always kept add to. Milliseconds,
medians:
  - decode: all pages to memory; selection: `select_blocks`; attention: `block_attend`; of all queries;
  - sparse: these three, one behind the other, and ratio: of the fastest dense kernel to that;
  - chunk: what a layer does, `attend` with prefill="sparse": the last queries, 256 or a few more, read
    everything, and parts are merged; chunk_ratio: of the fastest dense kernel to that;
  - exact: `attend` with prefill="exact";
  - dense: kernels over 16-bit keys and values of the prefix alone, without the chunk's own.
On a GPU times are replays of a CUDA graph, or between events with --timing events, where the host may be what
takes the time. Before anything is timed, outputs are checked: of density 1 against prefill="exact", of others
against the plain operators.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from prefill import DTYPES, difference, milliseconds
from torch import Tensor

from selfindex import SelfIndexConfig
from selfindex.attention.attend import attend
from selfindex.attention.chunk import FEWEST_QUERIES
from selfindex.attention.decoded import decode
from selfindex.attention.kernels import attend_plain
from selfindex.backends import fallback, ops, reference
from selfindex.backends.operators.select_blocks import BLOCK
from selfindex.config import PRESETS
from selfindex.evaluation.environment import command_line, describe
from selfindex.store import LayerStore

PIECE = 16384
"""Tokens appended to a store at a time."""


class Chunk:
    """A chunk of new tokens over a store that holds earlier ones."""

    def __init__(self, queries: int, tokens: int, args: argparse.Namespace) -> None:
        self.args, self.scaling = args, args.dim**-0.5
        self.config = SelfIndexConfig(
            preset=args.preset, prefill="sparse", prefill_mass=1.0, dense_below=0, sparse_queries=0
        )
        self.store = LayerStore(self.config, self.normal(args.kv_heads, 1))
        for first in range(0, tokens, PIECE):
            new = min(PIECE, tokens - first)
            keys, values = self.normal(args.kv_heads, new), self.normal(args.kv_heads, new)
            self.store.append(keys, values, self.normal(args.heads, new), None, self.scaling)
        self.tokens = self.store.length(0) + queries
        self.query = self.normal(args.heads, queries)
        self.keys, self.values = self.normal(args.kv_heads, queries), self.normal(args.kv_heads, queries)

    def normal(self, heads: int, tokens: int) -> Tensor:
        """Random numbers [1, heads, tokens, d], laid out as they leave a projection."""
        args, shape = self.args, (1, tokens, heads, self.args.dim)
        return torch.randn(shape, device=args.device).to(DTYPES[args.dtype]).transpose(1, 2)

    def attend(self, **options: Any) -> Tensor:
        """What a layer does, with these options of the cache."""
        self.store.config = replace(self.config, **options)
        return attend(self.store, self.query, self.keys, self.values, None, self.scaling)[0]

    def room(self) -> Tensor:
        """Memory for keys and values of the whole row, [2, H, tokens, d]; those of the pages are missing."""
        window, (sinks, encoded) = self.store.window, self.parts()
        room = self.query.new_empty(2, self.args.kv_heads, self.tokens, self.args.dim)
        full = (window.keys, self.keys), (window.values, self.values)
        for to, (held, new) in zip(room, full, strict=True):
            to[:, :sinks] = held[0, :, :sinks]
            to[:, sinks + encoded :] = torch.cat((held[0, :, sinks : window.lengths[0]], new[0]), 1)
        return room

    def parts(self) -> tuple[int, int]:
        """Tokens before the encoded ones, and these."""
        return min(self.config.sinks, self.store.window.lengths[0]), self.store.encoded(0)

    def decode(self, room: Tensor) -> None:
        """All pages, to their place."""
        sinks, encoded = self.parts()
        start = torch.zeros(1, dtype=torch.int32, device=room.device)
        pages = slice(0, self.store.table.pages)
        decode(self.store, slice(0, 1), pages, start, *room[:, :, sinks : sinks + encoded])


@torch.inference_mode()
def check(args: argparse.Namespace) -> dict[str, float]:
    """Largest differences, in times of 1 + |x|."""
    chunk = Chunk(FEWEST_QUERIES + 300, 2000, args)
    found = {"exact": difference(chunk.attend(prefill_density=1.0), chunk.attend(prefill="exact"))}
    room = chunk.room()
    chunk.decode(room)
    keys, values = room[:, None]
    selection = ops.select_blocks(chunk.query, keys, chunk.scaling, 1.0, 0.3)
    got, lse = ops.block_attend(chunk.query, keys, values, *selection, chunk.scaling)
    wanted, wanted_lse = reference.block_attend(chunk.query, keys, values, *selection, chunk.scaling)
    found |= {"sparse": difference(got, wanted), "sparse_lse": difference(lse, wanted_lse)}
    if max(found.values()) > 0.03:
        raise SystemExit(f"wrong results: {found}")
    return found


def timer(args: argparse.Namespace) -> Callable[[Callable[[], object]], float]:
    """What takes the time of a call, in milliseconds."""
    if args.device == "cpu" or args.timing == "events":
        return lambda work: milliseconds(work, args.repeats, args.device)
    from decode_attention import graph_time

    return lambda work: graph_time(work, args.repeats) / 1000


def dense_kernels(chunk: Chunk, keys: Tensor, values: Tensor) -> dict[str, Callable[[], object]]:
    """Dense attention to the prefix, not causal, by whoever has it."""
    if chunk.args.device == "cpu":
        return {"sdpa": lambda: attend_plain(chunk.query, keys, values, chunk.scaling, False)}
    import chunk_prefix

    return chunk_prefix.dense_kernels(chunk.query, keys, values)


@torch.inference_mode()
def measure(queries: int, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """One number of new tokens over one prefix."""
    torch.manual_seed(0)
    chunk, duration = Chunk(queries, tokens, args), timer(args)
    row: dict[str, Any] = {"queries": queries, "tokens": tokens, "encoded": chunk.store.encoded(0)}
    prefix = chunk.normal(args.kv_heads, tokens), chunk.normal(args.kv_heads, tokens)
    row["dense"] = {}
    for name, work in dense_kernels(chunk, *prefix).items():
        try:
            row["dense"][name] = duration(work)
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)
    del prefix
    best = row["dense_best"] = min(row["dense"].values())
    room = chunk.room()
    row["decode"] = duration(lambda: chunk.decode(room))
    row["exact"] = duration(lambda: chunk.attend(prefill="exact"))
    keys, values = room[:, None]
    row["sparse"] = []
    for density in args.densities:

        def select(density: float = density) -> tuple[Tensor, Tensor]:
            selected: tuple[Tensor, Tensor] = ops.select_blocks(
                chunk.query, keys, chunk.scaling, 1.0, density
            )
            return selected

        def read(selection: tuple[Tensor, Tensor]) -> Tensor:
            output: Tensor = ops.block_attend(chunk.query, keys, values, *selection, chunk.scaling)[0]
            return output

        def whole(density: float = density) -> Tensor:
            chunk.decode(room)
            return read(select(density))

        selection = select()
        blocks = -(-chunk.tokens // BLOCK)
        seen = torch.arange(blocks - selection[1].shape[-1], blocks) + 1
        found = {"density": density, "read": float(selection[1].double().mean() / seen.double().mean())}
        found["selection"] = duration(select)
        found["attention"] = duration(lambda s=selection: read(s))  # type: ignore[misc]
        found["sparse"] = duration(whole)
        found["chunk"] = duration(lambda d=density: chunk.attend(prefill_density=d))  # type: ignore[misc]
        found |= {"ratio": best / found["sparse"], "chunk_ratio": best / found["chunk"]}
        row["sparse"].append(found)
        own = {name: f"{found[name]:.3f}" for name in ("selection", "attention", "sparse", "chunk")}
        print(
            f"{queries:>5} over {tokens:>6} density {density:.0%} read {found['read']:.1%} | "
            f"dense {best:.3f} exact {row['exact']:.3f} | decode {row['decode']:.3f} "
            f"select {own['selection']} attend {own['attention']} all {own['sparse']} ms "
            f"{found['ratio']:.2f} x | with exact tail {own['chunk']} ms {found['chunk_ratio']:.2f} x",
            flush=True,
        )
    times = []
    for _ in range(args.repeats):
        if args.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        chunk.attend(prefill_density=args.densities[0])
        times.append(1e3 * (time.perf_counter() - start))
    # What launching takes; on a CPU, everything.
    row["host"] = statistics.median(times)
    return row


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--queries", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--preset", choices=PRESETS, default="balanced")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--timing", choices=["graph", "events"], default="graph", help="on a GPU")
    args = parser.parse_args()
    if min(args.queries) <= FEWEST_QUERIES:
        parser.error(f"chunks of up to {FEWEST_QUERIES} tokens read everything")
    slow: list[str] = []

    def note(name: str, fast: bool, arguments: tuple[Any, ...]) -> None:
        if name in ("block_attend", "select_blocks", "decode_pages") and not fast:
            slow.append(name)

    result: dict[str, Any] = {
        "environment": describe("python benchmarks/" + command_line(*sys.argv)),
        "shape": {"query_heads": args.heads, "kv_heads": args.kv_heads, "head_dim": args.dim,
                  "dtype": args.dtype, "preset": args.preset},
        "timing": args.timing if args.device == "cuda" else "host",
        "results": [],
    }  # fmt: skip
    with fallback.observed(note):
        result["differences"] = check(args)
        print("differences", result["differences"], flush=True)
        for tokens in args.tokens:
            for queries in args.queries:
                result["results"].append(measure(queries, tokens, args))
                if args.output:
                    args.output.parent.mkdir(parents=True, exist_ok=True)
                    args.output.write_text(json.dumps(result, indent=1) + "\n")
    if slow:
        raise SystemExit(f"PyTorch ran instead of fast operators: {sorted(set(slow))}")


if __name__ == "__main__":
    main()
