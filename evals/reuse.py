"""How much of what a decode step selects was selected shortly before?

With the payload in host memory only tokens that are not in a small cache on the GPU have to cross
the bus. After a prompt, a real text is fed token by token; per layer and KV head the selections of
`sparse_decode` go through least-recently-used caches of several sizes (fully associative).

    python -m evals.reuse --texts manual kjv --length 7000 --output evals/results/reuse-smollm2.json
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import selfindex
from selfindex.backends import ops
from selfindex.config import BARE_SHARE
from selfindex.evaluation.fidelity import continue_from
from selfindex.evaluation.texts import load_text
from selfindex.index.select import sum_of_softmax
from selfindex.integrations.transformers.observer import Observation

from .environment import arguments, save
from .models import load_model

SIZES = (1.0, 1.5, 2.0, 4.0)
"""Entries of a cache, in selections of one step."""


def record_selections(cache: Any, found: list[np.ndarray]) -> None:
    """From now on append the slots [H, K] that every sparse step of one row selects, layer after layer."""

    def select(seen: Observation) -> None:
        store = seen.layer.store
        if not 0 < seen.read[0] < store.encoded(0):
            return
        table, counts = store.table.tensors()
        logits = ops.score(
            seen.query, store.pool.index, table, counts, store.constants, seen.scaling, store.format.name
        )
        mass = sum_of_softmax(logits, store.format.kv_heads)
        budget = torch.tensor(seen.read, dtype=torch.int32, device=mass.device)
        found.append(ops.select(mass, budget, seen.read[0])[0, :, 0].cpu().numpy())

    for layer in cache.compressed_layers:
        layer.observer = select


def misses(steps: list[np.ndarray], slots: int, size: float) -> np.ndarray:
    """Share of each step's selection [steps, H] that a cache of `size` selections has to fetch."""
    heads = steps[0].shape[0]
    used = np.full((heads, slots), -1.0)
    present = np.zeros((heads, slots), dtype=bool)
    shares = []
    for i, chosen in enumerate(steps):
        shares.append(1 - np.take_along_axis(present, chosen, 1).mean(1))
        np.put_along_axis(used, chosen, i, 1)
        room = min(slots, round(size * chosen.shape[1]))
        # Of equally old ones the lower slot stays.
        order = np.argsort(-used, 1, kind="stable")[:, :room]
        present[:] = False
        np.put_along_axis(present, order, True, 1)
        present &= used >= 0
    return np.array(shares)


def main() -> None:
    """Parse the command line, run, print and write the JSON."""
    parser = arguments(__doc__, texts=("manual", "kjv"))
    parser.add_argument("--length", type=int, default=7000, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--skip", type=int, default=20, help="first steps, that fill the caches")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.05])
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, args.device)
    rows: list[dict[str, Any]] = []
    for text in args.texts:
        ids = tokenizer(load_text(text)[: 12 * args.length], return_tensors="pt").input_ids
        ids = ids[:, : args.length + args.steps].to(args.device)
        for budget in args.budgets:
            cache = selfindex.SelfIndexCache(model, budget=budget, **BARE_SHARE)
            found: list[np.ndarray] = []
            with torch.inference_mode():
                continue_from(model, cache, ids[:, : args.length], logits_to_keep=1)
                record_selections(cache, found)
                for token in ids[0, args.length :]:
                    continue_from(model, cache, token.view(1, 1))
            layers = len(cache.compressed_layers)
            slots = 128 * cache.compressed_layers[0].store.table.pages
            # Budgets that grow by a token on the way are cut to the first.
            width = min(x.shape[1] for x in found)
            row: dict[str, Any] = {"text": text, "budget": budget, "selected": width}
            for size in SIZES:
                shares = [
                    misses([x[:, :width] for x in found[layer::layers]], slots, size)[args.skip :]
                    for layer in range(layers)
                ]
                row[f"misses_{size}"] = float(np.mean(shares))
                row[f"worst_layer_{size}"] = float(max(x.mean() for x in shares))
            rows.append(row)
            print(row, flush=True)
    save(args.output, "reuse", {"model": args.model, "length": args.length, "rows": rows})


if __name__ == "__main__":
    main()
