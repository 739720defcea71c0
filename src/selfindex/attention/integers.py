"""Lengths, budgets and masks as tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


class StepIntegers:
    """Makes tensors that all layers ask for alike once in a forward pass.

    These are int32 tensors of lists of integers, where a copy to a GPU waits for the work before it,
    and masks, which take longer to make than to attend with when new tokens are few.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def begin(self) -> None:
        """A forward pass begins: forget those of the last one."""
        self._known.clear()

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returned for an equal key in this forward pass; tensors are not to be written to."""
        if key not in self._known:
            with torch.inference_mode(False):  # a copy of the cache is usable in any mode
                self._known[key] = make()
        made: Made = self._known[key]
        return made

    def __call__(self, values: list[int], device: torch.device) -> Tensor:
        """int32 [len(values)] on `device`; not to be written to."""
        return self.once(
            (device, tuple(values)), lambda: torch.tensor(values, dtype=torch.int32, device=device)
        )
