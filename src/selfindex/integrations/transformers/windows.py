"""All sliding-window layers of a cache in steps of fixed shape."""

from __future__ import annotations

import torch
from torch import Tensor

from .layered import LayeredCache
from .window import SlidingWindowLayer, Window, slots_of


class Windows:
    """The sliding-window layers of a cache in steps of fixed shape.

    Attributes:
        hidden: for each window, int32 [B, slots]: in the slot of a position with padding its number, else
            -1. New tokens are real, so that a step has nothing to write here.
    """

    def __init__(self) -> None:
        self.hidden: dict[Window, Tensor] = {}
        self._known: Tensor | None = None

    def forget(self) -> None:
        """Drop what was made for a batch."""
        self.hidden.clear()
        self._known = None

    def fill(self, cache: LayeredCache) -> None:
        """Bring rings and hidden positions up to date."""
        layers = window_layers(cache)
        for layer in layers:
            layer.fill_ring()
        batch, positions = cache.compressed_layers[0].store.batch, cache.positions  # type: ignore[union-attr]
        windows = {layer.window for layer in layers}
        fresh = any(window not in self.hidden or len(self.hidden[window]) != batch for window in windows)
        if positions is self._known and not fresh:
            return
        for size, device in windows:
            slots = slots_of(size)
            if (size, device) not in self.hidden or len(self.hidden[size, device]) != batch:
                with torch.inference_mode(False):
                    self.hidden[size, device] = torch.empty(batch, slots, dtype=torch.int32, device=device)
            hidden = self.hidden[size, device].fill_(-1)
            if positions is not None:
                end = positions.shape[1]
                begin = max(0, end - slots)
                last = torch.arange(begin, end, device=device)
                padding = torch.where(positions[:, begin:].to(device), -1, last)
                hidden.index_copy_(1, last % slots, padding.int())
        self._known = positions

    def places(self, cache: LayeredCache) -> list[int]:
        """Addresses that a graph of a step reads and writes."""
        rings = [place for layer in window_layers(cache) for place in layer.ring_places()]
        return [*rings, *(x.data_ptr() for x in self.hidden.values())]

    def advance(self, cache: LayeredCache, new: int) -> None:
        """Have the layers hold the `new` positions of a step, after `cache.positions` has them."""
        for layer in window_layers(cache):
            layer.advance(new)
        self._known = cache.positions


def window_layers(cache: LayeredCache) -> list[SlidingWindowLayer]:
    """The sliding-window layers of a cache, in order."""
    return [layer for layer in cache.layers if isinstance(layer, SlidingWindowLayer)]
