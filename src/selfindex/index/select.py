"""From estimated logits to the set of tokens that are attended."""

from __future__ import annotations

import torch
from torch import Tensor

SHARPNESS = 0.5
"""Factor on the logits when query heads vote for tokens.

At 1 a vote is the estimated attention mass, and a query head that concentrates on a few tokens
decides nothing beyond them, while a diffuse one is outvoted everywhere. Flatter votes share the
budget among the heads of a group, which lowers the KL of SmolLM2 and raises that of Gemma a little
(docs/design-notes.md). It does not change the order of tokens where a group has one query head.
"""


def sum_of_softmax(logits: Tensor, kv_heads: int) -> Tensor:
    """Votes for each token: softmax of the sharpened logits, summed over the heads of a GQA group.

    Args:
        logits: float32 [B, Hq, T, S], -inf where there is no token.
    Returns:
        float32 [B, H, T, S]; -inf where there is no token.
    """
    grouped = SHARPNESS * logits.unflatten(1, (kv_heads, -1))
    shifted = (grouped - grouped.amax(-1, keepdim=True).clamp(min=-1e30)).exp()
    mass = (shifted / shifted.sum(-1, keepdim=True).clamp(min=1e-30)).sum(2)
    return mass.masked_fill(grouped[:, :, 0] == float("-inf"), float("-inf"))


def top_k(scores: Tensor, budgets: Tensor, width: int) -> Tensor:
    """The best-scored tokens, exactly `budgets[b]` of them in row b.

    Equal scores are decided for the lower slot, so that every backend selects the same set.

    Args:
        scores: float [B, H, T, S]; slots without a token are -inf.
        budgets: int [B], at most the number of tokens of the row and at most `width`.
        width: columns of the result.
    Returns:
        int32 [B, H, T, width]: ascending slots, then -1 up to `width`.
    """
    slots = scores.shape[-1]
    if width == 0 or slots == 0:
        return scores.new_full((*scores.shape[:-1], width), -1, dtype=torch.int32)
    count = budgets.to(scores.device).long().view(-1, 1, 1, 1)
    best = scores.topk(min(width, slots), dim=-1).values
    # The smallest score that still gets in; ties with it are admitted from the left.
    last = (count - 1).clamp(min=0).expand(*scores.shape[:-1], 1)
    threshold = best.gather(-1, last)
    above = scores > threshold
    ties = scores == threshold
    room = count - above.sum(-1, keepdim=True)
    chosen = (above | (ties & (ties.cumsum(-1) <= room))) & (count > 0)
    # Stable order: position among the chosen is a running count, which scatters slots into place.
    place = torch.where(chosen, chosen.cumsum(-1) - 1, width)
    result = scores.new_full((*scores.shape[:-1], width + 1), -1, dtype=torch.int32)
    source = torch.arange(slots, device=scores.device, dtype=torch.int32).expand(scores.shape)
    return result.scatter(-1, place, source)[..., :width].contiguous()
