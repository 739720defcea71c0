"""What all layers of a forward pass have in common."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")


class Shared:
    """Makes what all layers ask for alike once in a forward pass.

    These are plans, whose tensors are copied to a GPU and wait for the work before them, and masks,
    which take longer to make than to attend with when new tokens are few.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def begin(self) -> None:
        """A forward pass begins: forget what was made for the last one."""
        self._known.clear()

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returned for an equal key in this forward pass; tensors are not to be written to."""
        if key not in self._known:
            with torch.inference_mode(False):  # a copy of the cache is usable in any mode
                self._known[key] = make()
        made: Made = self._known[key]
        return made
