"""Sparse attention of a block of queries over a fake-quantised prefix, in plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from selfindex.evaluation.baselines.base import RECENT, SINKS
from selfindex.evaluation.baselines.quantised import minmax
from selfindex.evaluation.baselines.sparse import snapkv_votes

from .capture import LayerRecord
from .fakequant import (
    KeySpec,
    ValueSpec,
    encode_keys,
    encode_paper,
    encode_values,
    page_means,
)

RESIDUAL_VARIANCE = 1 - 2 / math.pi  # of a Gaussian given its sign


@dataclass(frozen=True)
class Variant:
    """One design under test."""

    key: KeySpec = field(default_factory=KeySpec)
    value: ValueSpec = field(default_factory=ValueSpec)
    budget: float = 0.05  # fraction of the prefix selected besides the exact tokens
    aggregate: str = "sum_full"
    sharpness: float = 1.0  # factor on the logits that are aggregated
    rerank: int = 1
    paper: bool = False  # the paper's codec; `key` and `value` are ignored
    snapkv_sinks: bool = False  # exact tokens: 64 chosen SnapKV-style instead of sinks + recent
    comp: str = "off"  # compensation of unselected mass: "off", or a rule of compensation.py
    comp_page: int | None = 256
    spread: str = "uniform"  # how the budget is spread over heads: a rule of budgets.py
    dense_layers: int = 0  # first layers that attend to everything
    sampled: bool = False  # draw what is read by its estimated mass, and weigh it, see `draw`
    sinks: int = SINKS  # first and last tokens of the prefix in full precision
    recent: int = RECENT


@dataclass
class Prefix:
    """An encoded prefix of one layer. Exact and encoded tokens are lists per KV head."""

    k_index: Tensor  # [H, n, d]
    k_hat: Tensor
    v_hat: Tensor
    k_true: Tensor
    v_true: Tensor
    exact_k: Tensor  # [H, e, d]
    exact_v: Tensor
    balance: Tensor | None  # [H, d]
    scale: Tensor | None  # [H, n] stored scale of each key
    tokens: int  # length of the whole prefix
    gate: Tensor | None = None  # [H, G, 1, 1]
    shift: Tensor | None = None  # [H, G, 1, 1] calibrated log-mass correction
    counts: Tensor | None = None  # [H] tokens to select, where heads have budgets of their own
    threshold: float | None = None  # select tokens with more estimated probability than this


@dataclass
class Attended:
    """Result for a block of queries; H KV heads, G queries per KV head, T queries."""

    out: Tensor  # [H, G, T, d]
    selected: Tensor  # [H, T, n] bool
    estimate: Tensor  # [H, G, T, n] logits from the index
    exact_logits: Tensor  # [H, G, T, e + T']
    peak: Tensor  # [H, G, T, 1] what `parts` are relative to
    parts: tuple[Tensor, Tensor, Tensor, Tensor]  # numerator, denominator; of the unselected


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [H, N, d] at index [H, m]."""
    rows = index + torch.arange(x.shape[0])[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*index.shape, x.shape[-1])


def snapkv_tokens(record: LayerRecord, count: int) -> Tensor:
    """[H, count] prefix positions with the most attention from the last 32 queries, pooled."""
    mass = snapkv_votes(record.q_tail[:, -32:], record.k, record.scaling)
    return mass.topk(count, -1).indices.sort(-1).values


