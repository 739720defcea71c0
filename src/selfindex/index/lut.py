"""Scoring tokens from their sign codes with one small table per group of 4 channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codec import packing


def lookup_by_group(lut: Tensor, packed: Tensor) -> Tensor:
    """Table sums, spelled out: score(token) = sum over groups g of lut[g][code(token, g)].

    Args:
        lut: float32 [..., Q, d / 4, 16], Q queries.
        packed: uint8 [..., S, d / 8] sign codes of S tokens, leading dimensions as in `lut`.
    Returns:
        float32 [..., Q, S].
    """
    codes = packing.group_codes(packed).long().transpose(-1, -2)  # [..., d / 4, S]
    score = lut.new_zeros(*lut.shape[:-2], packed.shape[-2])
    for group in range(lut.shape[-2]):
        index = codes[..., None, group, :].expand(score.shape)
        score += lut[..., group, :].gather(-1, index)
    return score


def lookup(lut: Tensor, packed: Tensor) -> Tensor:
    """Same result as `lookup_by_group` in one pass over the bytes.

    The tables of the two groups in a byte are merged into one of 256 entries, so that a token's
    score is the sum of d / 8 table rows: an embedding bag whose rows hold all queries.
    """
    lead, queries, nbytes = lut.shape[:-3], lut.shape[-3], packed.shape[-1]
    low, high = lut[..., 0::2, :], lut[..., 1::2, :]
    merged = (high.unsqueeze(-1) + low.unsqueeze(-2)).flatten(-2)  # [..., Q, d / 8, 256]
    table = merged.movedim(-3, -1).reshape(-1, queries)  # [lead * d / 8 * 256, Q]
    rows = torch.arange(table.shape[0] // 256, device=packed.device).view(*lead, 1, nbytes) * 256
    bags = (packed.to(torch.int32) + rows.to(torch.int32)).view(-1, nbytes)
    sums = F.embedding_bag(bags, table, mode="sum")
    return sums.view(*lead, -1, queries).transpose(-1, -2)
