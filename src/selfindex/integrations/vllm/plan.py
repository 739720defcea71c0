"""What a step reads and encodes, worked out on the device: a CUDA graph records it with the step.

Every tensor comes from the engine's own, which keep their place from step to step; shapes depend on the
batch's size and the longest sequence only, and nothing is read back. Rows of padding are of length 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import MOST, SelfIndexConfig
from .geometry import Geometry


@dataclass(frozen=True)
class Reads:
    """What queries read, one row each.

    Attributes:
        starts: int32 [n], from where on tokens are in full precision; -1 or more even for padding.
        positions: int32 [n], of the query; -1 for padding.
        counts: int32 [n, M], tokens of each page to read.
        budgets: int32 [n], encoded tokens to attend to.
    """

    starts: Tensor
    positions: Tensor
    counts: Tensor
    budgets: Tensor


@dataclass(frozen=True)
class Writes:
    """The page that each row completes, if any.

    Attributes:
        first, counts: int32 [B], its first position and its tokens.
        blocks: int32 [B], where it goes; -1 for none.
    """

    first: Tensor
    counts: Tensor
    blocks: Tensor


class Planner:
    """Plans of one group of layers; its tables are made once.

    Args:
        longest: tokens of the longest sequence, `max_model_len`.
        pages: columns of a page table.
    """

    def __init__(
        self, config: SelfIndexConfig, geometry: Geometry, longest: int, pages: int, device: torch.device
    ) -> None:
        self.config, self.geometry = config, geometry
        # What `budget_tokens` gives however many tokens are encoded, by the row's length.
        wanted = [config.budget_tokens(n, MOST) for n in range(longest + geometry.page + 1)]
        # Unlike others, the first page holds fewer tokens: the sinks are not in it.
        full = [geometry.page - geometry.sinks] + [geometry.page] * (pages - 1)
        with torch.inference_mode(False):
            self.wanted = torch.tensor(wanted, dtype=torch.int32, device=device)
            self.full = torch.tensor(full, dtype=torch.int32, device=device)
            self.places = torch.arange(pages, dtype=torch.int32, device=device)
        self.width = max(1, min(sum(full), max(*wanted, config.dense_below)))
        """Most encoded tokens that a row attends to."""
        self._ahead = -(-geometry.window // geometry.page)
        """Pages behind `encoded_below` that a prefix hit may have left without full-precision tokens."""

    def _lost(self, table: Tensor, page: Tensor, known: Tensor) -> Tensor:
        """Whether a page came with a prefix hit, encoded only: bool [n].

        A hit is a number of whole pages, so the page's last window block tells; the sinks are in others.

        Args:
            known: int32 [n], tokens of the row. A block behind them is of a chunk that is being computed,
                and says nothing: the chunk stores only its last tokens.
        """
        size = self.geometry.block
        ends = (page + 1) * self.geometry.page - size  # of the block before the page's end
        block = table.gather(1, (ends // size).clamp(0, table.shape[1] - 1).long()[:, None])[:, 0]
        return (block == 0) & (ends < known) & (page >= 0)

    def reads(self, lengths: Tensor, window_table: Tensor) -> Reads:
        """Args: lengths int32 [n], each query's row up to and with the query; the rows' window blocks."""
        geometry, config = self.geometry, self.config
        positions = lengths - 1
        page = (positions - geometry.recent).clamp(min=0) // geometry.page
        for _ in range(self._ahead):
            page = page + self._lost(window_table, page, positions).int()
        counts = torch.where(self.places < page[:, None], self.full, 0)
        starts = page * geometry.page
        encoded = (starts - geometry.sinks).clamp(min=0)
        wanted = torch.minimum(self.wanted[lengths.clamp(min=0).long()], encoded)
        return Reads(starts, positions, counts, torch.where(encoded <= config.dense_below, encoded, wanted))

    def writes(self, lengths: Tensor, new: Tensor | int, page_table: Tensor, window_table: Tensor) -> Writes:
        """The last page of rows of `lengths` tokens, `new` of them of this step, if it has to be encoded.

        That is one which ends in this step, or among the drafts of the last one: encoded then, they may
        have been rejected since. A page that is encoded twice gets the same bytes.
        """
        geometry = self.geometry
        page = lengths // geometry.page - 1
        first = page * geometry.page
        due = first + geometry.page > lengths - new - geometry.drafts
        due = due & (page >= 0) & ~self._lost(window_table, page, lengths)
        block = page_table.gather(1, page.clamp(min=0).long()[:, None])[:, 0]
        blocks = torch.where(due & (block > 0), block, -1)
        sinks = torch.where(page == 0, geometry.sinks, 0)
        return Writes(first.clamp(min=0) + sinks, geometry.page - sinks, blocks)
