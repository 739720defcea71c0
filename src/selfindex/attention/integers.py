"""Lengths and budgets as tensors."""

from __future__ import annotations

import torch
from torch import Tensor


class StepIntegers:
    """Makes int32 tensors of lists of integers, once in a forward pass.

    All layers ask for the same ones, and a copy to a GPU waits for the work before it.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}

    def begin(self) -> None:
        """A forward pass begins: forget those of the last one."""
        self._known.clear()

    def __call__(self, values: list[int], device: torch.device) -> Tensor:
        """int32 [len(values)] on `device`; not to be written to."""
        key = device, tuple(values)
        if key not in self._known:
            with torch.inference_mode(False):  # a copy of the cache is usable in any mode
                self._known[key] = torch.tensor(values, dtype=torch.int32, device=device)
        return self._known[key]
