"""Softmax attention over a part of the keys, and merging of parts (log-sum-exp)."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_part(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over one part of the keys.

    Args:
        logits: float32 [..., T, K], -inf where a key does not take part.
        values: float32 [..., K, d].
    Returns:
        (output float32 [..., T, d], log-sum-exp float32 [..., T]); (0, -inf) for an empty part.
    """
    top = (
        logits.amax(-1, keepdim=True)
        if logits.shape[-1]
        else logits.new_full((*logits.shape[:-1], 1), -torch.inf)
    )
    weights = (logits - top.clamp(min=-1e30)).exp()
    total = weights.sum(-1, keepdim=True)
    output = (weights @ values) / total.clamp(min=1e-30)
    return output, (top + total.log()).squeeze(-1)


def join_parts(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys as one part; arguments as in `merge_parts`."""
    total = torch.logaddexp(one[1], other[1])
    # -inf minus -inf: rows without any key get weight 0, not NaN.
    safe = total.clamp(min=-1e30)
    weights = [(lse - safe).exp()[..., None] for _, lse in (one, other)]
    return one[0] * weights[0] + other[0] * weights[1], total


def merge_parts(parts: list[tuple[Tensor, Tensor]], sink_logit: Tensor | None = None) -> Tensor:
    """Combine attention over disjoint sets of keys into attention over their union.

    Args:
        parts: (output [B, Hq, T, d], log-sum-exp [B, Hq, T]) pairs.
        sink_logit: [Hq], logit of a learned sink that takes probability but has no value
            (gpt-oss).
    Returns:
        float32 [B, Hq, T, d]; 0 where no part has a key.
    """
    sums = torch.stack([lse for _, lse in parts])
    if sink_logit is None:
        total = sums.logsumexp(0)
    else:
        extra = sink_logit.float().view(1, -1, 1).expand(sums.shape[1:])
        total = torch.cat((sums, extra[None])).logsumexp(0)
    # -inf minus -inf: rows without any key get weight 0, not NaN.
    weights = (sums - total.clamp(min=-1e30)).exp()
    return sum(
        (output * weight[..., None] for (output, _), weight in zip(parts, weights, strict=True)),
        parts[0][0].new_zeros(()),
    )


def attend_exact(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Exact attention over full-precision tokens; holds T K logits of every query head.

    Args:
        query: [B, Hq, T, d]; keys, values: [B, H, K, d].
        visible: bool, broadcastable to [B, 1, 1, T, K].
        scaling: factor on q.k.
    Returns:
        (output [B, Hq, T, d], log-sum-exp [B, Hq, T]), float32.
    """
    grouped = query.float().unflatten(1, (keys.shape[1], -1))
    k, v = keys.float()[:, :, None], values.float()[:, :, None]
    logits = (grouped @ k.transpose(-1, -2)) * scaling
    output, lse = softmax_part(logits.masked_fill(~visible, -torch.inf), v)
    return output.flatten(1, 2), lse.flatten(1, 2)
