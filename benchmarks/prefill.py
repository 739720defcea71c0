"""Time of a long prompt's attention, sparse against dense, and to the first token.

    python benchmarks/prefill.py --output prefill.json
    python benchmarks/prefill.py --output prefill.json --ttft 32768 131072 --layers 8
    python benchmarks/prefill.py --output prefill-cpu.json --device cpu --dtype float32 --lengths \
        --model smollm2 --ttft 8192 --densities 0.05 0.1

Operator: one row, 32 query heads over 8 KV heads of 128 (Llama-3.1-8B), bfloat16, random content. What random
keys select means nothing, so densities are fixed: "selection" is `select_blocks` and "attention"
`block_attend`, the ratio is of the fastest of cuDNN and FlashAttention through
`scaled_dot_product_attention` to both together. "read" is the density in the end, which some blocks that are
always kept add to. Before anything is timed, outputs are checked: of density 1 against dense attention, of
others against the reference operator at the shortest length.
First token: Llama-3.1-8B's shapes with random weights and so many layers, or the model that is given, a
forward pass over the prompt (encoding it included) with `SelfIndexCache`, prefill="exact" against "sparse";
medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import selfindex
from selfindex.backends import fallback, ops, reference
from selfindex.backends.operators.select_blocks import BLOCK
from selfindex.evaluation.environment import command_line, describe
from selfindex.evaluation.models import load, quiet
from selfindex.integrations.transformers.models import cache_argument

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def milliseconds(work: Callable[[], object], repeats: int, device: str) -> float:
    """Median time of a call on the device, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        if device == "cpu":
            before = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - before))
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def random_prompt(tokens: int, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """(query, keys, values), laid out as they leave a projection."""

    def normal(heads: int) -> Tensor:
        shape = 1, tokens, heads, args.dim
        return torch.randn(shape, device=args.device, dtype=DTYPES[args.dtype]).transpose(1, 2)

    return normal(args.heads), normal(args.kv_heads), normal(args.kv_heads)


def dense_times(prompt: tuple[Tensor, Tensor, Tensor], args: argparse.Namespace) -> dict[str, float | None]:
    """Milliseconds of every backend; None where it does not take this."""
    found: dict[str, float | None] = {}
    backends = BACKENDS if args.device == "cuda" else {"flash": BACKENDS["flash"]}
    for name, backend in backends.items():

        def dense() -> Tensor:
            return F.scaled_dot_product_attention(*prompt, is_causal=True, enable_gqa=True)

        try:
            with sdpa_kernel(backend):
                found[name] = milliseconds(dense, args.repeats, args.device)
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)
            found[name] = None
    return found


def read_share(counts: Tensor) -> float:
    """Share of the causal pairs of blocks that are read."""
    blocks = counts.shape[-1]
    return float(counts.double().mean() * 2 / (blocks + 1))


def difference(one: Tensor, other: Tensor) -> float:
    """The largest, in times of 1 + |x|."""
    return float(((one.float() - other.float()).abs() / (1 + other.float().abs())).max())


@torch.inference_mode()
def check(args: argparse.Namespace) -> dict[str, float]:
    """Largest differences from dense attention and from the reference operator, in times of 1 + |x|."""
    query, keys, values = random_prompt(3 * 1024 + 77, args)
    scaling = args.dim**-0.5
    found = {}
    for name, density in (("dense", 1.0), ("sparse", 0.3)):
        selection = ops.select_blocks(query, keys, scaling, 1.0, density)
        got, lse = ops.block_attend(query, keys, values, *selection, scaling)
        wanted, wanted_lse = reference.block_attend(query, keys, values, *selection, scaling)
        if name == "dense":
            whole = F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
            found["dense"] = difference(got, whole)
        found[f"{name}_reference"] = difference(got, wanted)
        found[f"{name}_lse"] = difference(lse, wanted_lse)
    if max(found.values()) > 0.03:
        raise SystemExit(f"wrong results: {found}")
    return found


def start_of_peak(device: str) -> int | None:
    """Bytes in use, from where on the most is noted; None where nobody notes it."""
    if device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


