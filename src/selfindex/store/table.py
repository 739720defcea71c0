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
    """A new list where anything changes, never changed itself."""
    _summed: tuple[list[int], int] = field(default=([], 0), compare=False, repr=False)

    @property
    def tokens(self) -> int:
        # Every layer of every step asks, of thousands of pages.
        if self._summed[0] is not self.counts:
            self._summed = self.counts, sum(self.counts)
        return self._summed[1]


SPARE_PAGES, SPARE_SHARE = 8, 8
"""Columns a table has beyond its longest row: this many, or this share of them, whichever is more."""


class BlockTable:
    """Block table of a batch: one `Row` per sequence, mirrored in device tensors.

    The tensors keep their place while rows change, as long as rows fit: a captured CUDA graph reads them.
    """

    def __init__(self, batch: int, pool: BlockPool) -> None:
        self.pool = pool
        self.rows = [Row() for _ in range(batch)]
        self._mirror: Tensor | None = None
        """Blocks and counts, int32 [2, rows, columns]."""
        self._stale = False
        """Whether `_mirror` has to be filled again from all rows."""
        self._added: list[tuple[int, int, int, int]] = []
        """Row, place in the row, block and count of pages that are not in `_mirror` yet."""

    def __del__(self) -> None:
        # Forks of a cache share the pool, which then lives longer than this table. The collector may
        # call this in the middle of anything, and for a table that never got its rows.
        for row in getattr(self, "rows", ()):
            self.pool.release(row.blocks)

    def __copy__(self) -> BlockTable:
        return self.copied(share=True)

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
        target, added = self.rows[row], self._added
        place = len(target.blocks)
        if self._mirror is not None:
            pages = zip(range(place, place + len(blocks)), blocks, counts, strict=True)
            added = added + [(row, *page) for page in pages]
        held = target.blocks + blocks, target.counts + counts
        # One statement, here and below: cut short, row and mirror still agree.
        target.blocks, target.counts, self._added = *held, added

    def crop(self, row: int, tokens: int) -> None:
        """Keep the first `tokens` tokens of a row; whole pages beyond them are released."""
        left, target, counts = tokens, self.rows[row], []
        for count in target.counts:
            if left <= 0:
                break
            counts.append(min(count, left))
            left -= count
        kept, gone = target.blocks[: len(counts)], target.blocks[len(counts) :]
        # Let go of only after the row has: cut short in between, a page is lost, never shared with
        # somebody who writes to it.
        target.blocks, target.counts, self._stale = kept, counts, True
        self.pool.release(gone)

    def select(self, rows: list[int]) -> None:
        """Make row i a copy of old row rows[i]; blocks are shared, not copied."""
        old = self.rows
        new = [Row(list(old[i].blocks), list(old[i].counts)) for i in rows]
        self.pool.retain([block for row in new for block in row.blocks])
        current = self._mirror is not None and len(new) == len(old) and not (self._stale or self._added)
        self.rows, self._stale = new, True
        if current and self._mirror is not None:
            at = torch.tensor(rows, device=self.pool.index.device)
            self._mirror.copy_(self._mirror[:, at])
            self._stale = False
        self.pool.release([block for row in old for block in row.blocks])

    def tensors(self) -> tuple[Tensor, Tensor]:
        """(block_table, page_counts), int32 [B, M]; missing pages are block 0 with count 0."""
        table, counts = self.padded()
        return table[:, : self.pages], counts[:, : self.pages]

    def padded(self) -> tuple[Tensor, Tensor]:
        """`tensors` with columns to spare: contiguous, and in their place until a row outgrows them."""
        mirror = self._mirror
        if mirror is None or mirror.shape[2] < self.pages or mirror.shape[1] != len(self.rows):
            columns = self.pages + max(SPARE_PAGES, self.pages // SPARE_SHARE)
            with torch.inference_mode(False):  # written to in any mode
                mirror = self._listed(columns).to(self.pool.index.device)
        elif self._stale:
            mirror.copy_(self._listed(mirror.shape[2]))
        elif self._added:
            # A long batch gets a page a row, and is not listed anew.
            added = torch.tensor(self._added, dtype=torch.long, device="cpu").T.to(mirror.device)
            mirror[:, added[0], added[1]] = added[2:].int()
        self._mirror, self._stale, self._added = mirror, False, []
        return mirror[0], mirror[1]

    def _listed(self, columns: int) -> Tensor:
        """What the mirror has to hold, in host memory: one copy brings it to a device."""
        lists = [row.blocks for row in self.rows], [row.counts for row in self.rows]
        filled = [[held + [0] * (columns - len(held)) for held in rows] for rows in lists]
        return torch.tensor(filled, dtype=torch.int32, device="cpu").view(2, len(self.rows), columns)

    def stage(self, first: int, last: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """Copy pages `first` to `last` of rows, all by default, into small pools of their own on the device.

        Returns:
            index and payload, uint8 [n, bytes], and the block table int32 [B, pages] into them.
        """
        held = [row.blocks[first:last] for row in self.rows[rows]]
        used = sorted({block for blocks in held for block in blocks})
        place = {block: i for i, block in enumerate(used)}
        index, payload = self.pool.read(used, self.pool.index.device)
        return index, payload, self._tensor([[place[block] for block in blocks] for blocks in held])

    def _tensor(self, rows: list[list[int]]) -> Tensor:
        """int32 [B, longest row], padded with zeros."""
        width = max(map(len, rows), default=0)
        padded = [row + [0] * (width - len(row)) for row in rows]
        found = torch.tensor(padded, dtype=torch.int32, device=self.pool.index.device)
        return found.view(len(rows), width)
