"""At which depth of a model bits and tokens count: designs whose layers differ, on right answers to tasks.

The model reads a document, then a question, which reads all that is encoded; the tokens of the right answer
follow, each of which selects. Measured is the KL of the next token between them.

    python -m evals.depth --model qwen-coder-1.5b --tasks fwe vt niah_multikey_2 niah_multikey_3 --samples 4
        --output depth-qwen-coder-1.5b-4k.json
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from selfindex.evaluation.stats import mean_of_means
from selfindex.evaluation.tasks import TASKS, Source
from selfindex.evaluation.texts import load_text

from .budgets import bytes_read, bytes_stored
from .capture import Record, record
from .designs import DEFAULT, EXACT_VALUE
from .endtoend import Simulated, run
from .environment import arguments, save
from .models import load_model
from .operator_level import balance_of, balances
from .sparse import Variant, encode

KEYS_4 = replace(DEFAULT, key=replace(DEFAULT.key, bits=4))
VALUES_3 = replace(DEFAULT, value=replace(DEFAULT.value, bits=3))
ALL = replace(DEFAULT, budget=1.0)


def designs() -> dict[str, tuple[Variant, Variant, Variant]]:
    """Of the first, second and last third of the layers."""

    def reading(share: float, variant: Variant = DEFAULT) -> Variant:
        return replace(variant, budget=share)

    exact_keys = replace(DEFAULT, key=replace(DEFAULT.key, exact=True))
    exact_values = replace(DEFAULT, value=EXACT_VALUE)
    return {
        "default": (DEFAULT,) * 3,
        "10 %": (reading(0.1),) * 3,
        "2, 5 and 8 %": (reading(0.02), DEFAULT, reading(0.08)),
        "8, 5 and 2 %": (reading(0.08), DEFAULT, reading(0.02)),
        "drawn": (replace(DEFAULT, sharpness=1.0, sampled=True),) * 3,
        "3-bit values": (VALUES_3,) * 3,
        "4-bit keys": (KEYS_4,) * 3,
        "4-bit keys, first third": (KEYS_4, DEFAULT, DEFAULT),
        "4-bit keys, second third": (DEFAULT, KEYS_4, DEFAULT),
        "4-bit keys, last third": (DEFAULT, DEFAULT, KEYS_4),
        "10 %, 4-bit keys, last third": (reading(0.1), reading(0.1), reading(0.1, KEYS_4)),
        "all tokens": (ALL,) * 3,
        "all tokens, 4-bit keys, last third": (ALL, ALL, reading(1.0, KEYS_4)),
        "all tokens, exact keys": (reading(1.0, exact_keys),) * 3,
        "all tokens, exact keys, last third": (ALL, ALL, reading(1.0, exact_keys)),
        "all tokens, exact values": (reading(1.0, exact_values),) * 3,
    }


def thirds(layers: int) -> list[int]:
    """Which third every layer is in."""
    return [3 * i // layers for i in range(layers)]


def answered(
    model: Any, tokenizer: Any, task: str, length: int, samples: int
) -> Iterator[tuple[Record, int]]:
    """A task's documents, each with its question and right answer, and how many tokens the question has."""
    source = Source(tokenizer, load_text("manual"))
    for seed in range(samples):
        sample = TASKS[task](source, length, seed)
        answer = source.encode(" " + ", ".join(sample.answers))
        ids = torch.tensor(sample.document + sample.question + answer)
        yield record(model, ids, len(sample.document), task), len(sample.question)


def measure(model: Any, sample: Record, question: int) -> dict[str, dict[str, float]]:
    """Of every design the mean KL between the answer's tokens, and whether all have dense's best token."""
    kinds, encoded = balances(sample, None), {}
    place = dict(zip(sample.layers, thirds(len(sample.layers)), strict=True))
    found = {}
    for name, design in designs().items():
        layers = {}
        for i, layer in sample.layers.items():
            variant = design[place[i]]
            stored = i, variant.key, variant.value
            if stored not in encoded:
                encoded[stored] = encode(layer, variant, balance_of(kinds, variant, i))
            layers[i] = Simulated(encoded[stored], variant, question)
        torch.manual_seed(0)  # of what is drawn
        got = run(model, sample, layers)
        inside = slice(question, -1)  # the first token of an answer is the question's to find
        kl, same = got["kl"][inside].mean(), got["top1"][inside].min()
        found[name] = {"kl": float(kl), "same": float(same)}
    return found


def summary(found: dict[str, dict[str, list[dict[str, float]]]], head_dim: int) -> dict[str, dict[str, Any]]:
    """By design: bytes, KL and share of equal answers, by task and over tasks, and the ratio of its KL.

    Ratios to the first design's KL, paired by sample; means of their logarithms.
    """
    first = next(iter(found))
    out = {}
    for name, tasks in found.items():
        design = designs()[name]
        row: dict[str, Any] = {
            "bytes": float(np.mean([bytes_stored(v, head_dim) for v in design])),
            "bytes_read": float(np.mean([bytes_read(v, head_dim, v.budget) for v in design])),
            "tasks": {task: float(np.mean([one["kl"] for one in own])) for task, own in tasks.items()},
        }
        ratios, same = [], []
        for task, own in tasks.items():
            base = found[first][task]
            ratios.append(np.log([one["kl"] / other["kl"] for one, other in zip(own, base, strict=True)]))
            same.append(np.array([one["same"] for one in own]))
        row["ratio"] = [float(np.exp(x)) for x in mean_of_means(ratios)]
        row["same"] = mean_of_means(same)
        out[name] = row
    return out


def main() -> None:
    """Run, print and write the result."""
    parser = arguments(__doc__, texts=())
    parser.add_argument("--length", type=int, default=3968, help="tokens of a document with its question")
    parser.add_argument("--tasks", nargs="+", default=["fwe", "vt", "niah_multikey_2", "niah_multikey_3"])
    parser.add_argument("--samples", type=int, default=4, help="of every task")
    args = parser.parse_args()
    with torch.device("cpu"):
        model, tokenizer = load_model(args.model)
    model.to(args.device)
    torch.set_default_device(args.device)
    found: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in designs()}
    for task in args.tasks:
        for sample, question in answered(model, tokenizer, task, args.length, args.samples):
            for name, own in measure(model, sample, question).items():
                found[name].setdefault(task, []).append(own)
            print(task, {name: round(own[task][-1]["kl"], 4) for name, own in found.items()}, flush=True)
    head_dim = getattr(model.config, "head_dim", model.config.hidden_size // model.config.num_attention_heads)
    result = summary(found, head_dim)
    for name, row in result.items():
        print(name, row)
    settings = {name: getattr(args, name) for name in ("model", "length", "tasks", "samples")}
    save(args.output, "depth", {"settings": settings, "designs": result})


if __name__ == "__main__":
    main()
