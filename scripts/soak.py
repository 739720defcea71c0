"""Random use of many caches at once, watched for errors, mismatches and growing memory.

    python scripts/soak.py --seconds 600 --output soak-cpu.json
    python scripts/soak.py --seconds 600 --device cuda --output soak-h100.json

Every action is drawn at random: a new cache (length, batch, padding, budget, value bits, preset, offloading,
dtype), steps, chunks, decode loops, crop, fork, copy, rows changing place, save and load, reset. After each,
a cache has to hold what a list of its token ids says: counted in every layer, compared in the first, where
keys depend on nothing but token and position. Now and then the operators that serve the device are
compared with the reference operators on the cache's own pages. Exits with 1 after any error.

Prompts and chunks have one of a few lengths that the seed draws, and cuDNN computes no attention: the
libraries under PyTorch keep about 2 MiB for every length (scripts/leaks.py), which would hide a leak of ours.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import random
import shlex
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from stores import held_tokens
from tiny_models import forward, make_model, prompt
from transformers import DynamicCache
from uses import memory

import selfindex
from selfindex.backends import ops, reference
from selfindex.evaluation.environment import describe
from selfindex.store import LayerStore
from selfindex.store.state import export, restore

MOST, LONGEST = 6, 1500
"""Caches alive at a time, and tokens of a row after which a cache is given up."""
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2}
"""Relative error of an operator's output on the same tokens."""


