"""`sparse_attend`: attention over selected slots."""

from __future__ import annotations

import torch
from torch import Tensor

from ...codec import codec_for
from ..partial import softmax_part
from .define import define, fake_part
from .read import read


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
    """Attend to selected slots [B, H, T, K] only: (output [B, Hq, T, d], log-sum-exp), float32."""
    codec = codec_for(format)
    fmt, queries = codec.format, query.shape[2]
    total = block_table.shape[1] * fmt.page_size
    mapped = codec.map_query(query.unflatten(1, (fmt.kv_heads, -1)), constants)  # [B, H, G, T, d]
    if queries * slots.shape[3] < total:
        at = slots.flatten(2)[:, :, None]  # [B, H, 1, T K]: every query's own tokens
        taken = torch.eye(queries, dtype=torch.bool, device=query.device).repeat_interleave(slots.shape[3], 1)
        taken = taken & (at >= 0)
        at = at[:, :, 0].clamp(min=0).long()
    else:
        # Many queries: decode everything once and mask what each of them did not select.
        at = torch.arange(total, device=query.device).expand(*slots.shape[:2], -1)
        spare = slots.new_zeros((*slots.shape[:3], total + 1), dtype=torch.bool)
        taken = spare.scatter(-1, torch.where(slots >= 0, slots, total).long(), True)[..., :total]
    keys, values = read(codec, index_pool, payload_pool, block_table, at, constants)
    logits = mapped @ keys[:, :, None].transpose(-1, -2) * scaling  # [B, H, G, T, K or S]
    output, lse = softmax_part(logits.masked_fill(~taken[:, :, None], -torch.inf), values[:, :, None])
    return codec.unmap_output(output).flatten(1, 2), lse.flatten(1, 2)


operator = define(sparse_attend, fake_part)
