"""`block_attend`: causal attention of the last tokens of a row to selected blocks of its keys."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..partial import softmax_part
from .define import define
from .select_blocks import BLOCK, blocks_of


def _fake(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def whole_blocks(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of `block_attend` with tokens of zeros that fill up the first and last block."""
    number, _, before = blocks_of(query, keys)
    fill = number * BLOCK - keys.shape[2]
    if before or fill:
        query = pad(query, (0, 0, before, fill))
    if fill:
        keys, values = (pad(x, (0, 0, 0, fill)) for x in (keys, values))
    return query, keys, values


def laid_out(output: Tensor, query: Tensor) -> Tensor:
    """The output laid out in memory as its query, which models turn it into; copied if it has to be."""
    like = torch.empty_like(query)
    strides = zip(output.shape, output.stride(), like.stride(), strict=True)
    if all(own == other for size, own, other in strides if size > 1):
        return output
    return like.copy_(output)


def block_attend(
    query: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, counts: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attend causally, every block of queries to the blocks of keys that were selected for it.

    Args:
        query: [B, Hq, T, d], those of the last T tokens; keys, values: [B, H, S, d]; without padding,
            0 < T <= S.
        blocks: int32 [B, H, n, W]; counts: int32 [B, H, n], from 1 to W; as `select_blocks` returns them.
        scaling: factor on q.k.
    Returns:
        (output [B, Hq, T, d] like the query, in its dtype, log-sum-exp float32 [B, Hq, T]).
    """
    heads, tokens = keys.shape[1:3]
    grouped = query.unflatten(1, (heads, -1))
    whole = torch.empty_like(query)
    output, lse = whole.unflatten(1, (heads, -1)), grouped.new_empty(grouped.shape[:4], dtype=torch.float32)
    inside = torch.arange(BLOCK, device=query.device)
    _, start, _ = blocks_of(query, keys)
    before = tokens - query.shape[2]
    for block, most in enumerate(counts.amax((0, 1)).tolist()):
        own = (start + block) * BLOCK
        rows = slice(max(0, own - before), min(tokens, own + BLOCK) - before)
        q = grouped[:, :, :, rows].float()
        at = (blocks[:, :, block, :most, None] * BLOCK + inside).flatten(2).long()  # [B, H, K]
        there = (torch.arange(most, device=query.device) < counts[:, :, block, None]).repeat_interleave(
            BLOCK, -1
        )
        picked = at.clamp(max=tokens - 1)[..., None].expand(-1, -1, -1, query.shape[3])
        k, v = (x.gather(2, picked).float()[:, :, None] for x in (keys, values))
        time = torch.arange(before + rows.start, before + rows.stop, device=query.device)
        visible = there[:, :, None] & (at[:, :, None] <= time[:, None])
        logits = (q @ k.mT * scaling).masked_fill_(~visible[:, :, None], -torch.inf)
        part = softmax_part(logits, v)
        output[:, :, :, rows], lse[:, :, :, rows] = part[0].to(query.dtype), part[1]
    return whole, lse.flatten(1, 2)


operator = define(block_attend, _fake)
