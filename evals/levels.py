"""Could a decode step read only a part of the index? Two levels against the one of the product.

    python -m evals.levels --model smollm2 --tokens 8192 --output evals/results/levels-smollm2-8k.json
    python -m evals.levels --model MODEL --tokens 16384 --layers 4 --dtype bfloat16

The queries of the last positions of a text are decode steps over the pages before them. One level, as the
product does it, scores every token from its sign codes and selects a budget. What counts is how much of that
selection another way to it finds, in tokens and in true softmax mass, against what it reads of the index.

Pages first: pages are ordered by an estimate, the best are opened, and only their tokens are scored. The
oracle orders by what pages hold of the selection, "largest vote" by the exact vote of a page's best token.
Estimates: "mean", "gaussian" and "bound" as in evals.pages; "8 signs", the largest logit of eight of a
page's tokens; "mean + z sigma", z times the deviation of a page's logits if signs were random.

Channels first: sign codes of a part of the channel groups (the first, or those with the longest queries)
score all tokens, and several times the budget of candidates are scored again with all channels.

Exact skipping: pages, or tokens half of whose groups have been read, whose upper bound is below the vote of
the last selected token, as if that were known before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from selfindex.config import SelfIndexConfig, check_budget
from selfindex.evaluation.cache_layers import observe_dense
from selfindex.evaluation.models import load
from selfindex.evaluation.texts import excerpt, load_text
from selfindex.integrations.transformers.observer import Observation

from .candidates import (
    STEPS,
    Case,
    case,
    first_pass,
    held_by,
    page_scores,
    paged,
    partial_logits,
    read_by_channels,
    record_bytes,
    selection,
    skipped,
    upper_bounds,
    vote,
)
from .environment import save
from .models import PARTS, assembled

TARGETS = (0.95, 0.99, 0.995)
READ = 0.5
"""Share of the index, the summaries in it, at which recall is shown."""
PARTS_READ = (0.25, 0.375, 0.5, 0.75)
FACTORS = (2, 3, 4, 8)


@dataclass
class Found:
    """One budget's results of the layers, one after the other.

    Attributes:
        curves: (share of the selected tokens, their mass) in the first 1 .. M pages, [cases, M] each, by
            estimate; total: [cases], mass of the selected tokens; layer: [cases], whose they are.
        channels: rows of (tokens, mass, mass selected, bytes, sectors) by variant.
        skipped: rows by bound.
    """

    curves: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    total: list[Tensor] = field(default_factory=list)
    layer: list[Tensor] = field(default_factory=list)
    channels: dict[tuple[str, float, int], list[tuple[float, ...]]] = field(default_factory=dict)
    skipped: dict[str, list[float]] = field(default_factory=dict)
    head_dim: int = 0

    def add(self, x: Case, budget: int, layer: int) -> None:
        """Take one layer's steps."""
        self.head_dim = x.keys.shape[-1]
        chosen = selection(x.votes, budget)
        counts, mass = paged(chosen.float()), paged(x.mass * chosen)
        orders = {"oracle": counts, **page_scores(x)}
        for name, order in orders.items():
            by_mass = mass if name == "oracle" else order
            pair = held_by(order, counts) / budget, held_by(by_mass, mass)
            self.curves.setdefault(name, []).append((pair[0].flatten(0, 1), pair[1].flatten(0, 1)))
        self.total.append(mass.sum(-1).flatten())
        self.layer.append(torch.full_like(self.total[-1], layer))
        for longest in (False, True):
            for part in PARTS_READ:
                votes = vote(partial_logits(x, part, longest)[0])
                for factor in FACTORS:
                    among = selection(votes, min(factor * budget, votes.shape[-1]))
                    both = among & chosen
                    row = (float(both.sum() / chosen.sum()), float((x.mass * both).sum()), float(mass.sum()),
                           *read_by_channels(among, x.keys.shape[-1], part, longest))  # fmt: skip
                    name = "longest" if longest else "first"
                    self.channels.setdefault((name, part, factor), []).append(row)
        last = x.votes.masked_fill(~chosen, torch.inf).amin(-1, keepdim=True)
        for name, bounds in upper_bounds(x).items():
            self.skipped.setdefault(name, []).append(skipped(bounds, last))

    def summary(self) -> dict[str, Any]:
        """Everything rounded, for JSON."""
        layer = torch.cat(self.layer)
        holding = torch.cat([tokens for tokens, _ in self.curves["oracle"]])
        any_of = ((holding < 1 - 1e-6).sum(-1) + 1).float().mean() / holding.shape[-1]
        return {
            "head_dim": self.head_dim,
            "layers": [int(i) for i in layer.unique()],
            "pages": {name: self._by_pages(name, layer) for name in self.curves},
            "channels": [self._by_channels(*key) for key in self.channels],
            "skipped": {name: round(sum(rows) / len(rows), 4) for name, rows in self.skipped.items()},
            "pages_with_any": round(float(any_of), 4),
        }

    def _by_pages(self, name: str, layer: Tensor) -> dict[str, Any]:
        tokens, mass = (torch.cat(x) for x in zip(*self.curves[name], strict=True))
        count, whole = tokens.shape[-1], record_bytes(self.head_dim)
        first, again = first_pass(self.head_dim).get(name, (0, 0))
        # Pages that may be opened, so that half of the index is read.
        half = int((READ * whole - first) / (whole - again) * count)
        row: dict[str, Any] = {}
        curves = {"tokens": tokens.mean(0), "mass": mass.sum(0) / torch.cat(self.total).sum()}
        for kind, curve in curves.items():
            opened = [needed(curve, target) / count for target in TARGETS]
            row[kind] = [round(share, 4) for share in opened]
            row[f"{kind}_read"] = [round((first + share * (whole - again)) / whole, 4) for share in opened]
            row[f"{kind}_in_half"] = round(float(curve[half - 1]), 4)
        own = [(tokens < target - 1e-6).sum(-1) + 1 for target in TARGETS]
        row["each_as_needed"] = [round(float(n.float().mean() / count), 4) for n in own]
        layers = [tokens[layer == i].mean(0)[half - 1] for i in layer.unique()]
        row["worst_layer_in_half"] = round(float(min(layers)), 4)
        return row

    def _by_channels(self, name: str, part: float, factor: int) -> dict[str, Any]:
        found, mass, all_mass, size, sectors = torch.tensor(self.channels[name, part, factor]).T
        shares = {"tokens": found.mean(), "mass": mass.sum() / all_mass.sum()}
        shares |= {"bytes": size.mean(), "sectors": sectors.mean()}
        rounded = {key: round(float(x), 4) for key, x in shares.items()}
        return {"channels": name, "part": part, "factor": factor} | rounded


