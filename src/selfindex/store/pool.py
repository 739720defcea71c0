"""A pool of fixed-size blocks, each holding one encoded page of one layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..codec import PageFormat


class BlockPool:
    """Index and payload planes of pages, in two tensors so that they can live apart.

    Blocks are written once and then only read. A block may be in the tables of several rows
    (beams, shared prefixes); it is free again when the last of them lets go.

    Attributes:
        index: uint8 [capacity, format.index_bytes].
        payload: uint8 [capacity, format.payload_bytes].
    """

    def __init__(self, fmt: PageFormat, device: torch.device) -> None:
        self.format = fmt
        self.index = torch.empty(0, fmt.index_bytes, dtype=torch.uint8, device=device)
        self.payload = torch.empty(0, fmt.payload_bytes, dtype=torch.uint8, device=device)
        self._references: list[int] = []
        self._free: list[int] = []

    @property
    def capacity(self) -> int:
        return self.index.shape[0]

    @property
    def used(self) -> int:
        return self.capacity - len(self._free)

    def add(self, index: Tensor, payload: Tensor) -> list[int]:
        """Store encoded pages, one row each, with one reference. Returns their block ids."""
        count = index.shape[0]
        self.reserve(count)
        blocks = [self._free.pop() for _ in range(count)]
        at = torch.tensor(blocks, device=self.index.device)
        self.index[at] = index
        self.payload[at] = payload
        for block in blocks:
            self._references[block] = 1
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """Count one more table that holds these blocks."""
        for block in blocks:
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Count one table fewer; a block nobody holds becomes free."""
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)

    def reserve(self, count: int) -> None:
        """Make room for `count` more pages, so that adding them moves nothing."""
        missing = count - len(self._free)
        if missing <= 0:
            return
        # A sixteenth more than needed: copying stays O(1) per page, slack stays under 6.25 %.
        old = self.capacity
        spare = old // 16
        capacity = old + missing + spare
        index = self.index.new_empty(capacity, self.index.shape[1])
        payload = self.payload.new_empty(capacity, self.payload.shape[1])
        index[:old], payload[:old] = self.index, self.payload
        self.index, self.payload = index, payload
        self._references += [0] * (capacity - old)
        # Reversed, so that a fresh pool hands out ascending ids and a prompt's pages are one run.
        self._free[:0] = range(capacity - 1, old - 1, -1)
