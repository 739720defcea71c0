"""Attention of new queries over everything a layer holds."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import ops
from ..store import LayerStore
from .partial import attend_raw, join_parts, merge_parts
from .step import StepPlans, attend_step, budgets_of

MOST_STEP_TOKENS = 8
"""New tokens a row that a decode step takes one behind the other; more are a chunk."""

STAGED_PAGES = 1024
"""Offloaded pages on the device at a time when many queries attend to all of them."""


def attend(
    store: LayerStore,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    scaling: float,
    sink_logit: Tensor | None = None,
    plans: StepPlans | None = None,
) -> tuple[Tensor, list[int]]:
    """Attend to stored tokens and, causally, to the new ones.

    Changes nothing that the store counts as held; a short step writes the new tokens behind it, see
    `is_step`.

    Args:
        query: [B, Hq, T, d]; keys, values: [B, H, T, d], the new tokens, post-RoPE.
        valid: bool [B, T], False for padding; None if there is none.
        scaling: factor on q.k.
        sink_logit: [Hq], see `merge_parts`.
        plans: shared by the layers of a forward pass.
    Returns:
        (output [B, Hq, T, d] in the query's dtype, encoded tokens read per row).
    """
    encoded = [store.encoded(b) for b in range(store.batch)]
    if is_step(store, query, valid):
        store.reserve(0, store.raw.width + query.shape[2])
        plan = (plans or StepPlans())(store, query.shape[2])
        output = attend_step(store, query, keys, values, plan, scaling, sink_logit).transpose(1, 2)
        return output, encoded if plan.everything else budgets_of(store, query.shape[2])
    raw = _raw_part(store, query, keys, values, valid, scaling)
    if not any(encoded):
        return merge_parts([raw], sink_logit).to(query.dtype), encoded
    budgets = budgets_of(store, query.shape[2])
    if query.shape[2] > store.config.sparse_queries or budgets == encoded:
        part, read = _dense_part(store, query, scaling), encoded
    else:
        part, read = _sparse_part(store, query, budgets, scaling), budgets
    return merge_parts([part, raw], sink_logit).to(query.dtype), read


def is_step(store: LayerStore, query: Tensor, valid: Tensor | None) -> bool:
    """Whether new tokens are taken by `attend_step`: few of them, in all rows, behind encoded ones."""
    few = query.shape[2] <= min(MOST_STEP_TOKENS, max(1, store.config.sparse_queries))
    return few and valid is None and any(row.blocks for row in store.table.rows)


def _raw_part(
    store: LayerStore, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    held_k, held_v, real = store.raw.held()
    b, t, past = query.shape[0], query.shape[2], held_k.shape[2]
    causal = torch.ones(t, t, dtype=torch.bool, device=query.device).tril()
    new = causal.expand(b, t, t) if valid is None else causal & valid[:, None, :]
    old = torch.ones(1, 1, 1, dtype=torch.bool, device=query.device) if real is None else real[:, None, :]
    visible = torch.cat((old.expand(b, t, past), new), -1)
    joined = [torch.cat(pair, 2) for pair in ((held_k, keys), (held_v, values))]
    return attend_raw(query, joined[0], joined[1], visible[:, None, None], scaling)


def _dense_part(store: LayerStore, query: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention to all encoded tokens.

    Every tile of queries reads all pages. One query does so in place; for more of them, pages in
    host memory are copied to the device first, a bounded number at a time.
    """
    table, counts = store.table.tensors()
    if not store.pool.offloading or query.shape[2] == 1:
        return _attend_to_all(store, query, store.pool.index, store.pool.payload, table, counts, scaling)
    step, joined = max(1, STAGED_PAGES // store.batch), None
    for first in range(0, table.shape[1], step):
        index, payload, local = store.table.stage(first, first + step)
        near = counts[:, first : first + step]
        part = _attend_to_all(store, query, index, payload, local, near, scaling)
        joined = part if joined is None else join_parts(joined, part)
    assert joined is not None
    return joined


def _attend_to_all(
    store: LayerStore,
    query: Tensor,
    index: Tensor,
    payload: Tensor,
    table: Tensor,
    counts: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    assert store.constants is not None  # there are pages
    return ops.dense_attend(query, index, payload, table, counts, store.constants, scaling, store.format.name)


def _sparse_part(
    store: LayerStore, query: Tensor, budgets: list[int], scaling: float
) -> tuple[Tensor, Tensor]:
    assert store.constants is not None  # there are pages
    table, counts = store.table.tensors()
    wanted = torch.tensor(budgets, dtype=torch.int32, device=query.device)
    pools = query, store.pool.index, store.pool.payload, table, counts
    return ops.sparse_decode(*pools, wanted, max(budgets), store.constants, scaling, store.format.name)