@torch.inference_mode()
def operator(tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """One length."""
    prompt, scaling = random_prompt(tokens, args), args.dim**-0.5
    dense = dense_times(prompt, args)
    best = min((x for x in dense.values() if x is not None), default=None)
    row: dict[str, Any] = {"tokens": tokens, "dense": dense, "dense_best": best, "sparse": []}
    for density in args.densities:
        before = start_of_peak(args.device)

        def select(density: float = density) -> tuple[Tensor, Tensor]:
            selected: tuple[Tensor, Tensor] = ops.select_blocks(*prompt[:2], scaling, 1.0, density)
            return selected

        # Without a target mass; with one, selection does the same work.
        selection = milliseconds(select, args.repeats, args.device)
        blocks, counts = select()
        attention = milliseconds(
            lambda b=blocks, c=counts: ops.block_attend(*prompt, b, c, scaling),  # type: ignore[misc]
            args.repeats,
            args.device,
        )
        peak = None if before is None else (torch.cuda.max_memory_allocated() - before) / 1e6
        found = {"density": density, "read": read_share(counts), "selection": selection,
                 "attention": attention, "peak_mb": peak}  # fmt: skip
        found["ratio"] = best / (selection + attention) if best else None
        row["sparse"].append(found)
        times = ", ".join(f"{name} {'-' if x is None else f'{x:.2f}'}" for name, x in dense.items())
        ratio = f"{found['ratio']:.2f}" if best else "-"
        print(
            f"{tokens:>7} dense {times} | density {density:.0%} read {found['read']:.1%} "
            f"select {selection:.2f} attend {attention:.2f} ms  ratio {ratio}"
            + ("" if peak is None else f"  {peak:.0f} MB"),
            flush=True,
        )
    return row


@torch.inference_mode()
def first_token(model: Any, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a pass over a prompt."""
    ids = torch.randint(3, model.config.vocab_size, (1, tokens), device=args.device)
    row: dict[str, Any] = {"tokens": tokens, "layers": model.config.num_hidden_layers, "ms": {}}
    row["model"] = args.model
    ways: dict[str, dict[str, Any]] = {"exact": {}}
    for density in args.densities:
        ways[f"sparse {density:g}"] = {"prefill": "sparse", "prefill_mass": 1.0, "prefill_density": density}
    for name, options in ways.items():

        def run(options: dict[str, Any] = options) -> None:
            cache = selfindex.SelfIndexCache(model, **options)
            model(input_ids=ids, **{cache_argument(model): cache}, logits_to_keep=1)

        row["ms"][name] = milliseconds(run, 3, args.device)
        exact = row["ms"]["exact"]
        print(
            f"{tokens:>7} first token, {row['layers']} layers, {name}: {row['ms'][name]:.1f} ms, "
            f"ratio {exact / row['ms'][name]:.2f}",
            flush=True,
        )
    return row


def model_of(args: argparse.Namespace) -> Any:
    """What to time the first token of."""
    if args.model:
        quiet()
        return load(args.model, args.device, args.dtype).model
    from end_to_end import llama

    return llama(args.layers)


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--lengths", type=int, nargs="*", default=[32768 << i for i in range(5)])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ttft", type=int, nargs="*", default=[], help="prompts to time a model with")
    parser.add_argument("--layers", type=int, default=32, help="of that model, without --model")
    parser.add_argument(
        "--model", help="smollm2, a folder, a .gguf file or a hub name; default: random weights"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    if args.ttft and args.device == "cpu" and not args.model:
        parser.error("on a CPU the first token is that of a --model")
    torch.manual_seed(0)
    slow: list[str] = []

    def note(name: str, fast: bool, arguments: tuple[Any, ...]) -> None:
        if name == "block_attend" and not fast:
            slow.append(name)

    result: dict[str, Any] = {
        "environment": describe("python benchmarks/" + command_line(*sys.argv)),
        "shape": {"query_heads": args.heads, "kv_heads": args.kv_heads, "head_dim": args.dim,
                  "dtype": args.dtype, "block": BLOCK},
        "results": [],
        "first_token": [],
    }  # fmt: skip

    def keep() -> None:
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n")

    with fallback.observed(note):
        result["differences"] = check(args)
        print("differences", result["differences"], flush=True)
        if slow:
            raise SystemExit("the fast operator did not run: see the warning above")
        for tokens in args.lengths:
            result["results"].append(operator(tokens, args))
            keep()
        if args.ttft:
            model = model_of(args)
            for tokens in args.ttft:
                result["first_token"].append(first_token(model, tokens, args))
                keep()


if __name__ == "__main__":
    main()
