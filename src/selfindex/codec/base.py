"""What a preset's codec offers to scoring and attention."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .format import PageFormat


class Codec(Protocol):
    """Encodes pages and reads them back. All arithmetic is float32.

    Shapes: n pages, B rows, H KV heads, P page size, d head_dim, K tokens to read.
    `constants` is float32 [1 or B, H, format.constants]; see each codec for its content.
    `block` and `offset` are int64 [B, H or 1, K]: the pool row and the token within the page.
    """

    format: PageFormat

    def encode(
        self, keys: Tensor, values: Tensor, counts: Tensor, constants: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encode pages: [n, H, P, d] x 2, int [n] -> uint8 [n, index_bytes], [n, payload_bytes].

        Tokens at or past a page's count are ignored and decode to zeros.
        """
        ...

    def map_query(self, query: Tensor, constants: Tensor) -> Tensor:
        """Take queries [B, H, ..., d] to the coded domain, where query.key is unchanged."""
        ...

    def unmap_keys(self, keys: Tensor, constants: Tensor) -> Tensor:
        """Take keys [B, H, K, d] as they are read back from the coded domain."""
        ...

    def unmap_output(self, output: Tensor) -> Tensor:
        """Take values, or attention outputs, [..., d] from the coded domain of the values back."""
        ...

    def lut(self, query: Tensor, constants: Tensor) -> Tensor:
        """Score of every sign code: mapped queries [B, H, ..., d] -> [B, H, ..., d / 4, 16]."""
        ...

    def token_gain(self, index: Tensor) -> Tensor | None:
        """Factor per token on its table sum: index planes [..., index_bytes] -> [..., H, P]."""
        ...

    def page_offset(self, query: Tensor, index: Tensor, constants: Tensor) -> Tensor:
        """query.mean of every page: [B, H, T, d], [B, M, index_bytes] -> [B, H, T, M]."""
        ...

    def read_keys(
        self, index: Tensor, payload: Tensor, block: Tensor, offset: Tensor, constants: Tensor
    ) -> Tensor:
        """Decode keys of tokens in the coded domain: pools [N, ...] -> float32 [B, H, K, d]."""
        ...

    def read_values(self, index: Tensor, payload: Tensor, block: Tensor, offset: Tensor) -> Tensor:
        """Decode values of tokens in the coded domain: pools [N, ...] -> float32 [B, H, K, d]."""
        ...
