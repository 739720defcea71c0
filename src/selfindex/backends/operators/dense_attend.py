"""`dense_attend`: attention over all encoded tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ...codec import codec_for
from ..partial import join_parts, softmax_part
from .define import define, fake_part
from .read import read

DENSE_CHUNK = 4096
"""Slots decoded at a time by `dense_attend`: bounds its memory, does not change its result."""

DENSE_QUERIES = 1024
"""Queries of a KV head that attend at a time, likewise."""


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
    """Attend to all encoded tokens, decoded a chunk at a time.

    Returns:
        (output [B, Hq, T, d], log-sum-exp [B, Hq, T]), float32.
    """
    codec = codec_for(format)
    fmt = codec.format
    mapped = codec.map_query(query.unflatten(1, (fmt.kv_heads, -1)).flatten(2, 3), constants)
    present = (torch.arange(fmt.page_size, device=query.device) < page_counts[..., None]).flatten(1)
    joined = (
        query.new_zeros(mapped.shape, dtype=torch.float32),
        query.new_full(mapped.shape[:-1], -torch.inf, dtype=torch.float32),
    )
    for chunk in torch.arange(present.shape[1], device=query.device).split(DENSE_CHUNK):
        at = chunk.expand(query.shape[0], fmt.kv_heads, -1)
        keys, values = read(codec, index_pool, payload_pool, block_table, at, constants)
        parts = []
        for rows in mapped.split(DENSE_QUERIES, 2):
            logits = rows @ keys.transpose(-1, -2) * scaling
            parts.append(softmax_part(logits.masked_fill(~present[:, None, None, chunk], -torch.inf), values))
        outputs, sums = zip(*parts, strict=True)
        joined = join_parts(joined, (torch.cat(outputs, 2), torch.cat(sums, 2)))
    groups = query.shape[1] // fmt.kv_heads
    output, total = codec.unmap_output(joined[0]), joined[1]
    return output.unflatten(2, (groups, -1)).flatten(1, 2), total.unflatten(2, (groups, -1)).flatten(1, 2)


operator = define(dense_attend, fake_part)
