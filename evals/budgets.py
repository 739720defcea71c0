"""Rules that spread a budget over layers and heads, all with the same average.

=========== ===========================================================================
uniform     every head selects the same share
threshold   every query selects the tokens above one probability, the same for the model
heads       every head has a share of its own, fixed for the text
layers      every layer has a share of its own, fixed for the text
=========== ===========================================================================

The probability is what the index estimates, summed over the query heads of a KV head and relative
to all tokens. The last queries of the prefix fix the threshold that gives the average share, and
what heads and layers select above it is their budget; with "other" before the rule, the last
queries of another text do: what a per-model profile would hold.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .capture import TAIL, Record
from .sparse import RECENT, SINKS, Prefix, Variant, aggregate

QUERIES = 32  # calibration queries
LEAST = 8  # tokens that a head may select at any rate
Budgets = dict[int, Tensor]  # layer -> [H] share of its tokens


@torch.no_grad()
def _probabilities(record: Record, prefixes: dict[int, Prefix]) -> dict[int, Tensor]:
    """Estimated probability [H, T, n] of the encoded tokens for the last prefix queries."""
    found = {}
    for i, layer in record.layers.items():
        prefix, heads = prefixes[i], layer.k.shape[0]
        q = layer.q_tail[:, -QUERIES:] * layer.scaling
        q = q.view(heads, -1, *q.shape[1:])
        exact = torch.einsum("hgtd,hnd->hgtn", q, prefix.exact_k)
        # The queries are among the recent tokens, which they see causally.
        last = torch.arange(TAIL - QUERIES, TAIL) + RECENT - TAIL
        hidden = torch.arange(-SINKS, RECENT) > last[:, None]
        exact = exact.masked_fill(hidden, -torch.inf)
        estimate = torch.einsum("hgtd,hnd->hgtn", q, prefix.k_index)
        found[i] = aggregate(estimate, exact, "sum_full")
    return found


def _threshold(found: dict[int, Tensor], share: float) -> float:
    """The probability above which the share of all tokens lies."""
    everything = torch.cat([x.flatten() for x in found.values()])
    return float(everything.topk(max(1, round(share * everything.numel()))).values[-1])


def shares(record: Record, prefixes: dict[int, Prefix], variant: Variant) -> Budgets:
    """Share of every head above the threshold."""
    found = _probabilities(record, prefixes)
    limit = _threshold(found, variant.budget)
    return {i: (x > limit).float().mean((1, 2)) for i, x in found.items()}


def spread(
    record: Record, prefixes: dict[int, Prefix], variant: Variant, other: Budgets | None
) -> dict[int, Prefix]:
    """The prefixes with the budgets that the rule `variant.spread` gives them."""
    first = sorted(prefixes)[: variant.dense_layers]
    if variant.spread == "uniform":
        mine = dict(prefixes)
    elif variant.spread == "threshold":
        limit = _threshold(_probabilities(record, prefixes), variant.budget)
        mine = {i: replace(prefix, threshold=limit) for i, prefix in prefixes.items()}
    else:
        given = other if variant.spread.startswith("other") else shares(record, prefixes, variant)
        assert given is not None
        if variant.spread.endswith("layers"):
            given = {i: x.mean().expand_as(x) for i, x in given.items()}
        mine = {
            i: replace(prefix, counts=(given[i] * prefix.k_hat.shape[1]).round().clamp(min=LEAST))
            for i, prefix in prefixes.items()
        }
    for i in first:
        heads, n = prefixes[i].k_hat.shape[:2]
        mine[i] = replace(prefixes[i], counts=torch.full((heads,), n), threshold=None)
    return mine


def bytes_stored(variant: Variant, head_dim: int) -> float:
    """Bytes of the `balanced` format per encoded token and KV head, as `bytes_read` counts them."""
    return bytes_read(replace(variant, rerank=1), head_dim, 1.0)


def bytes_read(variant: Variant, head_dim: int, share: float) -> float:
    """Bytes a step reads per encoded token and KV head of the `balanced` format, `share` selected."""
    page = variant.key.page or 128
    index = head_dim / 8 + 1 + variant.key.own_scale + (head_dim + 12) / page
    magnitudes = head_dim * (variant.key.bits - 1) / 8
    payload = magnitudes + head_dim * variant.value.bits / 8 + 1
    candidates = (variant.rerank - 1) * share * magnitudes
    means = 0.0 if variant.comp == "off" else head_dim / page
    return index + share * payload + candidates + means
