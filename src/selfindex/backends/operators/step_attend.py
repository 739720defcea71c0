"""`step_attend`: a decode step of a layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .define import define
from .dense_attend import operator as dense_attend
from .sparse_decode import operator as sparse_decode
from .window_attend import operator as window_attend


def _fake_step(query: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], query.shape[3])


def step_attend(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    index_pool: Tensor,
    payload_pool: Tensor,
    block_table: Tensor,
    page_counts: Tensor,
    budgets: Tensor | None,
    width: int,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    sink_logit: Tensor | None,
    constants: Tensor,
    scaling: float,
    format: str,
    recent: Tensor | None = None,
) -> Tensor:
    """Store one new token a row, attend to encoded and to full-precision tokens.

    `sparse_decode`, or `dense_attend` where there are no budgets, and `window_attend` with what that gave.
    These run as operators, so that a device that has them has this one.

    Args:
        query: [B, Hq, 1, d]; new_keys, new_values: [B, H, 1, d].
        budgets: int32 [B], encoded tokens that a row reads, at most `width`; None for all of them.
        keys, values: [B, H, room, d], written at position `lengths[b]`.
        lengths: int32 [B], full-precision tokens held before this step, below `room`.
        sink_logit: [Hq] or None, see `merge_parts`.
        recent: see `sparse_decode`.
    Returns:
        [B, 1, Hq, d] in the query's dtype.
    """
    pools, rest = (query, index_pool, payload_pool, block_table, page_counts), (constants, scaling, format)
    if budgets is None:
        part = dense_attend(*pools, *rest)
    else:
        part = sparse_decode(*pools, budgets, width, *rest, recent)
    return window_attend(query, new_keys, new_values, keys, values, lengths, *part, sink_logit, scaling)


operator = define(step_attend, _fake_step, ("keys", "values", "recent"))
