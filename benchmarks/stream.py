"""Long streams: memory against the accounting, time per step against the tokens a step selects.

    python benchmarks/stream.py --output stream-cpu.json
    python benchmarks/stream.py --device cuda --model smollm2 --output stream-h100.json

Three scenarios: many tokens generated after a short prompt, a chat of ten turns, and a long prompt
in pieces. "live" is what the tensors of the process take beyond those that were there before the
cache; it has to equal the cache's own accounting. Times are medians of the steps before a row.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import selfindex
from selfindex.config import BARE_SHARE
from selfindex.evaluation.environment import describe
from selfindex.evaluation.models import load as load_named
from selfindex.integrations.transformers.models import cache_argument

SLACK = 1 << 20
"""Bytes that may be live beside the cache: logits, and what libraries keep."""


def tiny_model() -> LlamaForCausalLM:
    """One layer with random weights: what the stream costs is all attention and cache."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=1 << 20,
        initializer_range=0.15,
    )
    return LlamaForCausalLM(config).eval()


def load(name: str, device: str) -> PreTrainedModel:
    """A model by name, in bfloat16 on a GPU."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = tiny_model() if name == "tiny" else load_named(name, device).model
    return model.to(device, dtype)


def live(device: str) -> int:
    """Bytes of all tensors; the CUDA allocator's blocks are up to 1 MiB larger each."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        return torch.cuda.memory_stats()["requested_bytes.all.current"]
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident() -> int:
    """Bytes of the process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Stream:
    """One sequence that grows, and the rows of its table."""

    def __init__(self, model: PreTrainedModel, device: str, budget: float | int) -> None:
        self.model, self.device, self._argument = model, device, cache_argument(model)
        self._before = live(device)
        self.cache = selfindex.SelfIndexCache(model, budget=budget, **BARE_SHARE)
        self.rows: list[dict[str, Any]] = []
        self._generator = torch.Generator().manual_seed(1)

    def tokens(self, count: int) -> Tensor:
        """Random ids [1, count]."""
        vocabulary = self.model.config.get_text_config().vocab_size
        return torch.randint(3, vocabulary, (1, count), generator=self._generator).to(self.device)

    def feed(self, ids: Tensor) -> tuple[Tensor, float]:
        """One forward pass: (the next token, seconds)."""
        start = time.perf_counter()
        logits = self.model(input_ids=ids, **{self._argument: self.cache}, logits_to_keep=1).logits
        chosen = logits[:, -1].argmax(-1)
        int(chosen)
        return chosen, time.perf_counter() - start

    def row(self, what: str, times: list[float]) -> None:
        """Add a row and check the accounting."""
        report = self.cache.report(missed=False)
        found = {
            "held": self.cache.get_seq_length(),
            "read": report.layers[0].read,
            "accounted": report.memory.total,
            "live": live(self.device) - self._before,
            "resident": resident(),
            "ms": 1e3 * statistics.median(times),
            "what": what,
        }
        self.rows.append(found)
        print(
            f"{what:>12} {found['held']:>8} held {found['read']:>7} read {found['ms']:>9.2f} ms "
            f"{found['accounted'] / 2**20:>9.2f} MiB accounted {found['live'] / 2**20:>9.2f} live "
            f"{found['resident'] / 2**20:>7.0f} resident",
            flush=True,
        )
        difference = abs(found["live"] - found["accounted"])
        assert difference <= SLACK + found["accounted"] // 100, f"{difference} bytes unaccounted"


def generate(stream: Stream, prompt: int, steps: int, every: int) -> None:
    """Many tokens after a short prompt."""
    token, _ = stream.feed(stream.tokens(prompt))
    times: list[float] = []
    for i in range(1, steps + 1):
        token, spent = stream.feed(token[:, None])
        times.append(spent)
        if i % every == 0:
            stream.row(f"step {i}", times[-every:])


def chat(stream: Stream, turns: int, said: int, answered: int) -> None:
    """Turns: a chunk of new tokens, then single steps."""
    for turn in range(1, turns + 1):
        token, spent = stream.feed(stream.tokens(said))
        stream.row(f"turn {turn} in", [spent])
        times = []
        for _ in range(answered):
            token, spent = stream.feed(token[:, None])
            times.append(spent)
        stream.row(f"turn {turn} out", times)


def prefill(stream: Stream, total: int, piece: int) -> None:
    """A long prompt in pieces."""
    times = []
    for i in range(1, total // piece + 1):
        times.append(stream.feed(stream.tokens(piece))[1])
        if i & (i - 1) == 0:
            stream.row(f"piece {i}", times[-1:])


@torch.inference_mode()
def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, or a name that `selfindex generate` takes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=float, default=0.05)
    parser.add_argument("--tokens", type=int, default=30_000)
    parser.add_argument("--every", type=int, default=3000, help="steps between two rows")
    parser.add_argument("--total", type=int, default=131_072, help="tokens of the long prompt")
    parser.add_argument("--piece", type=int, default=2048)
    parser.add_argument("--only", nargs="+", default=["generate", "chat", "prefill"])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    model = load(args.model, args.device)
    # What libraries allocate at their first use (cuBLAS 32 MiB on Hopper) is no part of a cache.
    model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=args.device), use_cache=False)
    scenarios: dict[str, Any] = {"generate": lambda s: generate(s, 200, args.tokens, args.every)}
    scenarios["chat"] = lambda s: chat(s, 10, 300, 200)
    scenarios["prefill"] = lambda s: prefill(s, args.total, args.piece)
    found: dict[str, Any] = {}
    command = shlex.join(["python", "benchmarks/stream.py", *(Path(a).name for a in sys.argv[1:])])
    for name in [x for x in scenarios if x in args.only]:
        print(name)
        stream = Stream(model, args.device, args.budget)
        found[name] = stream.rows
        try:
            scenarios[name](stream)
        finally:  # what was measured before an interruption is kept
            if args.output:
                result = {
                    "environment": describe(command),
                    "model": Path(args.model).name,
                    "device": args.device,
                }
                args.output.write_text(json.dumps(result | {"rows": found}, indent=1) + "\n")
        del stream


if __name__ == "__main__":
    main()
