"""`paged_window_attend`: the end of a decode step whose full-precision tokens are in an engine's blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..partial import attend_exact, join_parts, merge_parts
from .define import define
from .rows import put_rows

PAGED_CHUNK = 4096
"""Tokens of a row gathered at a time: bounds memory, does not change the result."""


def _fake(query: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], query.shape[3])


def paged_window_attend(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    window: Tensor,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    sinks: int,
    part: Tensor,
    part_lse: Tensor,
    sink_logit: Tensor | None,
    scaling: float,
) -> Tensor:
    """Store one new token a row, attend to the full-precision tokens, merge the encoded part.

    As `window_attend`, but position p of row b is in block `table[b, p // bs]` of the window, there at
    p % bs. A row attends to positions [0, min(sinks, starts[b])) and [starts[b], lengths[b]], the last of
    which is the new token's; those in block 0, the engine's null block, do not exist.

    Args:
        query: [B, Hq, 1, d]; new_keys, new_values: [B, H, 1, d].
        window: [W, H, bs, 2 d], keys and then values of a token in its last dimension, written at
            position `lengths[b]`; the last two dimensions are contiguous.
        table: int32 [B, M].
        starts: int32 [B], from where on tokens are in full precision, at most `lengths[b]`.
        lengths: int32 [B], position of the new token, below M bs; negative for a row of padding, for
            which nothing is read or written and the output is zero.
        sinks: tokens in full precision at a row's beginning.
        part, part_lse: float32 [B, Hq, 1, d] and [B, Hq, 1], attention over the encoded tokens.
        sink_logit: [Hq] or None, see `merge_parts`.
    Returns:
        [B, 1, Hq, d] in the query's dtype.
    """
    size, heads, table = window.shape[2], window.shape[1], table.long()
    real, last, start = lengths >= 0, lengths.long().clamp(min=0), starts.long().clamp(min=0)
    block = table.gather(1, last[:, None] // size)[:, 0]
    new = torch.cat((new_keys, new_values), -1)[:, :, 0].to(window.dtype)
    # [B, H] places, as an index of the two that are apart would put the heads last.
    at = torch.broadcast_tensors(
        block[:, None], torch.arange(heads, device=block.device), (last % size)[:, None]
    )
    put_rows(window, at, new, real & (block != 0))

    before = start.clamp(max=sinks)
    tokens = torch.where(real, before + last - start + 1, 0)  # of each row
    # On a GPU, the longest row's would have to be waited for.
    most = int(tokens.max()) if tokens.device.type == "cpu" and len(tokens) else table.shape[1] * size
    padding = ~real[:, None, None]
    joined = part.masked_fill(padding[..., None], 0), part_lse.masked_fill(padding, -torch.inf)
    for place in torch.arange(most, device=table.device).split(PAGED_CHUNK):
        position = torch.where(place < before[:, None], place, place + (start - before)[:, None])
        position = torch.where(place < tokens[:, None], position, 0)  # [B, K]
        block = table.gather(1, position // size)
        visible = (place < tokens[:, None]) & (block != 0)
        held = window[block, :, position % size].transpose(1, 2)  # [B, H, K, 2 d]
        keys, values = held.masked_fill(~visible[:, None, :, None], 0).chunk(2, -1)  # anything, NaN as well
        joined = join_parts(joined, attend_exact(query, keys, values, visible[:, None, None, None], scaling))
    return merge_parts([joined], sink_logit).to(query.dtype).transpose(1, 2).contiguous()


operator = define(paged_window_attend, _fake, ("window",))
