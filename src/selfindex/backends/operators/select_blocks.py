"""`select_blocks`: the blocks of keys that the last tokens of a row, a block at a time, attend to."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from .define import define

BLOCK = 128
"""Queries, and keys, that are selected together."""

ALWAYS = 3
"""Blocks kept whatever is estimated: the first one (with the sinks), the queries' own, the one before."""

LOGITS = 1 << 26
"""Estimates held at a time: bounds memory, does not change the result."""


def most_blocks(tokens: int, density: float) -> int:
    """Most blocks that a block of queries keeps of so many tokens, W below."""
    blocks = -(-tokens // BLOCK)
    return min(blocks, max(ALWAYS, math.ceil(density * blocks)))


def blocks_of(query: Tensor, keys: Tensor) -> tuple[int, int, int]:
    """Where queries are among keys, being the last of their tokens.

    Returns:
        (blocks of keys; first of these that has a query; tokens in it before its first query).
    """
    tokens = keys.shape[2]
    return -(-tokens // BLOCK), *divmod(tokens - query.shape[2], BLOCK)


def _fake(query: Tensor, keys: Tensor, scaling: float, mass: float, density: float) -> tuple[Tensor, Tensor]:
    number, first, _ = blocks_of(query, keys)
    shape = (*keys.shape[:2], number - first)
    blocks = keys.new_empty((*shape, most_blocks(keys.shape[2], density)), dtype=torch.int32)
    return blocks, keys.new_empty(shape, dtype=torch.int32)


def select_blocks(
    query: Tensor, keys: Tensor, scaling: float, mass: float, density: float
) -> tuple[Tensor, Tensor]:
    """Select blocks of keys for every block of queries of the heads of a KV head.

    Blocks are those of the keys: the first of the queries may be in the middle of one. A block of keys is
    judged by the mean of its keys, for the mean of a block of queries. The softmax of that over the blocks
    which are seen, averaged over the heads, is a block's share. Kept are, best first, as many as it takes for
    the shares to sum up to `mass`, but at most `density` of the blocks there are (and some always, see
    ALWAYS). A block that is not full is judged by the tokens that it has.

    Args:
        query: [B, Hq, T, d], those of the last T tokens; keys: [B, H, S, d]; without padding, 0 < T <= S.
        scaling: factor on q.k.
        mass: share of the softmax to keep, as estimated; from 1 on, everything that density allows.
        density: share of the blocks that a block of queries sees, in (0, 1].
    Returns:
        (kept blocks in ascending order, then zeros, int32 [B, H, n, W]; how many are kept, int32 [B, H, n]),
        n = ceil(S / BLOCK) - floor((S - T) / BLOCK). The last one kept is the queries' own.
    """
    heads, tokens = keys.shape[1:3]
    blocks, start, before = blocks_of(query, keys)
    width = most_blocks(tokens, density)
    judged = _means(keys)
    asking = _means(query, before).unflatten(1, (heads, -1)) * scaling  # [B, H, G, n, d]
    at = torch.arange(start, blocks, device=keys.device)
    step = max(1, LOGITS // (query.shape[0] * query.shape[1] * blocks))
    found = []
    for first in range(0, blocks - start, step):
        rows = at[first : first + step]
        last = start + first + len(rows)  # no row sees more blocks
        unseen = torch.arange(last, device=keys.device) > rows[:, None]
        logits = asking[:, :, :, first : first + len(rows)] @ judged[:, :, None, :last].mT
        logits = logits.masked_fill_(unseen, -torch.inf)
        shares = logits.softmax(-1).mean(2)  # [B, H, rows, last]
        found.append(_keep(shares, rows, mass, density, width))
    kept, counts = zip(*found, strict=True)
    return torch.cat(kept, 2), torch.cat(counts, 2)


def _means(tokens: Tensor, before: int = 0) -> Tensor:
    """Means of blocks of tokens, float32 [B, H, blocks, d]; the first block lacks so many tokens."""
    first = min(-before % BLOCK, tokens.shape[2])
    end = first + (tokens.shape[2] - first) // BLOCK * BLOCK
    begun, whole, rest = tokens.tensor_split([first, end], 2)
    parts = [part.mean(2, keepdim=True, dtype=torch.float32) for part in (begun, rest) if part.shape[2]]
    parts.insert(int(first > 0), whole.unflatten(2, (-1, BLOCK)).mean(3, dtype=torch.float32))
    return torch.cat(parts, 2)


def _keep(shares: Tensor, rows: Tensor, mass: float, density: float, width: int) -> tuple[Tensor, Tensor]:
    """What blocks of queries `rows` keep, from estimated shares [B, H, rows, blocks]; see `select_blocks`."""
    at, seen = torch.arange(shares.shape[-1], device=rows.device), rows + 1
    always = ((at == 0) | (at >= rows[:, None] - 1)) & (at <= rows[:, None])
    ranked = shares.masked_fill(always, 2.0).masked_fill(at > rows[:, None], -1.0)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    before = shares.gather(-1, order).cumsum(-1).roll(1, -1)
    before[..., 0] = 0.0
    # Made where it is used: a number that is copied there would have a GPU waited for.
    everything = torch.full((), shares.shape[-1], device=rows.device)
    enough = everything if mass >= 1 else (before < mass).sum(-1)
    # In float64, as Python's numbers that made `width`.
    most = (seen.double() * density).ceil().long().clamp(min=ALWAYS).minimum(seen)
    counts = torch.minimum(enough.clamp(min=ALWAYS), most)
    counts = counts.expand(shares.shape[:-1])
    order = order[..., :width]
    slots = torch.arange(order.shape[-1], device=rows.device)
    beyond = slots >= counts[..., None]
    kept = order.masked_fill(beyond, shares.shape[-1]).sort(-1).values.masked_fill(beyond, 0)
    return pad(kept, (0, width - kept.shape[-1])).int(), counts.int()


operator = define(select_blocks, _fake)
