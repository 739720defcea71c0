"""Which tokens of a prompt its last queries look at most: as SnapKV (arXiv 2404.14469) votes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

_VOTES_BYTES = 64 << 20
"""Logits at a time, at least those of one head."""
_OWN = 0.01
"""What a token's own votes count beside those of its neighbourhood."""


def choose_pinned(
    keys: Tensor,
    queries: Tensor,
    count: int,
    scaling: float,
    first: int = 0,
    end: int | None = None,
    neighbours: int = 1,
) -> Tensor:
    """Tokens that the last queries attend to most, all query heads of a KV head together.

    Args:
        keys: [B, H, N, d]; queries: [B, H, G, T, d], the last T queries, T <= N.
        first, end: only tokens from `first` on and before `end` are chosen; by default all.
        neighbours: a token counts as much as the best of so many around it, an odd number: what follows a
            token that is looked at now may be looked at next.
    Returns:
        int64 [B, H, count], ascending; count <= end - first.
    """
    heads, tokens = keys.shape[1:3]
    groups, last = queries.shape[2:4]
    later = torch.ones(last, last, dtype=torch.bool, device=keys.device).triu(1)
    most = max(1, _VOTES_BYTES // (4 * groups * last * tokens))  # heads at a time
    votes = []
    for rows, asking_rows in zip(*(x.split(max(1, most // heads)) for x in (keys, queries)), strict=True):
        for own, asking in zip(*(x.split(most, 1) for x in (rows, asking_rows)), strict=True):
            own, asking = own.flatten(0, 1).float(), asking.flatten(0, 1).flatten(1, 2).float()
            logits = torch.bmm(asking, own.transpose(1, 2)).mul_(scaling).unflatten(1, (groups, last))
            logits[..., -last:].masked_fill_(later, float("-inf"))
            votes.append(logits.softmax(-1).sum((1, 2)))
    found = torch.cat(votes)
    if neighbours > 1:
        # Of neighbours, which would be equals, those with votes of their own come first.
        found = max_pool1d(found, neighbours, 1, neighbours // 2) + _OWN * found
    chosen = found.unflatten(0, (-1, heads))[..., first:end]
    return first + chosen.topk(count).indices.sort(-1).values
