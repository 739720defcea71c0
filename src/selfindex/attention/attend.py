"""Attention of new queries over everything a layer holds."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import ops
from ..store import LayerStore
from .exact import exact_part
from .integers import StepIntegers
from .partial import join_parts, merge_parts

BLOCK = 4096
"""Queries at a time over encoded tokens: bounds what is in float32. Each block decodes all pages it reads."""

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
    integers: StepIntegers | None = None,
) -> tuple[Tensor, list[int]]:
    """Attend to stored tokens and, causally, to the new ones. Changes nothing in the store.

    Args:
        query: [B, Hq, T, d]; keys, values: [B, H, T, d], the new tokens, post-RoPE.
        valid: bool [B, T], False for padding; None if there is none.
        scaling: factor on q.k.
        sink_logit: [Hq], see `merge_parts`.
        integers: shared by the layers of a forward pass.
    Returns:
        (output [B, Hq, T, d] in the query's dtype, encoded tokens read per row).
    """
    integers, new = integers or StepIntegers(), query.shape[2]
    read = encoded = [store.encoded(b) for b in range(store.batch)]
    budgets = [store.config.budget_tokens(store.length(b) + new, n) for b, n in enumerate(encoded)]
    sparse = any(encoded) and new <= store.config.sparse_queries and budgets != encoded
    if sparse:
        read = budgets

    def encoded_part(query: Tensor) -> tuple[Tensor, Tensor]:
        return (
            _sparse_part(store, query, budgets, scaling, integers)
            if sparse
            else _dense_part(store, query, scaling)
        )

    if new == 1 and valid is None and any(encoded):
        part = encoded_part(query)
        return _finish_step(store, query, keys, values, part, scaling, sink_logit, integers), read
    raw = exact_part(store.raw, query, keys, values, valid, scaling, integers)
    outputs = []
    # Blocks of queries: attention to encoded tokens and merging work in float32.
    for q, *exact in zip(*(x.split(BLOCK, 2) for x in (query, *raw)), strict=True):
        parts = [(exact[0], exact[1])]
        if any(encoded):
            parts.insert(0, encoded_part(q))
        outputs.append(merge_parts(parts, sink_logit).to(query.dtype))
    return torch.cat(outputs, 2), read


def _finish_step(
    store: LayerStore,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    part: tuple[Tensor, Tensor],
    scaling: float,
    sink_logit: Tensor | None,
    integers: StepIntegers,
) -> Tensor:
    """The full-precision part of one new token a row, in one operator: many small ones cost more.

    Writes the new token where `append` will put it, behind the tokens that are held.
    """
    if store.raw.width == store.raw.capacity:
        store.reserve(0, store.raw.width + 1)
    lengths = integers(store.raw.lengths, query.device)
    output = ops.window_attend(
        query, keys, values, store.raw.keys, store.raw.values, lengths, *part, sink_logit, scaling
    )
    return output.transpose(1, 2)


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
    store: LayerStore, query: Tensor, budgets: list[int], scaling: float, integers: StepIntegers
) -> tuple[Tensor, Tensor]:
    assert store.constants is not None  # there are pages
    table, counts = store.table.tensors()
    return ops.sparse_decode(
        query,
        store.pool.index,
        store.pool.payload,
        table,
        counts,
        integers(budgets, query.device),
        max(budgets),
        store.constants,
        scaling,
        store.format.name,
    )
