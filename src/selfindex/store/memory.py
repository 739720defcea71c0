"""Exact memory accounting of a cache."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Memory:
    """Bytes held, summed from live tensors.

    Attributes:
        index, payload: encoded pages in use.
        full_precision: sinks and recent tokens in use.
        statistics: balance or prompt statistics, block tables.
        slack: allocated and not in use.
        recent: payload of recently selected tokens that the GPU keeps as well (offloading).
        host: how many of all these bytes are in host memory instead of the device's (offloading).
    """

    index: int = 0
    payload: int = 0
    full_precision: int = 0
    statistics: int = 0
    slack: int = 0
    recent: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        held = self.index + self.payload + self.full_precision + self.statistics
        return held + self.slack + self.recent

    def __add__(self, other: Memory) -> Memory:
        return Memory(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))
