"""The operators of the cache as PyTorch custom operators: one signature, several backends.

The reference implementation serves every device; a faster backend registers itself for its device
with `op.register_kernel`. Shapes are those of `reference`.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..codec import PageFormat
from . import cpu, cuda, reference


@torch.library.custom_op("selfindex::encode", mutates_args=())
def encode(
    keys: Tensor, values: Tensor, counts: Tensor, constants: Tensor, format: str
) -> tuple[Tensor, Tensor]:
    """Encode raw pages [n, H, P, d] into index and payload planes, uint8 [n, bytes] each."""
    return reference.encode(keys, values, counts, constants, format)


@encode.register_fake
def _(keys: Tensor, values: Tensor, counts: Tensor, constants: Tensor, format: str) -> tuple[Tensor, Tensor]:
    fmt, n = PageFormat.parse(format), keys.shape[0]
    planes = [keys.new_empty((n, size), dtype=torch.uint8) for size in (fmt.index_bytes, fmt.payload_bytes)]
    return planes[0], planes[1]


@torch.library.custom_op("selfindex::score", mutates_args=())
def score(
    query: Tensor,
    index_pool: Tensor,
    block_table: Tensor,
    page_counts: Tensor,
    constants: Tensor,
    scaling: float,
    format: str,
) -> Tensor:
    """Estimate logits from the index alone: float32 [B, Hq, T, S], -inf in empty slots."""
    return reference.score(query, index_pool, block_table, page_counts, constants, scaling, format)


@score.register_fake
def _(
    query: Tensor,
    index_pool: Tensor,
    block_table: Tensor,
    page_counts: Tensor,
    constants: Tensor,
    scaling: float,
    format: str,
) -> Tensor:
    slots = block_table.shape[1] * PageFormat.parse(format).page_size
    return query.new_empty((*query.shape[:3], slots), dtype=torch.float32)


@torch.library.custom_op("selfindex::select", mutates_args=())
def select(scores: Tensor, budgets: Tensor, width: int) -> Tensor:
    """Exact top-k with ties to the lower slot: int32 [B, H, T, width], -1 past a row's budget."""
    return reference.select(scores, budgets, width)


@select.register_fake
def _(scores: Tensor, budgets: Tensor, width: int) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], width), dtype=torch.int32)


@torch.library.custom_op("selfindex::sparse_attend", mutates_args=())
def sparse_attend(
    query: Tensor,
    index_pool: Tensor,
    payload_pool: Tensor,
    block_table: Tensor,
    slots: Tensor,
    constants: Tensor,
    scaling: float,
    format: str,
) -> tuple[Tensor, Tensor]:
    """Attend to selected slots [B, H, T, K]: (output [B, Hq, T, d], log-sum-exp), float32."""
    return reference.sparse_attend(
        query, index_pool, payload_pool, block_table, slots, constants, scaling, format
    )


@torch.library.custom_op("selfindex::dense_attend", mutates_args=())
def dense_attend(
    query: Tensor,
    index_pool: Tensor,
    payload_pool: Tensor,
    block_table: Tensor,
    page_counts: Tensor,
    constants: Tensor,
    scaling: float,
    format: str,
) -> tuple[Tensor, Tensor]:
    """Attend to all encoded tokens: (output [B, Hq, T, d], log-sum-exp [B, Hq, T]), float32."""
    return reference.dense_attend(
        query, index_pool, payload_pool, block_table, page_counts, constants, scaling, format
    )


@torch.library.custom_op("selfindex::sparse_decode", mutates_args=())
def sparse_decode(
    query: Tensor,
    index_pool: Tensor,
    payload_pool: Tensor,
    block_table: Tensor,
    page_counts: Tensor,
    budgets: Tensor,
    width: int,
    constants: Tensor,
    scaling: float,
    format: str,
) -> tuple[Tensor, Tensor]:
    """Score, select and attend in one: (output [B, Hq, T, d], log-sum-exp [B, Hq, T]), float32."""
    return reference.sparse_decode(
        query,
        index_pool,
        payload_pool,
        block_table,
        page_counts,
        budgets,
        width,
        constants,
        scaling,
        format,
    )


@torch.library.custom_op("selfindex::window_attend", mutates_args=("keys", "values"))
def window_attend(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    part: Tensor,
    part_lse: Tensor,
    sink_logit: Tensor | None,
    scaling: float,
) -> Tensor:
    """Finish a decode step: store the token, attend to the window, merge; [B, 1, Hq, d]."""
    return reference.window_attend(
        query, new_keys, new_values, keys, values, lengths, part, part_lse, sink_logit, scaling
    )


@window_attend.register_fake
def _(query: Tensor, *rest: object) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], query.shape[3])


def _fake_part(query: Tensor) -> tuple[Tensor, Tensor]:
    output = query.new_empty(query.shape, dtype=torch.float32)
    return output, query.new_empty(query.shape[:3], dtype=torch.float32)


@sparse_decode.register_fake
def _(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return _fake_part(query)


@sparse_attend.register_fake
def _(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return _fake_part(query)


@dense_attend.register_fake
def _(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return _fake_part(query)


cpu.register(sys.modules[__name__])
cuda.register(sys.modules[__name__])