def encode(record: LayerRecord, variant: Variant, balance: Tensor | None) -> Prefix:
    """Encode the prefix of one layer as the variant stores it."""
    heads, n, _ = record.k.shape
    if variant.snapkv_sinks:
        exact = snapkv_tokens(record, 64)
    else:
        ends = torch.arange(variant.sinks), torch.arange(n - variant.recent, n)
        exact = torch.cat(ends).expand(heads, -1)
    rest = torch.ones(heads, n, dtype=torch.bool).scatter_(1, exact, False)
    index = rest.nonzero()[:, 1].view(heads, -1)
    k, v = take(record.k, index), take(record.v, index)
    scale: Tensor | None = None
    if variant.paper:
        k_index, k_hat = encode_paper(k)
        v_hat = minmax(v, 2, 32)
    else:
        square = record.q_sq[256].unflatten(0, (heads, -1)).mean(1)
        rope = (record.frequencies, variant.sinks)
        k_index, k_hat, scale = encode_keys(k, variant.key, balance, square, *rope)
        v_hat = encode_values(v, variant.value)
    exact_k, exact_v = take(record.k, exact), take(record.v, exact)
    return Prefix(k_index, k_hat, v_hat, k, v, exact_k, exact_v, balance, scale, n)


def aggregate(estimate: Tensor, exact_logits: Tensor, how: str) -> Tensor:
    """[H, G, T, n] estimated logits -> [H, T, n] score per KV head."""
    if how == "mean":
        return estimate.mean(1)
    peak = estimate.amax(-1, keepdim=True)
    probability = (estimate - peak).exp_()
    total = probability.sum(-1, keepdim=True)
    if how.endswith("_full"):
        total = total + (exact_logits.logsumexp(-1, keepdim=True) - peak).exp()
    if how.startswith("max"):
        return (probability / total).amax(1)
    return torch.einsum("hgtn,hgt->htn", probability, 1 / total[..., 0])


def top_mask(score: Tensor, count: int) -> Tensor:
    """Boolean mask of the `count` largest entries of the last dimension."""
    if count >= score.shape[-1]:
        return torch.ones_like(score, dtype=torch.bool)
    chosen = score.topk(count, -1, sorted=False).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, chosen, True)


def choose(score: Tensor, count: int, prefix: Prefix) -> Tensor:
    """Tokens selected, bool [H, T, n], by scores [H, T, n] and the prefix's own budgets."""
    if prefix.threshold is not None:
        return score > prefix.threshold
    if prefix.counts is None:
        return top_mask(score, count)
    order = score.argsort(-1, descending=True)
    taken = torch.arange(score.shape[-1]) < prefix.counts[:, None, None]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, taken.expand_as(order))


