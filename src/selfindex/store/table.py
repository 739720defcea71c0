"""Which blocks make up each row of the batch."""

from __future__ import annotations

import copy
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
        self._added: list[tuple[int, int, int, int]] = []
        """Row, place in the row, block and count of pages that are not in `_tensors` yet."""

    def __del__(self) -> None:
        # Forks of a cache share the pool, which then lives longer than this table.
        for row in self.rows:
            self.pool.release(row.blocks)

    def copied(self, share: bool) -> BlockTable:
        """The same rows, over the same pool if they `share` it, over a copy of it otherwise."""
        blocks = [block for row in self.rows for block in row.blocks]
        pool = self.pool if share else copy.deepcopy(self.pool)
        if share:
            pool.retain(blocks)
        else:
            pool.hold_only(blocks)
        new = BlockTable(len(self.rows), pool)
        new.rows = [Row(list(row.blocks), list(row.counts)) for row in self.rows]
        return new

    @property
    def pages(self) -> int:
        """Pages of the longest row."""
        return max((len(row.blocks) for row in self.rows), default=0)

    def append(self, row: int, blocks: list[int], counts: list[int]) -> None:
        """Add pages, already referenced once in the pool, to the end of a row."""
        place = len(self.rows[row].blocks)
        self.rows[row].blocks += blocks
        self.rows[row].counts += counts
        if self._tensors is not None:
            pages = zip(range(place, place + len(blocks)), blocks, counts, strict=True)
            self._added += [(row, *page) for page in pages]

    def crop(self, row: int, tokens: int) -> None:
        """Keep the first `tokens` tokens of a row; whole pages beyond them are released."""
        kept, target = 0, self.rows[row]
        for page, count in enumerate(target.counts):
            if kept + count > tokens:
                cut = page
                if tokens > kept:
                    target.counts[page] = tokens - kept
                    cut += 1
                # Let go of only after the row has: cut short in between, a page is lost, never shared
                # with somebody who writes to it.
                gone = target.blocks[cut:]
                del target.blocks[cut:], target.counts[cut:]
                self.pool.release(gone)
                break
            kept += count
        self._tensors = None

    def select(self, rows: list[int]) -> None:
        """Make row i a copy of old row rows[i]; blocks are shared, not copied."""
        old = self.rows
        new = [Row(list(old[i].blocks), list(old[i].counts)) for i in rows]
        for row in new:
            self.pool.retain(row.blocks)
        self.rows = new
        for row in old:
            self.pool.release(row.blocks)
        self._tensors = None

    def tensors(self) -> tuple[Tensor, Tensor]:
        """(block_table, page_counts), int32 [B, M]; missing pages are block 0 with count 0."""
        if self._tensors is None:
            blocks, counts = [row.blocks for row in self.rows], [row.counts for row in self.rows]
            self._tensors = (self._tensor(blocks), self._tensor(counts))
        elif self._added:
            self._tensors = self._extended(self._tensors)
        self._added = []
        return self._tensors

    def _extended(self, old: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """`old` with the pages of `_added`: a long batch gets a page a row, and is not listed anew."""
        added = torch.tensor(self._added, dtype=torch.long, device="cpu").T.to(old[0].device)
        new = []
        for before, values in zip(old, added[2:].int(), strict=True):
            after = before.new_zeros(len(self.rows), self.pages)
            after[:, : before.shape[1]] = before
            after[added[0], added[1]] = values
            new.append(after)
        return new[0], new[1]

    def stage(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copy pages `first` to `last` of every row into small pools of their own on the device.

        Returns:
            index and payload, uint8 [n, bytes], and the block table int32 [B, pages] into them.
        """
        rows = [row.blocks[first:last] for row in self.rows]
        used = sorted({block for blocks in rows for block in blocks})
        place = {block: i for i, block in enumerate(used)}
        index, payload = self.pool.read(used, self.pool.index.device)
        return index, payload, self._tensor([[place[block] for block in blocks] for blocks in rows])

    def _tensor(self, rows: list[list[int]]) -> Tensor:
        """int32 [B, longest row], padded with zeros."""
        width = max(map(len, rows), default=0)
        padded = [row + [0] * (width - len(row)) for row in rows]
        found = torch.tensor(padded, dtype=torch.int32, device=self.pool.index.device)
        return found.view(len(rows), width)
