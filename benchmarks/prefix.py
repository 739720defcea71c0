"""Time to load a compressed prefix against reading its file and against encoding it again.

    python benchmarks/prefix.py --output prefix.json

Keys and values are random, in the shapes of Llama-3.1-8B (8 KV heads of 128 channels) or of what the
options say. "encode" is the encoding alone: making the prefix again takes a model's whole prefill on top.
"cold" evicts the file from the page cache first. Medians of --repeats.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import selfindex
from selfindex.evaluation.environment import describe

Spent = tuple[float, float]
"""Seconds: by the clock, and of all processors together. The latter do not depend on what else runs."""


def make_model(layers: int, device: str) -> LlamaForCausalLM:
    """A model whose cache has the shapes of Llama-3.1-8B's; the rest of it is small."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=1 << 20,
    )
    return LlamaForCausalLM(config).to(device, torch.bfloat16).eval()


@torch.inference_mode()
def fill(cache: selfindex.SelfIndexCache, tokens: int, chunk: int, device: str) -> Spent:
    """Put random tokens into every layer; returns what storing and encoding took."""
    spent = (0.0, 0.0)
    for layer in cache.compressed_layers:
        for start in range(0, tokens, chunk):
            new = min(chunk, tokens - start)
            keys, values = (
                torch.randn(1, 8, new, 128, dtype=torch.bfloat16, device=device) for _ in range(2)
            )
            query = keys.repeat_interleave(4, 1)
            begin = now(device)
            layer.commit(query, keys, values, None, 128**-0.5)
            spent = since(begin, device, spent)
    return spent


def now(device: str) -> Spent:
    """Seconds of the clock and of the processors, once the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def since(begin: Spent, device: str, more: Spent = (0.0, 0.0)) -> Spent:
    """Seconds since `begin`, and `more`."""
    end = now(device)
    return more[0] + end[0] - begin[0], more[1] + end[1] - begin[1]


def median(run: Callable[[], Any], repeats: int, device: str, before: Callable[[], None]) -> Spent:
    """Median seconds of a call; `before` each is not timed, and what it returns is dropped."""
    times = []
    for _ in range(repeats):
        gc.collect()
        before()
        start = now(device)
        found = run()
        times.append(since(start, device))
        del found
    clock, processors = zip(*times, strict=True)
    return statistics.median(clock), statistics.median(processors)


def evict(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> int:
    """Read a file as fast as Python can."""
    buffer, total = bytearray(16 << 20), 0
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(buffer):
            total += got
    return total


def make(model: LlamaForCausalLM, path: Path, args: argparse.Namespace) -> dict[str, Spent]:
    """Encode a prefix and write its file."""
    cache = selfindex.SelfIndexCache(model)
    encode = fill(cache, args.tokens, args.chunk, args.device)
    return {"encode": encode, "save": median(lambda: cache.save(model, path), 2, args.device, lambda: None)}


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="where the file goes: the disk that is measured")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = make_model(args.layers, args.device)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "prefix"
        found = make(model, path, args)

        def load() -> selfindex.SelfIndexCache:
            return selfindex.SelfIndexCache.load(model, path)

        for name, run in (("read", lambda: read(path)), ("load", load)):
            found[f"{name}_cold"] = median(run, args.repeats, args.device, lambda: evict(path))
            read(path)
            found[f"{name}_warm"] = median(run, args.repeats, args.device, lambda: None)
        size = path.stat().st_size
    print(f"{args.tokens} tokens in {args.layers} layers: {size / 1e9:.2f} GB")
    for name, (clock, processors) in found.items():
        print(f"{name:10} {clock:8.2f} s, {processors:8.2f} s of processors, {size / 1e9 / clock:6.2f} GB/s")
    if args.output:
        command = shlex.join(["python", "benchmarks/prefix.py", *(Path(a).name for a in sys.argv[1:])])
        result = {
            "environment": describe(command),
            "shape": {"tokens": args.tokens, "layers": args.layers, "kv_heads": 8, "head_dim": 128},
            "device": args.device,
            "bytes": size,
            "seconds": found,
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
