"""Attention layer by layer: what a cache reads, and how far its output is from dense attention.

Queries, keys and values come from the dense model, so that errors of earlier layers do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..attention.attend import attend
from ..backends import reference
from ..codec.votes import choose_pinned
from ..index.select import sum_of_softmax, top_k
from ..integrations.transformers.models import cache_argument
from ..integrations.transformers.observer import Observation
from ..store.pinned import OBSERVED_QUERIES, pinned_order
from .baselines import baseline_cache
from .baselines.base import Baseline
from .baselines.quantised import Dense
from .baselines.sparse import Oracle
from .cache_layers import ReplacedLayer
from .recording import Recording


@dataclass(frozen=True)
class Seen:
    """What one layer of the dense model saw of T tokens after a prefix of n.

    Attributes:
        query: [1, Hq, T, d]; keys, values: [1, H, T, d], post-RoPE.
        output: [1, T, Hq, d], dense attention.
        weights: float32 [H, G, T, n + T], its probabilities.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    output: Tensor
    weights: Tensor


@torch.inference_mode()
def observe(model: Any, recording: Recording, ids: Tensor) -> list[Seen]:
    """Run the dense model over ids [1, T] after a recorded prefix, and keep what layers saw."""
    cache, found = baseline_cache(model, recording, Dense()), list[Seen]()

    def keep(seen: Observation) -> None:
        prefix = seen.layer.attention.stored.keys  # [H, n, d]
        weights = _weights(seen.query, prefix, seen.keys[0], seen.scaling)
        found.append(Seen(seen.query, seen.keys, seen.values, seen.scaling, seen.output, weights))

    for layer in cache.compressed_layers:
        layer.observer = keep
    model(ids, **{cache_argument(model): cache, "logits_to_keep": 1})
    return found


def _weights(query: Tensor, prefix: Tensor, new: Tensor, scaling: float) -> Tensor:
    grouped = query[0].float().unflatten(0, (new.shape[0], -1))  # [H, G, T, d]
    keys = torch.cat((prefix.float(), new.float()), 1)
    logits = grouped @ keys[:, None].mT * scaling
    t, n = query.shape[2], prefix.shape[1]
    causal = torch.ones(t, n + t, dtype=torch.bool, device=query.device).tril(n)
    return logits.masked_fill(~causal, -torch.inf).softmax(-1)


@torch.inference_mode()
def visible(layer: Any, prefix: tuple[Tensor, Tensor, Tensor, float], query: Tensor) -> Tensor:
    """Prefix tokens that each query attends to through a filled cache layer.

    Args:
        layer: of a `SelfIndexCache` or a `baseline_cache`.
        prefix: what it was filled with, an element of `Recording.tensors`.
        query: [1, Hq, T, d].
    Returns:
        bool [H, T, n].
    """
    prompt, keys, _, scaling = prefix
    heads, n = keys.shape[1:3]
    everything = torch.ones(heads, query.shape[2], n, dtype=torch.bool, device=query.device)
    if isinstance(layer, ReplacedLayer):
        chosen = cast(Baseline, layer.attention).visible(query[0].float().unflatten(0, (heads, -1)), scaling)
        return everything if chosen is None else chosen.expand_as(everything)
    store = layer.store
    encoded = store.encoded(0)
    budget = store.config.budget_tokens(n + query.shape[2], encoded)
    if budget == encoded:
        return everything
    table, counts = store.table.tensors()
    asked = query
    if store.config.preset == "paper":
        asked = query.float().unflatten(1, (heads, -1)).mean(2)
    logits = reference.score(
        asked, store.pool.index, table, counts, store.constants, scaling, store.format.name
    )
    votes = logits if store.config.preset == "paper" else sum_of_softmax(logits, heads)
    slots = top_k(votes, torch.tensor([budget]), budget)[0].long()  # [H, T, budget]
    if store.config.preset == "paper":
        queries = prompt[0, :, -OBSERVED_QUERIES:].unflatten(0, (heads, -1))
        exact = choose_pinned(keys, queries[None], store.config.sinks, scaling)[0]
    else:
        order = torch.arange(n, device=query.device).expand(heads, -1)
        if store.config.pinned_tokens:
            order = pinned_order(store.config, keys, prompt, scaling)[0]
        first = store.config.front
        exact = torch.cat((order[:, :first], order[:, first + encoded :]), 1)
    held = torch.zeros(heads, n, dtype=torch.bool, device=query.device).scatter(1, exact, True)
    # Encoded tokens keep their order, so slot i is the i-th token that is not held.
    places = (~held).nonzero()[:, 1].view(heads, 1, -1).expand(-1, query.shape[2], -1)
    mask = torch.zeros_like(everything).scatter(2, places.gather(2, slots), True)
    return mask | held[:, None]


@torch.inference_mode()
def measure(cache: Any, recording: Recording, seen: list[Seen], budget: float) -> dict[str, Any]:
    """Per layer and query head, over the queries seen.

    Returns:
        lists [layers][Hq]: "mass", the softmax mass on the tokens read; "error", the relative L2
        error of the output; and [layers][H] "overlap", the share of the oracle's tokens (as
        many as the budget allows, with the most true mass) that are read.
    """
    found: dict[str, list[list[float]]] = {"mass": [], "error": [], "overlap": []}
    for layer, prefix, dense in zip(cache.compressed_layers, recording.tensors, seen, strict=True):
        heads, n = prefix[1].shape[1:3]
        read = visible(layer, prefix, dense.query)
        missed = (dense.weights[..., :n] * ~read[:, None]).sum(-1)  # [H, G, T]
        found["mass"].append(_rounded(1 - missed.mean(-1).flatten()))
        output = _attend(layer, dense)
        error = (output - dense.output).float().norm(dim=-1) / dense.output.float().norm(dim=-1)
        found["error"].append(_rounded(error[0].mean(0)))
        oracle = Oracle(budget)
        stored = oracle.store(prefix[0][0], prefix[1][0].float(), prefix[2][0].float(), dense.scaling)
        best = oracle.select(stored, dense.query[0].float().unflatten(0, (heads, -1)), dense.scaling)
        found["overlap"].append(_rounded((best & read).sum((1, 2)) / best.sum((1, 2))))
    return found


def _attend(layer: Any, seen: Seen) -> Tensor:
    """Output [1, T, Hq, d] of a filled layer, which is left as it is."""
    if not isinstance(layer, ReplacedLayer):
        output, _ = attend(layer.store, seen.query, seen.keys, seen.values, None, seen.scaling)
        return output.transpose(1, 2)
    baseline = cast(Baseline, layer.attention)
    before = baseline.new_keys, baseline.new_values
    output = baseline.attend(seen.query, seen.keys, seen.values, seen.scaling)
    baseline.new_keys, baseline.new_values = before
    return output


def _rounded(values: Tensor) -> list[float]:
    return [round(float(x), 5) for x in values]
