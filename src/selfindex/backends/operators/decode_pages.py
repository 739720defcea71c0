"""`decode_pages`: encoded tokens as keys and values of the model's own domain, one row behind the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...codec import codec_for
from .define import define
from .read import read

PAGES = 32
"""Pages of a row decoded at a time: bounds float32 temporaries, does not change the result."""


def _fake(*arguments: Any) -> None:
    return None


def decode_pages(
    index_pool: Tensor,
    payload_pool: Tensor,
    block_table: Tensor,
    page_counts: Tensor,
    starts: Tensor,
    keys: Tensor,
    values: Tensor,
    constants: Tensor,
    format: str,
) -> None:
    """Decode the tokens of pages, without gaps, from a place of each row on.

    Args:
        block_table, page_counts: int32 [B, M]; of a page the first tokens exist, at most a page's.
        starts: int32 [B], place of each row's first token.
        keys, values: [H, S, d] of one dtype, written to at [:, starts[b] : starts[b] + tokens of row b];
            what would be outside is not written. Post-RoPE, as the model has them, cut off at the
            largest numbers of their dtype.
        constants: float32 [1 or B, H, format.constants].
    """
    codec = codec_for(format)
    fmt, room = codec.format, keys.shape[1]
    offset = torch.arange(fmt.page_size, device=keys.device)
    counts = page_counts.long().clamp(0, fmt.page_size)
    first = starts.long()[:, None] + counts.cumsum(1) - counts
    place = first[..., None] + offset  # [B, M, P]
    real = (offset < counts[..., None]) & (place >= 0) & (place < room)
    limit = torch.finfo(keys.dtype).max
    for b in range(block_table.shape[0]):
        own = constants if constants.shape[0] == 1 else constants[b : b + 1]
        table = block_table[b : b + 1]
        for pages in torch.arange(block_table.shape[1], device=keys.device).split(PAGES):
            at = (pages[:, None] * fmt.page_size + offset).expand(1, fmt.kv_heads, -1, -1).flatten(2)
            taken, target = real[b, pages].flatten(), place[b, pages][real[b, pages]]
            read_keys, read_values = read(codec, index_pool, payload_pool, table, at, own)
            restored = codec.unmap_keys(read_keys, own)[0], codec.unmap_output(read_values)[0]
            for to, tokens in zip((keys, values), restored, strict=True):
                to[:, target] = tokens[:, taken].clamp(-limit, limit).to(to.dtype)


operator = define(decode_pages, _fake, ("keys", "values"))
