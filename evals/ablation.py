"""Ablation of the cache format on real text, with fake quantisation.

Operator level, all questions:   python -m evals.ablation operator --model smollm2
End to end at several budgets:   python -m evals.ablation model --model smollm2

Each run writes one JSON file to `--out` with the command, date, versions and 95 % bootstrap
intervals (blocks of 8 neighbouring tokens, resampled within each window of text).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from selfindex.evaluation.environment import command_line
from selfindex.evaluation.stats import Array, bootstrap, difference, p5

from . import designs
from .budgets import Budgets, bytes_read, shares
from .capture import Record, load_record
from .endtoend import compare, encode_record
from .models import load_model
from .operator_level import Balances, Table, balances, measure

TEXTS = "manual,stdlib,kjv,jargon"


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("level", choices=("operator", "model"))
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma3-270m or a path")
    parser.add_argument("--texts", default=TEXTS, help="names in selfindex.evaluation.texts, or files")
    parser.add_argument("--prefix", type=int, default=3840)
    parser.add_argument("--block", type=int, default=192, help="tokens of the continuation")
    parser.add_argument("--parts", type=int, default=2, help="windows per text")
    parser.add_argument("--take", type=int, default=99, help="use only the first windows of a text")
    parser.add_argument("--stride", type=int, default=3, help="operator level: every n-th query")
    parser.add_argument("--layer-step", type=int, default=1, help="operator level: every n-th layer")
    parser.add_argument("--groups", default=",".join(designs.GROUPS), help="operator level")
    parser.add_argument("--budgets", default="0.05,0.075,0.1,1.0", help="model level")
    parser.add_argument("--designs", default="", help="model level: only these, separated by ;, or 'open'")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--store", type=Path, help="directory to keep dense passes in")
    parser.add_argument("--out", type=Path, default=Path("evals/results"))
    parser.add_argument("--tag", default="", help="added to the name of the result")
    return parser.parse_args()


def window(args: argparse.Namespace, loaded: Callable[[], Any], text: str, part: int) -> Record:
    """One window of a text."""
    sizes = (args.parts, args.prefix, args.block)
    return load_record(loaded, args.model, text, part, *sizes, args.store)


def windows(args: argparse.Namespace, loaded: Callable[[], Any]) -> Iterator[tuple[Record, Balances]]:
    """Every window with its balance vectors; "another text" is the next text of the list."""
    texts = args.texts.split(",")
    for part in range(min(args.take, args.parts)):
        for j, text in enumerate(texts):
            following = texts[(j + 1) % len(texts)]
            other = window(args, loaded, following, part) if args.level == "operator" else None
            record = window(args, loaded, text, part)
            yield record, balances(record, other)


def summary(table: Table) -> dict[str, Any]:
    """Means, differences to the first variant, and 5th percentiles of the captured mass."""
    first = next(iter(table))
    out: dict[str, Any] = {}
    for name, metrics in table.items():
        row = {metric: bootstrap(arrays) for metric, arrays in metrics.items()}
        row["mass_p5"] = bootstrap(metrics["mass"], p5, resamples=100)
        if name != first:
            for metric in ("mass", "err"):
                row[f"{metric}_diff"] = difference(metrics[metric], table[first][metric])
        out[name] = row
    return out


def operator_level(args: argparse.Namespace, loaded: Callable[[], Any]) -> dict[str, Any]:
    """All groups of variants in one pass over the windows."""
    variants = {
        f"{group}/{name}": variant
        for group in args.groups.split(",")
        for name, variant in designs.GROUPS[group]().items()
    }
    table = measure(windows(args, loaded), variants, args.stride, args.layer_step)
    return {
        group: summary({n.split("/")[1]: m for n, m in table.items() if n.startswith(group + "/")})
        for group in args.groups.split(",")
    }


def model_level(args: argparse.Namespace, loaded: Callable[[], Any]) -> dict[str, Any]:
    """Every design at every budget, end to end."""
    wanted = args.designs.split(";") if args.designs else None
    if wanted == ["open"]:
        wanted = list(designs.open_choices())
    todo = {n: v for n, v in designs.end_to_end_designs().items() if not wanted or n in wanted}
    budgets = [float(b) for b in args.budgets.split(",")]
    data: dict[str, dict[str, list[Array]]] = {}
    texts: list[str] = []
    budgets_of: dict[float, Budgets] = {}
    if any(v.spread.startswith("other") for v in todo.values()):
        # A profile's text: the last window of the first text, which no result is measured on.
        assert args.take < args.parts, "designs with budgets from another text need --take below --parts"
        profile = window(args, loaded, args.texts.split(",")[0], args.parts - 1)
        kinds = balances(profile, None)
        for budget in budgets:
            at = replace(designs.DEFAULT, budget=budget)
            budgets_of[budget] = shares(profile, encode_record(profile, at, kinds), at)
    for record, kinds in windows(args, loaded):
        texts.append(Path(record.text).stem)
        head_dim = next(iter(record.layers.values())).k.shape[-1]
        for name, variant in todo.items():
            prefixes = encode_record(record, replace(variant, spread="uniform", dense_layers=0), kinds)
            for budget in budgets:
                at = replace(variant, budget=budget)
                if at.comp != "off" or at.spread != "uniform" or at.dense_layers:
                    prefixes = encode_record(record, at, kinds, budgets_of.get(budget))
                got = compare(loaded()[0], record, at, prefixes)
                row = data.setdefault(f"{name} @ {budget:g}", {})
                for metric, values in got.items():
                    row.setdefault(metric, []).append(values)
                line = " ".join(f"{m} {x.mean():.4f}" for m, x in got.items())
                print(record.text, name, budget, line, file=sys.stderr, flush=True)
    first = next(iter(data))
    return {
        name: {m: bootstrap(arrays) for m, arrays in row.items()}
        | {"kl_by_window": [[t, round(float(x.mean()), 5)] for t, x in zip(texts, row["kl"], strict=True)]}
        | {"kl_diff": difference(row["kl"], data[first]["kl"])}
        | {"bytes_read": bytes_read(todo[name.split(" @ ")[0]], head_dim, bootstrap(row["read"])[0])}
        for name, row in data.items()
    }


def command() -> str:
    """The command line, without the places where this machine keeps files."""
    places = re.compile(r"--(store|out)(=\S+)?$")
    kept = ["python", "-m", "evals.ablation"]
    skip = False
    for word in sys.argv[1:]:
        match = places.match(word)
        if not skip and not match:
            kept.append(word)
        skip = match is not None and match[2] is None
    return command_line(*kept)


def main() -> None:
    """Run and write the result."""
    args = parse()
    torch.set_num_threads(args.threads)

    @functools.cache
    def loaded() -> tuple[Any, Any]:
        with torch.device("cpu"):
            model, tokenizer = load_model(args.model)
        return model.to(args.device), tokenizer

    # Everything else is made on the device it is used on.
    torch.set_default_device(args.device)
    start = time.time()
    result = operator_level(args, loaded) if args.level == "operator" else model_level(args, loaded)
    report = {
        "command": command(),
        "date": datetime.date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if args.device.startswith("cuda") else None,
        "seconds": round(time.time() - start),
        "interval": "[estimate, 2.5 %, 97.5 %]",
        "result": result,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"ablation-{args.level}-{Path(args.model).name}-{args.prefix}{args.tag}"
    path = args.out / f"{stem}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
