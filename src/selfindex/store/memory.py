"""Exact memory accounting of a cache."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from .pool import BlockPool
from .statistics import Statistics
from .table import BlockTable
from .window import Window


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


def memory_of(pool: BlockPool, table: BlockTable, window: Window, statistics: Statistics) -> Memory:
    """Bytes of a layer's parts."""
    token = 2 * window.keys.shape[1] * window.keys.shape[3] * window.keys.element_size()
    tables = sum(t.nbytes for t in table.padded())
    pages, free = len({b for row in table.rows for b in row.blocks}), pool.capacity - pool.used
    index, payload = pages * pool.index.shape[1], pages * pool.payload.shape[1]
    full = sum(window.lengths) * token
    unused = free * (pool.index.shape[1] + pool.payload.shape[1])
    return Memory(
        index=index,
        payload=payload,
        full_precision=full,
        statistics=statistics.nbytes + tables,
        slack=unused + window.keys.nbytes + window.values.nbytes - full,
        recent=0 if pool.recent is None else pool.recent.nbytes,
        host=(pages + free) * pool.payload.shape[1] if pool.offloading else 0,
    )
