"""Which blocks make up each row of the batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .pool import BlockPool


@dataclass
class Row:
    """Blocks of one sequence, oldest first, and how many tokens of each are in use.

    A count below the page size is the last page of a paper prompt, or a page that `crop` cut.
    """

    blocks: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(self.counts)


class BlockTable:
    """Block table of a batch: one `Row` per sequence, mirrored in device tensors."""

    def __init__(self, batch: int, pool: BlockPool) -> None:
        self.pool = pool
        self.rows = [Row() for _ in range(batch)]
        self._tensors: tuple[Tensor, Tensor] | None = None

    @property
    def pages(self) -> int:
        """Pages of the longest row."""
        return max((len(row.blocks) for row in self.rows), default=0)

    def append(self, row: int, blocks: list[int], counts: list[int]) -> None:
        """Add pages, already referenced once in the pool, to the end of a row."""
        self.rows[row].blocks += blocks
        self.rows[row].counts += counts
        self._tensors = None

    def crop(self, row: int, tokens: int) -> None:
        """Keep the first `tokens` tokens of a row; whole pages beyond them are released."""
        kept, target = 0, self.rows[row]
        for page, count in enumerate(target.counts):
            if kept + count > tokens:
                cut = page
                if tokens > kept:
                    target.counts[page] = tokens - kept
                    cut += 1
                self.pool.release(target.blocks[cut:])
                del target.blocks[cut:], target.counts[cut:]
                break
            kept += count
        self._tensors = None

    def select(self, rows: list[int]) -> None:
        """Make row i a copy of old row rows[i]; blocks are shared, not copied."""
        old = self.rows
        self.rows = [Row(list(old[i].blocks), list(old[i].counts)) for i in rows]
        for row in self.rows:
            self.pool.retain(row.blocks)
        for row in old:
            self.pool.release(row.blocks)
        self._tensors = None

    def tensors(self) -> tuple[Tensor, Tensor]:
        """(block_table, page_counts), int32 [B, M]; missing pages are block 0 with count 0."""
        if self._tensors is None:
            width = self.pages

            def pad(values: list[int]) -> list[int]:
                return values + [0] * (width - len(values))

            device = self.pool.index.device
            shape = (len(self.rows), width)
            table = torch.tensor([pad(r.blocks) for r in self.rows], dtype=torch.int32, device=device)
            counts = torch.tensor([pad(r.counts) for r in self.rows], dtype=torch.int32, device=device)
            self._tensors = (table.view(shape), counts.view(shape))
        return self._tensors
