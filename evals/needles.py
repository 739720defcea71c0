"""Does the model still find a fact in a long text when the cache is compressed?

A sentence with a random number is hidden in a real text at evenly spaced depths (the task of
`selfindex demo`). The text is prefilled and compressed; only then the question is asked, and the
answer decoded greedily with every query selecting its own tokens. Where the dense model fails too,
the cache is not to blame, so its row is printed as well.

    python -m evals.needles --texts manual stdlib kjv jargon --length 4096 --budgets 0.05 0.025
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

import selfindex
from selfindex.config import BARE_SHARE, EVERY_QUERY
from selfindex.evaluation.greedy import greedy
from selfindex.evaluation.recording import record
from selfindex.evaluation.tasks.fact import build_task
from selfindex.evaluation.texts import load_text

from .environment import arguments, save
from .models import load_model


def finds(model: Any, tokenizer: Any, cache: Any, ids: Tensor, answer: str, tokens: int = 20) -> bool:
    """Ask with question ids [1, T] over a filled cache and decode greedily until the answer is there."""
    produced: list[int] = []
    for following in islice(greedy(model, cache, ids), tokens):
        produced.append(int(following))
        if answer in tokenizer.decode(produced):
            return True
    return False


def main() -> None:
    """Parse the command line, run, print and write the JSON."""
    parser = arguments(__doc__, texts=("manual",))
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--needles", type=int, default=10, help="per text")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.05])
    parser.add_argument("--presets", nargs="+", default=["balanced", "paper"])
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, args.device)
    found: dict[str, dict[str, list[bool]]] = {}
    for text in args.texts:
        content = load_text(text)
        for i in range(args.needles):
            depth = (i + 0.5) / args.needles
            task = build_task(tokenizer, content, args.length, depth, seed=i, more=1)
            recording = record(model, task.document.to(args.device))
            caches = {"dense": recording.dense_copy()}
            for preset in args.presets:
                for budget in args.budgets:
                    options = BARE_SHARE | {"preset": preset, "budget": budget}
                    caches[f"{preset} {100 * budget:g} %"] = recording.fill(
                        selfindex.SelfIndexCache(model, **options, sparse_queries=EVERY_QUERY)
                    )
            for name, cache in caches.items():
                hit = finds(model, tokenizer, cache, task.question_ids, task.answer)
                found.setdefault(name, {}).setdefault(Path(text).stem, []).append(hit)
    result: dict[str, Any] = {"needles": args.needles, "found": {}}
    for name, by_text in found.items():
        result["found"][name] = {text: sum(hits) for text, hits in by_text.items()}
        total = sum(result["found"][name].values())
        print(f"{name:16} {total} of {args.needles * len(args.texts)}   {result['found'][name]}")
    save(args.output, "needles", result)


if __name__ == "__main__":
    main()
