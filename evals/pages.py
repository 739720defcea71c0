"""How well cheap estimates find the pages that a block of a prompt's queries attends to.

    python -m evals.pages --model smollm2 --tokens 8192 --output evals/results/pages-smollm2-8k.json
    python -m evals.pages --model MODEL --tokens 16384 32768 --device cuda --dtype bfloat16

A block is 128 queries of the query heads of a KV head, a page so many keys; what counts is the share of the
block's softmax (the mean over its queries and heads) that the kept pages hold. Sinks (the first page), the
block itself and the one before it are always kept, as `select_blocks` does it, and count as kept.

Estimates, as QUERIES x KEYS. Queries: their mean, or some of them (8 evenly spread, the last 4) with a
softmax each. Keys: "mean" of the page; "gaussian", the log of the mean of exp(q.k) if channels of the page
were normal and independent; "bound", most that q.k can be for keys between the page's minima and maxima;
"signs", eight tokens of the page in one bit a channel. Antidiagonals: sums of q.k along antidiagonals of
squares of stride x stride, softmax over these. The oracle knows the true shares.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from selfindex.evaluation.cache_layers import observe_dense
from selfindex.evaluation.models import load
from selfindex.evaluation.texts import excerpt, load_text
from selfindex.integrations.transformers.observer import Observation

from .environment import save
from .models import PARTS, assembled

BLOCK = 128
DENSITIES = (0.05, 0.1, 0.2)
MASS = 0.95
TARGETS = (0.9, 0.95, 0.98)
SAMPLED = 8
"""Queries of a block, and keys of a page, that stand for all of them."""


Shares = Callable[[Tensor, Tensor, int], Tensor]
"""(queries [G, N, d] times the scaling, keys [N, d], page) -> log of a page's weight [G, M, n, N / page]
for M queries of each of the n blocks."""


def _mean(queries: Tensor) -> Tensor:
    return queries.unflatten(1, (-1, BLOCK)).mean(2)[:, None]


def _spread(queries: Tensor) -> Tensor:
    step = BLOCK // SAMPLED
    return queries.unflatten(1, (-1, BLOCK))[:, :, step - 1 :: step].transpose(1, 2)


def _last(queries: Tensor) -> Tensor:
    return queries.unflatten(1, (-1, BLOCK))[:, :, -4:].transpose(1, 2)


ASKING = {"mean": _mean, "8 spread": _spread, "last 4": _last}


def by_mean(asked: Tensor, keys: Tensor, page: int) -> Tensor:
    """Product with the mean of the keys."""
    return asked @ keys.unflatten(0, (-1, page)).mean(1).T


def by_gaussian(asked: Tensor, keys: Tensor, page: int) -> Tensor:
    """As log E exp(q.k) of normal, independent channels."""
    pages = keys.unflatten(0, (-1, page))
    return asked @ pages.mean(1).T + asked.square() @ pages.var(1, correction=0).T / 2


def by_bound(asked: Tensor, keys: Tensor, page: int) -> Tensor:
    """The largest q.k within the channels' ranges."""
    pages = keys.unflatten(0, (-1, page))
    return asked.clamp(min=0) @ pages.amax(1).T + asked.clamp(max=0) @ pages.amin(1).T


