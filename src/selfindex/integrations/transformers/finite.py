"""Whether the keys and values of a forward pass are numbers, asked of the device once a pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...errors import InputError
from ...store.change import extremes


class FiniteCheck:
    """Collects what the layers of a pass hand to the cache, and looks at it when the last one is done.

    To look at a GPU is to wait for it, and every layer that waits keeps the next one from being
    launched. On a CPU there is nothing to wait for, and bad tokens are refused where they come in.

    Attributes:
        deferred: look at the end of the pass on a CPU as well, for tests.
    """

    def __init__(self) -> None:
        self.deferred = False
        self._ends: list[tuple[int, list[Tensor]]] = []
        """Layers, and what is finite if their tokens are."""

    def begin(self) -> None:
        """A forward pass begins: forget what an interrupted one has left."""
        self._ends.clear()

    def of(self, layer: int) -> Callable[..., None]:
        """What a layer calls with its keys and values."""
        return partial(self.note, layer)

    def note(self, layer: int, *tensors: Tensor) -> None:
        """Note tensors of a layer; raises as `check` where nothing is to wait for."""
        # A sum would overflow: every number counts.
        self._ends.append((layer, extremes(*tensors)))
        if tensors[0].device.type == "cpu" and not self.deferred:
            self.check()

    def check(self) -> None:
        """Look at what was noted.

        Raises:
            InputError: something is NaN or infinite.
        """
        noted, self._ends = self._ends, []
        if not noted:
            return
        place = noted[0][1][0].device
        ends = [(layer, end.to(place)) for layer, ends in noted for end in ends]
        finite = torch.isfinite(torch.stack([end for _, end in ends])).tolist()
        bad = [layer for (layer, _), fine in zip(ends, finite, strict=True) if not fine]
        if bad:
            raise InputError(
                f"layer {bad[0]}: keys or values hold NaN or infinity. Check the model's dtype "
                "(fp16 overflows in some models; use bf16) and its inputs"
            )
