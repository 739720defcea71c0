"""Parts of an attention, joined as they come."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import ops, reference

MOST_HELD = 4
"""Parts that are kept until they are joined: as many as one launch joins on a GPU."""


def merge(outputs: list[Tensor], sums: list[Tensor], sink_logit: Tensor | None, out: Tensor) -> Tensor:
    """The operator `merge_into`, or its plain form, which has a derivative, where one is wanted."""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in outputs)
    merge_into: Callable[..., Tensor] = reference.merge_into if wanted else ops.merge_into
    return merge_into(outputs, sums, sink_logit, out)


class Parts:
    """Attention of the same queries over disjoint sets of keys."""

    def __init__(self) -> None:
        self._outputs: list[Tensor] = []
        self._sums: list[Tensor] = []

    def add(self, output: Tensor, lse: Tensor) -> None:
        """One more: output [B, Hq, T, d], float32 or the model's dtype; log-sum-exp float32 [B, Hq, T]."""
        if len(self._outputs) == MOST_HELD:
            whole = torch.empty_like(output, dtype=torch.float32)
            self._sums = [merge(self._outputs, self._sums, None, whole)]
            self._outputs = [whole]
        self._outputs.append(output)
        self._sums.append(lse)

    def write(self, out: Tensor, sink_logit: Tensor | None = None) -> None:
        """Write attention over all of them to [B, Hq, T, d]; for sink_logit see `merge_parts`."""
        merge(self._outputs, self._sums, sink_logit, out)
