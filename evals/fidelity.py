"""How close a model with a self-indexing cache stays to itself with a dense one.

For every text and prefix length: prefill, compress, then run a continuation teacher-forced, every
query selecting its own tokens. Printed per variant over all texts, with 95 % bootstrap intervals:
KL divergence from the dense model's next-token distribution (nats), top-1 agreement with it,
and the perplexity of the true text.

    python -m evals.fidelity --model smollm2 --lengths 4096 8064 --texts manual stdlib kjv
"""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

import selfindex
from selfindex.config import BARE_SHARE, EVERY_QUERY
from selfindex.evaluation.fidelity import compare, continue_from
from selfindex.evaluation.recording import Recording, record
from selfindex.evaluation.summary import summarise
from selfindex.evaluation.texts import load_text

from .environment import arguments, save, show_table
from .models import load_model

BUDGETS = (0.05, 0.075, 0.1, 1.0)


def variants(extra: list[str]) -> dict[str, dict[str, Any]]:
    """Options by name: both presets at every budget, then `extra` as "name:key=value,...:budget"."""
    chosen = {}
    for preset in ("paper", "balanced"):
        for budget in BUDGETS:
            chosen[f"{preset} {100 * budget:g} %"] = {"preset": preset, "budget": budget}
    for text in extra:
        name, options = text.split(":", 1)
        chosen[name] = {k: json.loads(v) for k, v in (pair.split("=") for pair in options.split(","))}
    return chosen


def run_text(
    model: Any, recording: Recording, ids: Tensor, targets: Tensor, chosen: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Metrics per variant for one text; `ids` [1, T] are fed, `targets` [T] follow them."""
    dense = continue_from(model, recording.dense_copy(), ids)
    results: dict[str, dict[str, Any]] = {"dense": compare(dense, dense, targets)}
    for name, options in chosen.items():
        options = BARE_SHARE | {"sparse_queries": EVERY_QUERY} | options
        cache = recording.fill(selfindex.SelfIndexCache(model, **options))
        memory, first = cache.report(missed=False).memory, cache.compressed_layers[0].store
        pairs = len(cache.compressed_layers) * first.format.kv_heads * first.encoded(0)
        results[name] = compare(dense, continue_from(model, cache, ids), targets)
        results[name]["bytes"] = (memory.index + memory.payload) / pairs
    return results


def main() -> None:
    """Parse the command line, run, print and write the JSON."""
    parser = arguments(__doc__, texts=("manual", "stdlib", "kjv"))
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096], help="context incl. continuation")
    parser.add_argument("--continuation", type=int, default=256)
    parser.add_argument("--start", type=int, default=20000, help="first character of the text to use")
    parser.add_argument("--variant", action="append", default=[], help='e.g. "v3:value_bits=3,budget=0.05"')
    parser.add_argument("--only", action="store_true", help="run only the variants given with --variant")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, args.device)
    chosen = variants(args.variant)
    if args.only:
        chosen = {name: o for name, o in chosen.items() if any(v.split(":")[0] == name for v in args.variant)}
    lengths: dict[str, Any] = {}
    for length in args.lengths:
        runs = []
        for text in args.texts:
            content = load_text(text)[args.start : args.start + 12 * length]
            ids = tokenizer(content, return_tensors="pt", add_special_tokens=False).input_ids[:, : length + 1]
            ids = ids.to(args.device)
            prefix = length - args.continuation
            recording = record(model, ids[:, :prefix])
            runs.append(run_text(model, recording, ids[:, prefix:length], ids[0, prefix + 1 :], chosen))
        table = summarise(runs)
        lengths[str(length)] = table
        show_table(
            f"{args.model}, {length} tokens, {len(args.texts)} texts x {args.continuation} tokens", table
        )
    save(args.output, "fidelity", {"lengths": lengths})


if __name__ == "__main__":
    main()
