"""`encode_paged`: tokens of a paged full-precision window into blocks of the pools."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...codec import PageFormat
from .define import define
from .encode_into import encode_into


def _fake(*arguments: Any) -> None:
    return None


def encode_paged(
    window: Tensor,
    table: Tensor,
    first: Tensor,
    counts: Tensor,
    blocks: Tensor,
    index_pool: Tensor,
    payload_pool: Tensor,
    constants: Tensor,
    format: str,
) -> None:
    """Encode a page of each row from full-precision tokens that lie in an engine's blocks.

    Position p of row b is in block `table[b, p // bs]` of the window, there at p % bs.

    Args:
        window: [W, H, bs, 2 d], keys and then values of a token in its last dimension; the last two
            dimensions are contiguous.
        table: int32 [B, M].
        first: int32 [B], the page's first position; counts: int32 [B], its tokens, at most P. Their
            blocks hold them all.
        blocks: int32 [B], where each page goes, no block twice; a negative one skips the row.
        index_pool, payload_pool: uint8 [N, bytes], written to; rows may lie apart, at a multiple of 16 bytes.
        constants: float32 [1 or B, H, ...], see `Codec`.
    """
    size = window.shape[2]
    if table.device.type == "cpu" and not bool((blocks >= 0).any()):
        return
    tokens = torch.arange(PageFormat.parse(format).page_size, device=table.device)
    real = (tokens < counts[:, None]) & (blocks >= 0)[:, None]  # [B, P]
    at = torch.where(real, first.long()[:, None] + tokens, 0)
    held = window[table.long().gather(1, at // size), :, at % size].transpose(1, 2)  # [B, H, P, 2 d]
    keys, values = held.chunk(2, -1)
    encode_into(keys, values, counts, blocks, index_pool, payload_pool, constants, format)


operator = define(encode_paged, _fake, ("index_pool", "payload_pool"))