class Soak:
    """Models, caches, and what each cache should hold: [cache, model's key, ids, padding mask]."""

    def __init__(self, device: str, seed: int) -> None:
        self.device, self.random = device, random.Random(seed)
        self.models, self.exact = {}, {}
        for family in ("llama", "qwen3"):
            for dtype in (torch.float32, torch.bfloat16):
                model = make_model(family, dtype=dtype, max_position_embeddings=4096)
                self.models[family, dtype] = copy.deepcopy(model).to(device)
                self.exact[family, dtype] = model.to(device)
        self.prompts = [1, 700, *self.random.sample(range(2, 700), 18)]
        self.chunks = [2, 300, *self.random.sample(range(3, 300), 8)]
        self.live: list[list[Any]] = []
        self.forwards = self.tokens = 0
        self.done: collections.Counter[str] = collections.Counter()
        self.folder = tempfile.TemporaryDirectory()

    def act(self) -> None:
        """One random action and its check."""
        names = ["step", "step", "chunk", "chunk", "loop", "crop", "fork", "copy", "rows", "disk", "end"]
        name = self.random.choice(names) if self.live else "new"
        if len(self.live) < MOST and self.random.random() < 0.3:
            name = "new"
        if name == "new":
            self.new()
            entry = self.live[-1]
        else:
            entry = self.random.choice(self.live)
            getattr(self, name)(entry)
        self.done[name] += 1
        if entry in self.live:
            self.check(entry)
            if entry[2].shape[1] > LONGEST:
                self.live.remove(entry)

    def new(self) -> None:
        key = self.random.choice(list(self.models))
        options: dict[str, Any] = {
            "budget": self.random.choice([0.05, 0.3, 1.0, 64]),
            "dense_below": self.random.choice([0, 1024]),
            "value_bits": self.random.choice([2, 3]),
            "offloading": self.random.random() < 0.2,
        }
        if self.random.random() < 0.1:
            options |= {"preset": "paper", "value_bits": 2}
        batch, length = self.random.randint(1, 3), self.random.choice(self.prompts)
        mask = torch.ones(batch, length, dtype=torch.long)
        for row in mask[1:]:
            if self.random.random() < 0.4:
                row[: self.random.randint(0, length - 1)] = 0
        cache = selfindex.SelfIndexCache(self.models[key], **options)
        self.live.append([cache, key, torch.zeros(batch, 0, dtype=torch.long), mask[:, :0]])
        self.say(self.live[-1], mask)

    def say(self, entry: list[Any], fresh: Tensor) -> None:
        """Feed random tokens in the positions of `fresh` [B, new]."""
        cache, key, ids, mask = entry
        new = prompt(fresh.shape[1], len(fresh), self.random.randrange(1 << 30))
        entry[2], entry[3] = torch.cat((ids, new), 1), torch.cat((mask, fresh), 1)
        positions = (entry[3].cumsum(1) - 1).clamp(min=0)[:, -fresh.shape[1] :]
        given = None if bool(entry[3].all()) else entry[3].to(self.device)
        logits = forward(
            self.models[key], new.to(self.device), cache, given, position_ids=positions.to(self.device)
        )
        real = logits[fresh.bool().to(self.device)]
        assert torch.isfinite(real).all(), "logits are not finite"
        self.count(1, fresh)

    def count(self, forwards: int, fresh: Tensor) -> None:
        """Forward passes that were run, and their tokens: mask [B, new]."""
        self.forwards, self.tokens = self.forwards + forwards, self.tokens + int(fresh.sum())

    def step(self, entry: list[Any]) -> None:
        for _ in range(self.random.randint(1, 40)):
            self.say(entry, torch.ones(len(entry[2]), 1, dtype=torch.long))

    def chunk(self, entry: list[Any]) -> None:
        self.say(entry, torch.ones(len(entry[2]), self.random.choice(self.chunks), dtype=torch.long))

    def loop(self, entry: list[Any]) -> None:
        cache, _, ids, _ = entry
        steps = self.random.randint(1, 150)
        cache.replay.emulate = True  # on a GPU such steps are a graph anyway
        for _ in range(steps):
            self.say(entry, torch.ones(len(ids), 1, dtype=torch.long))

    def crop(self, entry: list[Any]) -> None:
        cache, _, ids, mask = entry
        keep = self.random.randint(int(mask.argmax(1).max()) + 1, ids.shape[1])
        try:
            cache.crop(keep - ids.shape[1])
        except selfindex.StateError:
            assert cache.config.preset == "paper", "crop was refused"
        else:
            entry[2], entry[3] = ids[:, :keep], mask[:, :keep]

    def fork(self, entry: list[Any]) -> None:
        self.live.append([entry[0].fork(), *entry[1:]])
        self.drop_some()

    def copy(self, entry: list[Any]) -> None:
        self.live.append([copy.deepcopy(entry[0]), *entry[1:]])
        self.drop_some()

    def drop_some(self) -> None:
        while len(self.live) > MOST:
            self.live.pop(self.random.randrange(len(self.live)))

    def rows(self, entry: list[Any]) -> None:
        batch = len(entry[2])
        order = torch.tensor([self.random.randrange(batch) for _ in range(self.random.randint(1, 3))])
        if len(order) == batch:
            entry[0].reorder_cache(order)
        else:
            entry[0].batch_select_indices(order)
        entry[2], entry[3] = entry[2][order], entry[3][order]

    def disk(self, entry: list[Any]) -> None:
        path, model = Path(self.folder.name) / "cache", self.models[entry[1]]
        entry[0].save(model, path)
        entry[0] = selfindex.SelfIndexCache.load(model, path)

    def end(self, entry: list[Any]) -> None:
        entry[0].reset()
        assert entry[0].report().memory.total == 0, "a reset cache holds memory"
        self.live.remove(entry)

    def check(self, entry: list[Any]) -> None:
        """Compare a cache with the list of its tokens, and the operators with the reference."""
        cache, key, ids, mask = entry
        assert cache.get_seq_length() == ids.shape[1], "length"
        for layer in cache.compressed_layers:
            store = layer.store
            assert [store.length(b) for b in range(store.batch)] == mask.sum(1).tolist(), "tokens of a row"
            held = collections.Counter(b for row in store.table.rows for b in row.blocks)
            assert all(store.pool._references[b] >= n for b, n in held.items()), "references"
        if self.random.random() < 0.3:
            self.check_operator(cache)
        if self.random.random() < 0.2 and cache.config.preset == "balanced" and key[1] == torch.float32:
            row = self.random.randrange(len(ids))
            self.check_tokens(cache, key, ids[row][mask[row].bool()], row)
            self.done["tokens compared"] += 1

    def check_tokens(self, cache: selfindex.SelfIndexCache, key: Any, ids: Tensor, row: int) -> None:
        """Compare a row of the first layer with what the model computes for these ids [n]."""
        dense = DynamicCache(config=self.models[key].config)
        forward(self.exact[key], ids[None].to(self.device), dense)
        store = on_cpu(cache.compressed_layers[0].store)
        held, encoded = min(store.config.sinks, store.window.lengths[row]), store.encoded(row)
        raw = [*range(held), *range(held + encoded, len(ids))]
        for got, exact in zip(
            held_tokens(store, row), (dense.layers[0].keys[0], dense.layers[0].values[0]), strict=True
        ):
            torch.testing.assert_close(got[:, raw], exact[:, raw].cpu(), atol=1e-3, rtol=1e-3)
            error = (got - exact.cpu()).norm(dim=-1)
            assert (error < 0.75 * exact.norm(dim=-1).mean().cpu()).all(), "an encoded token is another one"

    def check_operator(self, cache: selfindex.SelfIndexCache) -> None:
        store = self.random.choice(cache.compressed_layers).store
        counts = [store.encoded(b) for b in range(store.batch)]
        if not any(counts):
            return
        table, pages = store.table.tensors()
        heads, dim, dtype = store.format.kv_heads, store.format.head_dim, store.window.keys.dtype
        query = torch.randn(store.batch, 2 * heads, 1, dim, device=self.device).to(dtype)
        share = self.random.choice([1, 4, 20])
        budgets = [min(n, max(32, n // share)) for n in counts]
        wanted = torch.tensor(budgets, dtype=torch.int32, device=self.device)
        common = (store.constants, dim**-0.5, store.format.name)
        planes = (store.pool.index, store.pool.payload, table, pages)
        got, mass = ops.sparse_decode(query, *planes, wanted, max(budgets), *common)
        exact, wanted_mass = reference.sparse_decode(query, *planes, wanted, max(budgets), *common)
        error = float((got - exact).norm() / exact.norm())
        if budgets == counts:
            assert error < TOLERANCE[dtype], f"sparse_decode differs from the reference by {error:.1e}"
        else:
            # Of nearly equal tokens at the edge of the budget, tables of 8 bits may take others, but
            # no worse ones on average.
            lost = float((wanted_mass - mass)[torch.isfinite(wanted_mass)].mean())
            assert abs(lost) < 0.2, f"the selection has exp({-lost:.2f}) of the reference's softmax mass"
        got, _ = ops.dense_attend(query, *planes, *common)
        exact, _ = reference.dense_attend(query, *planes, *common)
        error = float((got - exact).norm() / exact.norm())
        assert error < TOLERANCE[dtype], f"dense_attend differs from the reference by {error:.1e}"
        self.done["operators compared"] += 1


def on_cpu(store: LayerStore) -> LayerStore:
    """A copy of a store on the CPU."""
    tensors, numbers = export(store)
    config = selfindex.SelfIndexConfig.make(store.config, offloading=False)
    return restore(config, {name: x.cpu() for name, x in tensors.items()}, numbers)


def main() -> int:
    """Run, print, write JSON; 1 after any error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--actions", type=int, default=1 << 60)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=10, help="times that all caches are dropped")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(False)
    soak, errors, readings = Soak(args.device, args.seed), [], []
    start, actions = time.monotonic(), 0
    for i in range(args.rounds):
        while time.monotonic() - start < args.seconds * (i + 1) / args.rounds and actions < args.actions:
            actions += 1
            try:
                soak.act()
            except Exception as error:
                errors.append(f"action {actions}: {type(error).__name__}: {error}"[:500])
                traceback.print_exc()
                soak.live.clear()
        # With no cache left, memory has to be what it was after the first round.
        soak.live.clear()
        readings.append(memory(args.device))
        print(f"{actions} actions, {len(errors)} errors, {readings[-1]}", flush=True)
    print(dict(soak.done), f"{soak.forwards} forward passes, {soak.tokens} tokens")
    if args.output:
        command = shlex.join(["python", "scripts/soak.py", *(Path(a).name for a in sys.argv[1:])])
        result = {
            "environment": describe(command),
            "device": args.device,
            "actions": actions,
            "forwards": soak.forwards,
            "tokens": soak.tokens,
            "counts": dict(soak.done),
            "errors": errors,
            "memory": readings,
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