def needed(curve: Tensor, target: float) -> int:
    """Pages to open until a rising curve [M] is at a target."""
    return min(int((curve < target - 1e-6).sum()) + 1, len(curve))


def shortened(model: Any, depth: int) -> None:
    """Leave only the first layers of a model."""
    del model.model.layers[depth:]
    model.config.num_hidden_layers = depth
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:depth]


@torch.inference_mode()
def study(
    model: Any, ids: Tensor, layers: int, found: dict[tuple[int, str], Found], done: Callable[[], None]
) -> None:
    """Add every `layers`-th layer of a text to the results, whose keys are (tokens, budget).

    Args:
        ids: [1, N]. One pass serves shorter lengths as well: what is later changes nothing before it.
        done: called after every layer.
    """

    def keep(seen: Observation) -> None:
        if seen.layer.layer_idx % layers:
            return
        for tokens in sorted({tokens for tokens, _ in found}):
            x = case(seen.query[0, :, :tokens].cpu(), seen.keys[0, :, :tokens].cpu(), seen.scaling)
            for (own, budget), results in found.items():
                if own == tokens:
                    limit = SelfIndexConfig(budget=check_budget(parse(budget)))
                    number = limit.budget_tokens(tokens, x.votes.shape[-1])
                    results.add(x, number, seen.layer.layer_idx)
        done()

    observe_dense(model, DynamicCache(config=model.config), ids, keep, logits_to_keep=1)


def parse(budget: str) -> float | int:
    """A share or a number of tokens, as typed."""
    return float(budget) if "." in budget else int(budget)


def show(title: str, summary: dict[str, Any]) -> None:
    """Print a budget's tables."""
    table = Table(title=title, title_justify="left")
    columns = [f"{100 * x:g} % {of}" for of in ("tokens", "mass") for x in TARGETS]
    for column in ("pages first", *columns, "tokens in half", "mass", "worst layer's tokens"):
        table.add_column(column, no_wrap=True)
    for name, row in summary["pages"].items():
        cells = [f"{100 * x:.1f} %" for of in ("tokens", "mass") for x in row[f"{of}_read"]]
        halves = ("tokens_in_half", "mass_in_half", "worst_layer_in_half")
        table.add_row(name, *cells, *(f"{row[key]:.4f}" for key in halves))
    Console(width=160).print(table)
    table = Table("channels", "part", "factor", "tokens", "mass", "bytes", "sectors")
    for row in summary["channels"]:
        table.add_row(*(str(x) for x in row.values()))
    Console(width=160).print(table)
    print("pages with any:", summary["pages_with_any"], "exactly skipped:", summary["skipped"], flush=True)


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, qwen-coder-0.5b, ..., or a model path")
    parser.add_argument("--texts", nargs="+", default=["manual", "stdlib"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    parser.add_argument("--budgets", nargs="+", default=["0.05", "0.02", "1024"], help="shares, or tokens")
    parser.add_argument("--layers", type=int, default=3, help="look at every so many layers")
    parser.add_argument("--depth", type=int, help="run only so many layers of the model, for long texts")
    parser.add_argument("--device", default="cpu", help="of the model; everything else is on the CPU")
    parser.add_argument("--dtype", default="float32", help="of the model; everything else is float32")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    source = str(assembled(args.model)) if args.model in PARTS else args.model
    loaded = load(source, args.device, args.dtype)
    if args.depth:
        shortened(loaded.model, args.depth)
    result: dict[str, Any] = {
        "model": Path(loaded.name).name,
        "targets": TARGETS,
        "texts": args.texts,
        "steps": STEPS,
    }
    longest = max(args.tokens)
    found = {(n, budget): Found() for n in args.tokens for budget in args.budgets}

    def keep() -> None:
        # A long text takes long: what is known is written after every layer.
        runs = [{"tokens": n, "budget": budget, **own.summary()} for (n, budget), own in found.items()]
        save(args.output, "levels", result | {"runs": runs})

    for text in args.texts:
        part = excerpt(load_text(text), 1, 8, 12 * longest)
        ids = loaded.tokenizer(part, return_tensors="pt").input_ids[:, :longest]
        if ids.shape[1] < longest:
            raise ValueError(f"the text {text} gives {ids.shape[1]} tokens, {longest} are needed")
        study(loaded.model, ids.to(loaded.model.device), args.layers, found, keep)
    for (tokens, budget), own in found.items():
        show(f"{result['model']}, {tokens} tokens, budget {budget}", own.summary())


if __name__ == "__main__":
    main()
