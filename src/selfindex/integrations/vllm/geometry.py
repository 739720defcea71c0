"""How a layer's tokens lie in the engine's blocks: sizes that specs, metadata and attention share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...codec import PageFormat
from ...config import SelfIndexConfig

WINDOW_BLOCK = 16
"""Most tokens of a window block; fewer where they are larger than a page."""


@dataclass(frozen=True)
class Geometry:
    """One layer's pages and full-precision window.

    A row is the same as in `LayerStore` (sinks, encoded pages, recent tokens), but pages are aligned at
    the sequence's start, as the engine's blocks are: the first one is encoded without the sinks.

    Attributes:
        format: of the pages, for the KV heads of this rank.
        dtype: of the window.
        sinks, recent: as in `SelfIndexConfig`.
        drafts: most draft tokens of a row in a step.
    """

    format: PageFormat
    dtype: torch.dtype
    sinks: int
    recent: int
    drafts: int = 0

    @classmethod
    def make(
        cls, config: SelfIndexConfig, kv_heads: int, head_dim: int, dtype: torch.dtype, drafts: int
    ) -> Geometry:
        fmt = PageFormat(config.preset, kv_heads, head_dim, config.page_size, config.value_bits)
        return cls(fmt, dtype, config.sinks, config.recent, drafts)

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.format.page_size

    @property
    def page_bytes(self) -> int:
        """Bytes of a page: its index plane, then its payload plane; a multiple of 256."""
        return self.format.index_bytes + self.format.payload_bytes

    @property
    def block(self) -> int:
        """Tokens of a window block: a power of two whose bytes fit a page."""
        token = 2 * self.format.kv_heads * self.format.head_dim * self.dtype.itemsize
        block = WINDOW_BLOCK
        while block * token > self.page_bytes:
            block //= 2
        return block

    @property
    def front(self) -> int:
        """Window blocks at a row's start that hold its sinks."""
        return -(-self.sinks // self.block)

    @property
    def window(self) -> int:
        """Last tokens that a row has in full precision before its next one, and at most as many more."""
        return self.page + self.recent

    @property
    def kept(self) -> int:
        """Last tokens of a step that a later one may read, whichever drafts among them are rejected."""
        return self.window + 2 * self.drafts

    def encoded_below(self, computed: int) -> int:
        """Position from where on a row with `computed` tokens is read in full precision: whole pages."""
        return max(0, computed - self.recent) // self.page * self.page
