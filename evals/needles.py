"""Does the model still find a fact in a long text when the cache is compressed?

A sentence with a random number is hidden in a real text at evenly spaced depths (the task of
`selfindex demo`). The text is prefilled and compressed; only then the question is asked, and the
answer decoded greedily with every query selecting its own tokens. Where the dense model fails too,
the cache is not to blame, so its row is printed as well.

    python -m evals.needles --model smollm2 --length 4096 --budgets 0.05 0.025
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import selfindex
from selfindex.cli.needle import build_task

from .environment import describe
from .models import load_model
from .recording import record
from .texts import load_text


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, cache: Any, ids: Tensor, tokens: int = 16) -> str:
    """Ask with question ids [1, T] over a filled cache and decode greedily."""
    produced: list[int] = []
    for _ in range(tokens):
        following = model(ids, past_key_values=cache).logits[0, -1].argmax()
        produced.append(int(following))
        ids = following.view(1, 1)
    return tokenizer.decode(produced)


def main() -> None:
    """Parse the command line, run, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="manual")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--needles", type=int, default=10)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.05])
    parser.add_argument("--presets", nargs="+", default=["balanced", "paper"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    model.to(args.device)
    text = load_text(args.text)
    found: dict[str, list[bool]] = {}
    for i in range(args.needles):
        task = build_task(tokenizer, text, args.length, (i + 0.5) / args.needles, seed=i, more=1)
        recording = record(model, task.document.to(args.device))
        caches = {"dense": recording.dense_copy()}
        for preset in args.presets:
            for budget in args.budgets:
                options = {"preset": preset, "budget": budget, "dense_below": 0, "sparse_queries": 1 << 30}
                caches[f"{preset} {100 * budget:g} %"] = recording.fill(
                    selfindex.SelfIndexCache(model, **options)
                )
        for name, cache in caches.items():
            said = answer(model, tokenizer, cache, task.question_ids.to(args.device))
            found.setdefault(name, []).append(task.answer in said)
    result = {
        "environment": describe("needles"),
        "found": {k: sum(v) for k, v in found.items()},
        "of": args.needles,
    }
    for name, count in result["found"].items():
        print(f"{name:16} {count} of {args.needles}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
