"""`score`: logits from the index alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...codec import PageFormat, codec_for
from ...index.lut import lookup
from .define import define


def _fake_score(query: Tensor, index_pool: Tensor, block_table: Tensor, *rest: Any) -> Tensor:
    slots = block_table.shape[1] * PageFormat.parse(rest[-1]).page_size
    return query.new_empty((*query.shape[:3], slots), dtype=torch.float32)


def score(
    query: Tensor,
    index_pool: Tensor,
    block_table: Tensor,
    page_counts: Tensor,
    constants: Tensor,
    scaling: float,
    format: str,
) -> Tensor:
    """Estimate logits from table sums, token scales and page means.

    Returns:
        float32 [B, Hq, T, S], -inf in empty slots.
    """
    codec = codec_for(format)
    fmt = codec.format
    b, hq, t, _ = query.shape
    mapped = codec.map_query(
        query.unflatten(1, (fmt.kv_heads, -1)).flatten(2, 3), constants
    )  # [B, H, G T, d]
    index = index_pool[block_table.long()]  # [B, M, index_bytes]
    packed = fmt.view(index, fmt.index, "codes").transpose(1, 2).flatten(2, 3)  # [B, H, S, d / 8]
    logits = lookup(codec.lut(mapped, constants), packed)  # [B, H, G T, S]
    gain = codec.token_gain(index)
    if gain is not None:
        logits = logits * gain.transpose(1, 2).flatten(2)[:, :, None, :]
    offset = codec.page_offset(mapped, index, constants)  # [B, H, G T, M]
    logits = (logits.unflatten(-1, (-1, fmt.page_size)) + offset[..., None]) * scaling
    present = torch.arange(fmt.page_size, device=query.device) < page_counts[..., None]  # [B, M, P]
    logits = logits.masked_fill(~present[:, None, None], -torch.inf).flatten(-2)
    return logits.view(b, hq, t, -1)


operator = define(score, _fake_score)
