"""`merge_into`: attention over disjoint sets of keys becomes attention over their union."""

from __future__ import annotations

import torch
from torch import Tensor

from ..partial import merge_parts
from .define import define


def _fake(outputs: list[Tensor], sums: list[Tensor], sink_logit: Tensor | None, out: Tensor) -> Tensor:
    return out.new_empty(out.shape[:3], dtype=torch.float32)


def merge_into(outputs: list[Tensor], sums: list[Tensor], sink_logit: Tensor | None, out: Tensor) -> Tensor:
    """Write what `merge_parts` returns of parts to a tensor.

    Args:
        outputs: [B, Hq, T, d] each, float32 or one other dtype.
        sums: log-sum-exp float32 [B, Hq, T] of each.
        sink_logit: [Hq] or None, see `merge_parts`.
        out: [B, Hq, T, d] in that dtype or float32.
    Returns:
        Log-sum-exp of the parts and the sink, float32 [B, Hq, T].
    """
    out.copy_(merge_parts(list(zip(outputs, sums, strict=True)), sink_logit))
    total = torch.stack(list(sums)).logsumexp(0)
    return total if sink_logit is None else torch.logaddexp(total, sink_logit.float()[:, None])


operator = define(merge_into, _fake, ("out",))
