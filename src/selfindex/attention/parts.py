"""Parts of an attention, joined as they come."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import ops

MOST_HELD = 4
"""Parts that are kept until they are joined: as many as one launch joins on a GPU."""


class Parts:
    """Attention of the same queries over disjoint sets of keys."""

    def __init__(self) -> None:
        self._outputs: list[Tensor] = []
        self._sums: list[Tensor] = []

    def add(self, output: Tensor, lse: Tensor) -> None:
        """One more: output [B, Hq, T, d], float32 or the model's dtype; log-sum-exp float32 [B, Hq, T]."""
        if len(self._outputs) == MOST_HELD:
            whole = torch.empty_like(output, dtype=torch.float32)
            self._sums = [ops.merge_into(self._outputs, self._sums, None, whole)]
            self._outputs = [whole]
        self._outputs.append(output)
        self._sums.append(lse)

    def write(self, out: Tensor, sink_logit: Tensor | None = None) -> None:
        """Write attention over all of them to [B, Hq, T, d]; for sink_logit see `merge_parts`."""
        ops.merge_into(self._outputs, self._sums, sink_logit, out)
