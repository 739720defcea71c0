"""Decoding single tokens of the pools."""

from __future__ import annotations

from torch import Tensor

from ...codec import Codec


def read(
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
