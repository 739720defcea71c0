"""The operators in plain PyTorch, float32: the specification other backends are tested against.

Shapes: B rows, Hq query heads, H KV heads, G = Hq / H, T new queries, M pages a row, P tokens a
page, S = M P slots, d head_dim, N blocks in a pool. Slot s of a row is token s % P of the row's
page s // P, which lives in block `block_table[b, s // P]` of the pools.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..codec import Codec, PageFormat, codec_for
from ..index.lut import lookup
from ..index.select import sum_of_softmax, top_k
from .partial import attend_raw, join_parts, merge_parts, softmax_part

DENSE_CHUNK = 4096
"""Slots decoded at a time by `dense_attend`: bounds its memory, does not change its result."""

DENSE_QUERIES = 1024
"""Queries of a KV head that attend at a time, likewise."""

ENCODE_PAGES = 32
"""Pages encoded at a time: bounds float32 temporaries, does not change the bytes."""


def encode(
    keys: Tensor, values: Tensor, counts: Tensor, constants: Tensor, format: str
) -> tuple[Tensor, Tensor]:
    """Encode raw pages; see `Codec.encode`."""
    codec = codec_for(format)
    parts = zip(*(x.split(ENCODE_PAGES) for x in (keys, values, counts)), strict=True)
    planes = [codec.encode(k, v, c, constants) for k, v, c in parts]
    return torch.cat([index for index, _ in planes]), torch.cat([payload for _, payload in planes])


def score(
    query: Tensor,
    index_pool: Tensor,
    block_table: Tensor,
    page_counts: Tensor,
    constants: Tensor,
    scaling: float,
    format: str,
) -> Tensor:
    """Estimate logits from table sums, token scales and page means."""
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


def select(scores: Tensor, budgets: Tensor, width: int) -> Tensor:
    """Select the best-scored slots; see `top_k`."""
    return top_k(scores, budgets, width)


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
    """Attend to selected slots only."""
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
    keys, values = _read(codec, index_pool, payload_pool, block_table, at, constants)
    logits = mapped @ keys[:, :, None].transpose(-1, -2) * scaling  # [B, H, G, T, K or S]
    output, lse = softmax_part(logits.masked_fill(~taken[:, :, None], -torch.inf), values[:, :, None])
    return codec.unmap_output(output).flatten(1, 2), lse.flatten(1, 2)


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
    """Attend to every encoded token, decoded a chunk at a time."""
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
        keys, values = _read(codec, index_pool, payload_pool, block_table, at, constants)
        parts = []
        for rows in mapped.split(DENSE_QUERIES, 2):
            logits = rows @ keys.transpose(-1, -2) * scaling
            parts.append(softmax_part(logits.masked_fill(~present[:, None, None, chunk], -torch.inf), values))
        outputs, sums = zip(*parts, strict=True)
        joined = join_parts(joined, (torch.cat(outputs, 2), torch.cat(sums, 2)))
    groups = query.shape[1] // fmt.kv_heads
    output, total = codec.unmap_output(joined[0]), joined[1]
    return output.unflatten(2, (groups, -1)).flatten(1, 2), total.unflatten(2, (groups, -1)).flatten(1, 2)


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
    """Score every token from the index, select `budgets` of them a row, attend to those."""
    fmt = PageFormat.parse(format)
    if fmt.preset == "paper":
        # The paper scores the mean query of the GQA group.
        mean = query.float().unflatten(1, (fmt.kv_heads, -1)).mean(2)
        scores = score(mean, index_pool, block_table, page_counts, constants, scaling, format)
    else:
        logits = score(query, index_pool, block_table, page_counts, constants, scaling, format)
        scores = sum_of_softmax(logits, fmt.kv_heads)
    slots = select(scores, budgets, width)
    return sparse_attend(query, index_pool, payload_pool, block_table, slots, constants, scaling, format)


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
    """Store one new token a row, attend to the full-precision tokens, merge the encoded part.

    Args:
        query: [B, Hq, 1, d]; new_keys, new_values: [B, H, 1, d].
        keys, values: [B, H, room, d], written at column `lengths[b]`.
        lengths: int32 [B], full-precision tokens held before this step, below `room`.
        part, part_lse: float32 [B, Hq, 1, d] and [B, Hq, 1], attention over the encoded tokens.
        sink_logit: [Hq] or None, see `merge_parts`.
    Returns:
        [B, 1, Hq, d] in the query's dtype.
    """
    rows, at = torch.arange(query.shape[0], device=query.device), lengths.long()
    keys[rows, :, at] = new_keys[:, :, 0]
    values[rows, :, at] = new_values[:, :, 0]
    real = torch.arange(keys.shape[2], device=query.device) <= at[:, None]  # [B, room]
    held = values.masked_fill(~real[:, None, :, None], 0)  # what nobody wrote may be NaN
    raw = attend_raw(query, keys, held, real[:, None, None, None], scaling)
    return merge_parts([(part, part_lse), raw], sink_logit).to(query.dtype).transpose(1, 2).contiguous()


def _read(
    codec: Codec,
    index_pool: Tensor,
    payload_pool: Tensor,
    block_table: Tensor,
    slots: Tensor,
    constants: Tensor,
) -> tuple[Tensor, Tensor]:
    """Decode keys and values of slots int64 [B, H, K] -> float32 [B, H, K, d] x 2."""
    page, offset = slots // codec.format.page_size, slots % codec.format.page_size
    block = block_table.long()[:, None].expand(-1, slots.shape[1], -1).gather(2, page)
    keys = codec.read_keys(index_pool, payload_pool, block, offset, constants)
    return keys, codec.read_values(index_pool, payload_pool, block, offset)
