"""What would make the cache better at the bytes it stores and reads: one change to the default at a time.

Real text, and needles among needles (RULER's niah_multikey_2) that the dense model finds. Of every
variant: the attention mass that 5 % of the tokens miss and the error of the output, layer by layer;
KL and top-1 agreement of the next tokens, every query selecting; the share of needles found; bytes.

    python -m evals.variants --model qwen-coder-1.5b --prefix 8064 --texts manual stdlib --needles 24
        --device cuda --output variants-qwen-coder-1.5b-8k.json
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from selfindex.evaluation.stats import Array, bootstrap, difference, wilson
from selfindex.evaluation.tasks import TASKS, Source
from selfindex.evaluation.texts import load_text

from .budgets import bytes_read, bytes_stored
from .capture import Record, record, window_ids
from .designs import variants
from .endtoend import compare, encode_record
from .environment import arguments, save
from .models import load_model
from .operator_level import balances, measure
from .sparse import Variant

Rows = dict[str, dict[str, list[Array]]]
NEEDLES = "niah_multikey_2"


def texts(model: Any, tokenizer: Any, args: argparse.Namespace) -> Iterator[Record]:
    """The beginning of every text."""
    for text in args.texts:
        ids = window_ids(tokenizer, load_text(text), 0, 1, args.prefix + args.block)
        yield record(model, ids, args.prefix, text)


def needles(model: Any, tokenizer: Any, args: argparse.Namespace) -> Iterator[tuple[Record, int]]:
    """Documents with a question and its right answer, and how many tokens that has.

    Only of samples whose answer is the dense model's.
    """
    source = Source(tokenizer, load_text(args.texts[0]))
    for seed in range(args.needles):
        sample = TASKS[NEEDLES](source, args.prefix, seed)
        answer = source.encode(" " + sample.answers[0])
        ids = torch.tensor(sample.document + sample.question + answer)
        found = record(model, ids, len(sample.document), NEEDLES)
        if found.logits[-len(answer) - 1 : -1].argmax(-1).tolist() == answer:
            yield found, len(answer)


def add(rows: Rows, name: str, found: dict[str, Array]) -> None:
    """One window's metrics to a variant's."""
    for metric, values in found.items():
        rows[name][metric].append(values)


def run_texts(model: Any, tokenizer: Any, args: argparse.Namespace, todo: dict[str, Variant]) -> Rows:
    """All metrics over the texts."""
    rows: Rows = defaultdict(lambda: defaultdict(list))
    for window in texts(model, tokenizer, args):
        kinds = balances(window, None)
        table = measure([(window, kinds)], todo, args.stride, args.layer_step)
        for name, variant in todo.items():
            add(rows, name, {metric: arrays[0] for metric, arrays in table[name].items()})
            add(rows, name, compare(model, window, variant, encode_record(window, variant, kinds)))
            print(window.text, name, f"KL {rows[name]['kl'][-1].mean():.4f}", flush=True)
    return rows


def run_needles(model: Any, tokenizer: Any, args: argparse.Namespace, todo: dict[str, Variant]) -> Rows:
    """Of every sample, whether all of the answer's tokens are the most probable ones, and their mean KL."""
    rows: Rows = defaultdict(lambda: defaultdict(list))
    for sample, length in needles(model, tokenizer, args):
        kinds = balances(sample, None)
        for name, variant in todo.items():
            got = compare(model, sample, variant, encode_record(sample, variant, kinds))
            answer = slice(-length - 1, -1)
            add(rows, name, {"found": got["top1"][answer].min(), "needle_kl": got["kl"][answer].mean()})
        print(NEEDLES, {name: rows[name]["found"][-1] for name in todo}, flush=True)
    return rows


def summary(rows: Rows, asked: Rows, todo: dict[str, Variant], head_dim: int) -> dict[str, dict[str, Any]]:
    """Means with intervals; differences to the first variant, paired by token."""
    first, out = next(iter(todo)), {}
    for name, variant in todo.items():
        row: dict[str, Any] = {"bytes": bytes_stored(variant, head_dim)}
        if name in rows:
            read = bootstrap(rows[name]["read"])[0]
            row["bytes_read"] = bytes_read(variant, head_dim, read)
            for metric in ("err", "mass", "kl", "top1"):
                row[metric] = bootstrap(rows[name][metric])
                row[f"{metric}_diff"] = difference(rows[name][metric], rows[first][metric])
        if name in asked:
            row["needles"] = wilson(np.array(asked[name]["found"]))
            row["needle_kl"] = bootstrap([np.array(asked[name]["needle_kl"])], block=1)
        out[name] = row
    return out


def main() -> None:
    """Run, print and write the result."""
    parser = arguments(__doc__, texts=("manual", "stdlib"))
    parser.add_argument("--prefix", type=int, default=3840)
    parser.add_argument("--block", type=int, default=192, help="tokens of a text that are measured")
    parser.add_argument("--needles", type=int, default=0, help="samples to try")
    parser.add_argument("--stride", type=int, default=3, help="layer by layer: every n-th query")
    parser.add_argument("--layer-step", type=int, default=2, help="layer by layer: every n-th layer")
    parser.add_argument("--only", nargs="+", help="names of variants, besides the default")
    args = parser.parse_args()
    torch.manual_seed(0)  # of what is drawn
    todo = {n: v for n, v in variants().items() if not args.only or n == "default" or n in args.only}
    with torch.device("cpu"):
        model, tokenizer = load_model(args.model)
    model.to(args.device)
    torch.set_default_device(args.device)  # everything else is made where it is used
    rows = run_texts(model, tokenizer, args, todo)
    asked = run_needles(model, tokenizer, args, todo)
    head_dim = getattr(model.config, "head_dim", model.config.hidden_size // model.config.num_attention_heads)
    result = summary(rows, asked, todo, head_dim)
    for name, row in result.items():
        print(name, {m: x for m, x in row.items() if not m.endswith("_diff") or m == "kl_diff"})
    settings = {"model": args.model, "prefix": args.prefix, "block": args.block, "texts": args.texts}
    count = len(asked["default"]["found"]) if args.needles else 0
    save(args.output, "variants", {"settings": settings | {"needles": count}, "variants": result})


if __name__ == "__main__":
    main()