def by_signs(asked: Tensor, keys: Tensor, page: int) -> Tensor:
    """As log of the mean of exp(q.k) over some tokens in one bit a channel around the prompt's mean."""
    centred = keys - keys.mean(0)
    coded = centred.sign() * centred.abs().mean(0) + keys.mean(0)
    step = page // SAMPLED
    tokens = coded.unflatten(0, (-1, page))[:, step // 2 :: step]
    found = [asked @ tokens[:, i].T for i in range(SAMPLED)]
    return torch.stack(found).logsumexp(0)


KEYS = {"mean": by_mean, "gaussian": by_gaussian, "bound": by_bound, "signs": by_signs}


def shares(weights: Tensor, page: int) -> Tensor:
    """From log-weights [G, M, n, pages] the share of each page in each block's softmax: [n, pages]."""
    return weights.masked_fill(~visible(weights, page), -torch.inf).softmax(-1).mean((0, 1))


def visible(like: Tensor, page: int) -> Tensor:
    """Pages that a block sees something of: bool [n, pages]."""
    blocks, pages = like.shape[-2:]
    ends = (torch.arange(blocks, device=like.device) + 1) * BLOCK
    return torch.arange(pages, device=like.device) * page < ends[:, None]


def antidiagonals(queries: Tensor, keys: Tensor, page: int, stride: int) -> Tensor:
    """Shares from sums along antidiagonals; arguments as `Shares`."""
    tokens = queries.shape[1]
    rows, columns = tokens // stride, page // stride
    backwards = queries.unflatten(1, (rows, stride)).flip(2).flatten(2)
    strided = keys.unflatten(0, (rows, stride)).flatten(1)
    found = queries.new_zeros(tokens // BLOCK, tokens // page)
    step = BLOCK // stride
    causal = torch.ones(step, step, dtype=torch.bool, device=keys.device).triu(1)
    for block in range(len(found)):
        first, end = block * step, (block + 1) * step
        logits = backwards[:, first:end] @ strided[:end].T / stride
        logits[..., first:].masked_fill_(causal, -torch.inf)
        weights = logits.softmax(-1).mean((0, 1))
        found[block, : end // columns] = weights.unflatten(0, (-1, columns)).sum(-1)
    return found


def true_shares(queries: Tensor, keys: Tensor, page: int) -> Tensor:
    """What the pages hold of the blocks' softmax: [n, pages]."""
    tokens = queries.shape[1]
    found = queries.new_zeros(tokens // BLOCK, tokens // page)
    causal = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=keys.device).triu(1)
    for block in range(len(found)):
        first, end = block * BLOCK, (block + 1) * BLOCK
        logits = queries[:, first:end] @ keys[:end].T
        logits[..., first:].masked_fill_(causal, -torch.inf)
        weights = logits.softmax(-1).mean((0, 1))
        found[block, : end // page] = weights.unflatten(0, (-1, page)).sum(-1)
    return found


def estimates(queries: Tensor, keys: Tensor, page: int, names: list[str]) -> dict[str, Tensor]:
    """Estimated shares [n, pages] by the estimate's name."""
    found = {}
    for asking, ask in ASKING.items():
        for of, weigh in KEYS.items():
            name = f"{asking} x {of}"
            if not names or name in names:
                found[name] = shares(weigh(ask(queries), keys, page), page)
    for stride in (8, 16):
        name = f"antidiagonals, {stride}"
        if not names or name in names:
            found[name] = antidiagonals(queries, keys, page, stride)
    return found


@dataclass
class Outcome:
    """One KV head under one estimate.

    Attributes:
        recall: mean true share of what is kept, by density.
        needed: share of the pages to keep, best first, for MASS of every block's softmax.
        reached: (density, recall) where blocks keep pages until their estimated share is a target, by target.
    """

    recall: list[float]
    needed: float
    reached: list[tuple[float, float]]


def judge(estimate: Tensor, true: Tensor, page: int) -> Outcome:
    """Compare an estimate with the truth, both [n, pages]."""
    blocks, pages = true.shape
    seen = visible(true, page)
    counts = seen.sum(-1)
    own = BLOCK // page
    at = torch.arange(pages, device=true.device)
    first = torch.arange(blocks, device=true.device)[:, None] * own
    always = ((at == 0) | (at >= first - own)) & seen
    order = estimate.masked_fill(always, torch.inf).masked_fill(~seen, -1).argsort(-1, descending=True)
    held, believed = (x.gather(-1, order).cumsum(-1) for x in (true, estimate))
    fixed = always.sum(-1)

    def upto(number: Tensor) -> Tensor:
        number = torch.maximum(number, fixed).minimum(counts)
        return held.gather(-1, number[:, None] - 1).mean()

    def first_with(sums: Tensor, target: float) -> Tensor:
        number = (sums < target - 1e-6).sum(-1) + 1
        return torch.maximum(number, fixed).minimum(counts)

    recall = [float(upto((counts * density).ceil().long())) for density in DENSITIES]
    needed = float(first_with(held, MASS).sum() / counts.sum())
    reached = []
    for target in TARGETS:
        number = first_with(believed, target)
        reached.append((float(number.sum() / counts.sum()), float(upto(number))))
    return Outcome(recall, needed, reached)


@torch.inference_mode()
def study(
    model: Any, ids: Tensor, page: int, layers: int, names: list[str]
) -> dict[str, list[list[Outcome]]]:
    """Outcomes by estimate, of every `layers`-th layer, of every KV head."""
    found: dict[str, list[list[Outcome]]] = {}

    def keep(seen: Observation) -> None:
        if seen.layer.layer_idx % layers:
            return
        heads = seen.keys.shape[1]
        grouped = seen.query[0].unflatten(0, (heads, -1))
        own: dict[str, list[Outcome]] = {}
        for queries, keys in zip(grouped, seen.keys[0], strict=True):
            queries, keys = queries.float() * seen.scaling, keys.float()
            true = true_shares(queries, keys, page)
            for name, estimate in {"oracle": true, **estimates(queries, keys, page, names)}.items():
                own.setdefault(name, []).append(judge(estimate, true, page))
        for name, outcomes in own.items():
            found.setdefault(name, []).append(outcomes)

    observe_dense(model, DynamicCache(config=model.config), ids, keep, logits_to_keep=1)
    return found


def summarised(found: dict[str, list[list[Outcome]]]) -> dict[str, dict[str, Any]]:
    """Means over heads and layers, and the worst layer."""
    rows = {}
    for name, layers in found.items():
        recall = torch.tensor([[o.recall for o in heads] for heads in layers]).mean(1)
        needed = torch.tensor([[o.needed for o in heads] for heads in layers]).mean(1)
        reached = torch.tensor([[o.reached for o in heads] for heads in layers]).mean(1)
        rows[name] = {
            "recall": _rounded(recall.mean(0)),
            "worst_layer": _rounded(recall.amin(0)),
            "needed": round(float(needed.mean()), 4),
            "reached": [_rounded(each) for each in reached.mean(0)],
            "reached_worst_layer": [_rounded(each) for each in reached[..., 1].amin(0, keepdim=True)],
        }
    return rows


def _rounded(values: Tensor) -> list[float]:
    return [round(float(x), 4) for x in values]


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for column in ("estimate", *(f"recall {100 * x:g} %" for x in DENSITIES), f"needed {100 * MASS:g} %",
                   *(f"target {x:g}" for x in TARGETS)):  # fmt: skip
        table.add_column(column, no_wrap=True)
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["recall"][1]):
        recall = [f"{a:.3f} ({b:.3f})" for a, b in zip(row["recall"], row["worst_layer"], strict=True)]
        reached = [f"{100 * density:.1f} % {recall:.3f}" for density, recall in row["reached"]]
        table.add_row(name, *recall, f"{100 * row['needed']:.1f} %", *reached)
    Console(width=160).print(table)


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, qwen-coder-0.5b, ..., or a model path")
    parser.add_argument("--texts", nargs="+", default=["manual", "stdlib"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    parser.add_argument("--pages", type=int, nargs="+", default=[128], help="keys of a page, 64 or 128")
    parser.add_argument("--layers", type=int, default=1, help="look at every so many layers")
    parser.add_argument("--estimates", nargs="+", default=[], help="only these; all without it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    source = str(assembled(args.model)) if args.model in PARTS else args.model
    loaded = load(source, args.device, args.dtype)
    result: dict[str, Any] = {"model": Path(loaded.name).name, "densities": DENSITIES, "mass": MASS,
                              "targets": TARGETS, "layers": args.layers, "runs": []}  # fmt: skip
    for tokens in args.tokens:
        for page in args.pages:
            found: dict[str, list[list[Outcome]]] = {}
            for text in args.texts:
                part = excerpt(load_text(text), 1, 8, 12 * tokens)
                ids = loaded.tokenizer(part, return_tensors="pt").input_ids[:, :tokens]
                if ids.shape[1] < tokens:
                    raise ValueError(f"the text {text} gives {ids.shape[1]} tokens, {tokens} are needed")
                own = study(loaded.model, ids.to(loaded.model.device), page, args.layers, args.estimates)
                for name, layers in own.items():
                    # Texts are more heads of the same layers.
                    kept = found.setdefault(name, [[] for _ in layers])
                    for mine, new in zip(kept, layers, strict=True):
                        mine.extend(new)
            rows = summarised(found)
            show(f"{result['model']}, {tokens} tokens, pages of {page}", rows)
            result["runs"].append({"tokens": tokens, "page": page, "texts": args.texts, "estimates": rows})
            save(args.output, "pages", result)


if __name__ == "__main__":
    main()
