"""How close is the attention mass that the report says a step missed to what it missed?

A real text is fed token by token after a prompt of it. In every step and layer, the softmax of the step's
queries over all of the model's own keys says how much of it lies on tokens that were not selected;
`report()` estimates the same from the decoded keys that the cache holds.

    python -m evals.missed --length 3000 --output evals/results/missed-smollm2.json
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import selfindex
from selfindex.config import BARE_SHARE
from selfindex.evaluation.fidelity import continue_from
from selfindex.evaluation.layers import visible
from selfindex.evaluation.texts import load_text
from selfindex.integrations.transformers.observer import Observation

from .environment import arguments, save
from .models import load_model


class Truth:
    """Watches a cache of one row; `missed` are the true shares of the last step, by layer."""

    def __init__(self, cache: Any) -> None:
        self.missed: list[float] = []
        self._keys: dict[int, list[Tensor]] = {}
        for layer in cache.compressed_layers:
            layer.observer = self.see

    def see(self, seen: Observation) -> None:
        """Called by every layer, before it stores its new tokens."""
        known = self._keys.setdefault(seen.layer.layer_idx, [])
        if known and seen.query.shape[2] == 1:
            before = torch.cat(known, 2)
            read = visible(seen.layer, (seen.query, before, before, seen.scaling), seen.query)  # [H, 1, n]
            keys = torch.cat((before, seen.keys), 2)[0].float()
            logits = seen.query[0].float().unflatten(0, (len(keys), -1))[:, :, 0] @ keys.mT * seen.scaling
            self.missed.append(float((logits.softmax(-1)[..., :-1] * ~read).sum(-1).mean()))
            known[:] = [before]
        known.append(seen.keys)


def compare(model: Any, ids: Tensor, prompt: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """True and reported shares [steps, layers] of steps after a prompt, of token ids [1, N]."""
    cache = selfindex.SelfIndexCache(model, **BARE_SHARE | options)
    truth = Truth(cache)
    true, reported = [], []
    with torch.inference_mode():
        continue_from(model, cache, ids[:, :prompt], logits_to_keep=1)
        for token in ids[0, prompt:]:
            truth.missed.clear()
            continue_from(model, cache, token.view(1, 1))
            true.append(list(truth.missed))
            reported.append([layer.missed for layer in cache.report().layers])
    return np.array(true), np.array(reported)


def main() -> None:
    """Parse the command line, run, print and write the JSON."""
    parser = arguments(__doc__, texts=("manual", "stdlib", "kjv"))
    parser.add_argument("--length", type=int, default=3000, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.05, 0.1])
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, args.device)
    rows: list[dict[str, Any]] = []
    for budget in args.budgets:
        parts = []
        for text in args.texts:
            ids = tokenizer(load_text(text)[: 12 * args.length], return_tensors="pt").input_ids
            ids = ids[:, : args.length + args.steps].to(args.device)
            parts.append(compare(model, ids, args.length, budget=budget))
        true, reported = (np.concatenate(x) for x in zip(*parts, strict=True))
        layers = np.abs(true.mean(0) - reported.mean(0))
        rows.append(
            {
                "budget": budget,
                "missed": float(true.mean()),
                "reported": float(reported.mean()),
                "difference": float(np.abs(true - reported).mean()),
                "worst_layer_difference": float(layers.max()),
                "correlation": float(np.corrcoef(true.ravel(), reported.ravel())[0, 1]),
            }
        )
        print(rows[-1], flush=True)
    result = {"model": args.model, "length": args.length, "steps": args.steps, "texts": args.texts}
    save(args.output, "missed", result | {"rows": rows})


if __name__ == "__main__":
    main()
