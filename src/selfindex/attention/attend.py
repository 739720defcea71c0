"""Attention of new queries over everything a layer holds."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import ops
from ..backends.partial import join_parts
from ..store import LayerStore
from .chunk import attend_chunk, is_sparse_chunk
from .decoded import STAGED_PAGES, decoded_parts, groups_of, is_decoded
from .exact import exact_part
from .parts import Parts
from .step import StepPlan, StepPlans, attend_step, budgets_of

BLOCK = 4096
"""Queries at a time over encoded tokens: bounds what is in float32. Each block decodes all pages it reads."""

MOST_STEP_TOKENS = 8
"""New tokens a row that a decode step takes one behind the other; more are a chunk."""


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
    """Attend to stored tokens and, causally, to the new ones; sparsely where `is_sparse_chunk` says so.

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
    plans, new = plans or StepPlans(), query.shape[2]
    if is_step(store, query, valid):
        output, plan = take_step(store, query, keys, values, scaling, sink_logit, plans)
        return output.transpose(1, 2), plan.read
    encoded = [store.encoded(b) for b in range(store.batch)]
    budgets = budgets_of(store, new)
    sparse = any(encoded) and new <= store.config.sparse_queries and budgets != encoded
    read = budgets if sparse else encoded
    longest = max(store.length(b) for b in range(store.batch)) + new
    if not sparse and is_sparse_chunk(store.config, longest, new):
        return attend_chunk(store, query, keys, values, valid, scaling, sink_logit), read
    window = exact_part(store.window, query, keys, values, valid, scaling, plans)
    output = torch.empty_like(query)
    decoded = any(encoded) and not sparse and is_decoded(store, query, scaling)
    for rows in groups_of(store) if decoded else ():
        parts = Parts()
        decoded = decoded_parts(store, rows, query[rows], scaling, parts)
        if not decoded:
            break
        parts.add(*(x[rows] for x in window))
        parts.write(output[rows], sink_logit)
    if decoded:
        return output, read
    # Blocks of queries: attention to encoded tokens works in float32.
    for t in range(0, new, BLOCK):
        q, out, *exact = (x[:, :, t : t + BLOCK] for x in (query, output, *window))
        parts = Parts()
        if any(encoded):
            part = _sparse_part(store, q, budgets, scaling) if sparse else _dense_part(store, q, scaling)
            parts.add(*part)
        parts.add(exact[0], exact[1])
        parts.write(out, sink_logit)
    return output, read


def take_step(
    store: LayerStore,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    sink_logit: Tensor | None,
    plans: StepPlans,
) -> tuple[Tensor, StepPlan]:
    """What `attend` does in a step: output [B, T, Hq, d] in the query's dtype, and the plan it followed."""
    new = query.shape[2]
    if store.window.width + new > store.window.capacity:
        store.reserve(0, store.window.width + new)
    plan = plans(store, new)
    return attend_step(store, query, keys, values, plan, scaling, sink_logit), plan


def is_step(store: LayerStore, query: Tensor, valid: Tensor | None) -> bool:
    """Whether new tokens are taken by `attend_step`: few of them, in all rows, behind encoded ones."""
    few = 1 <= query.shape[2] <= min(MOST_STEP_TOKENS, max(1, store.config.sparse_queries))
    return few and valid is None and any(row.blocks for row in store.table.rows)


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
    recent = store.pool.recent_tokens(store.batch * query.shape[2] * max(budgets))
    rest = store.constants, scaling, store.format.name, recent
    return ops.sparse_decode(*pools, wanted, max(budgets), *rest)
