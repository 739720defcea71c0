"""`window_attend`: the end of a decode step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..partial import attend_exact, merge_parts
from .define import define


def _fake_step(query: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], query.shape[3])


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
        keys, values: [B, H, room, d], written at position `lengths[b]`.
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
    window = attend_exact(query, keys, held, real[:, None, None, None], scaling)
    return merge_parts([(part, part_lse), window], sink_logit).to(query.dtype).transpose(1, 2).contiguous()


operator = define(window_attend, _fake_step, ("keys", "values"))