def draw(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Priority sampling (Duffield, Lund, Thorup 2007) by scores [..., n]: (what is read, log of its weights).

    The `count` tokens with the largest score / u are read, u uniform in (0, 1]. One whose score is above the
    last of those counts once; the others are there with the probability score / last, and count for its
    inverse: on average sums over what is read are those over everything, but for one part in `count`.
    """
    priority = score / (1 - torch.rand_like(score))
    chosen = priority.topk(min(count, score.shape[-1]), -1)
    taken = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, chosen.indices, True)
    last = chosen.values[..., -1:]
    return taken, (last / score.clamp(min=1e-30)).clamp(min=1).log()


def attend(
    q: Tensor,
    prefix: Prefix,
    new_k: Tensor,
    new_v: Tensor,
    scaling: float,
    variant: Variant,
    positions: Tensor | None = None,
) -> Attended:
    """Attention of q [Hq, T, d] over the encoded prefix, its exact tokens and new tokens.

    `positions[t]` is the last new token that query t sees; by default query t sees 0..t.
    """
    heads = new_k.shape[0]
    q = q.view(heads, -1, *q.shape[1:]) * scaling
    if positions is None:
        positions = torch.arange(q.shape[2])
    own = torch.einsum("hgtd,hnd->hgtn", q, new_k)
    own = own.masked_fill(torch.arange(new_k.shape[1]) > positions[:, None], -torch.inf)
    exact_logits = torch.cat([torch.einsum("hgtd,hnd->hgtn", q, prefix.exact_k), own], -1)
    exact_v = torch.cat([prefix.exact_v, new_v], 1)
    estimate = torch.einsum("hgtd,hnd->hgtn", q, prefix.k_index)
    count = min(round(variant.budget * prefix.tokens), estimate.shape[-1])
    if variant.aggregate == "oracle":
        true = torch.einsum("hgtd,hnd->hgtn", q, prefix.k_true)
        score = aggregate(true, exact_logits, "sum_full")
    else:
        sharp = variant.sharpness
        score = aggregate(sharp * estimate, sharp * exact_logits, variant.aggregate)
    if prefix.threshold is not None:
        score = aggregate(estimate, exact_logits, "sum_full")
    if variant.rerank > 1:
        candidates = top_mask(score, count * variant.rerank)
        fine = torch.einsum("hgtd,hnd->hgtn", q, prefix.k_hat)
        score = aggregate(fine, exact_logits, "sum_full").masked_fill(~candidates, -1.0)
    own_budget = prefix.threshold is not None or prefix.counts is not None
    if variant.sampled and count < estimate.shape[-1]:
        selected, weight = draw(score, count)
        v = prefix.v_hat
        logits = torch.einsum("hgtd,hnd->hgtn", q, prefix.k_hat) + weight[:, None]
        logits.masked_fill_(~selected[:, None], -torch.inf)
        combine = "hgtn,hnd->hgtd"
    elif not own_budget and count < estimate.shape[-1] // 4:  # gather the selected tokens
        chosen = score.topk(count, -1, sorted=False).indices
        selected = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, chosen, True)
        k, v = (
            take(x, chosen.flatten(1)).unflatten(1, chosen.shape[1:]) for x in (prefix.k_hat, prefix.v_hat)
        )
        logits = torch.einsum("hgtd,htkd->hgtk", q, k)
        combine = "hgtk,htkd->hgtd"
    else:  # mask the others
        selected, v = choose(score, count, prefix), prefix.v_hat
        logits = torch.einsum("hgtd,hnd->hgtn", q, prefix.k_hat)
        logits.masked_fill_(~selected[:, None], -torch.inf)
        combine = "hgtn,hnd->hgtd"
    peak = torch.maximum(logits.amax(-1, keepdim=True), exact_logits.amax(-1, keepdim=True))
    near, far = (exact_logits - peak).exp(), (logits - peak).exp()
    top = torch.einsum("hgtn,hnd->hgtd", near, exact_v) + torch.einsum(combine, far, v)
    bottom = near.sum(-1, keepdim=True) + far.sum(-1, keepdim=True)
    rest_top, rest_bottom = torch.zeros(()), torch.zeros(())
    if variant.comp != "off" and count < estimate.shape[-1]:
        rest_bottom, rest_top = unselected(q, prefix, estimate, selected, peak, variant)
    gate = torch.ones(()) if prefix.gate is None else prefix.gate
    out = (top + gate * rest_top) / (bottom + gate * rest_bottom)
    parts = (top, bottom, rest_top, rest_bottom)
    return Attended(out, selected, estimate, exact_logits, peak, parts)


def unselected(
    q: Tensor, prefix: Prefix, estimate: Tensor, selected: Tensor, peak: Tensor, variant: Variant
) -> tuple[Tensor, Tensor]:
    """Estimated (sum of exp, sum of exp times value) of what was not selected, less `peak`.

    The index knows a key up to a residual of known variance, which raises the mean of
    exp(logit); values are replaced by the stored mean of their page.
    """
    if prefix.scale is None:
        raise ValueError("compensation needs the scales of a rotated index")
    scaled = q if prefix.balance is None else q / prefix.balance[:, None, None]
    variance = RESIDUAL_VARIANCE * prefix.scale.square()
    spread = 0.5 * scaled.square().sum(-1)[..., None] * variance[:, None, None]
    shift = 0.0 if prefix.shift is None else prefix.shift
    weight = (estimate + spread + shift - peak).exp()
    weight = weight.masked_fill(selected[:, None], 0.0)
    means = page_means(prefix.v_true, variant.comp_page, int8=variant.comp_page is not None)
    return weight.sum(-1, keepdim=True), torch.einsum("hgtn,hnd->hgtd", weight, means)
