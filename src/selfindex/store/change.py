"""What a store is about to hold, worked out before anything is written."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowChange:
    """What one row's tokens become: (keys, values) [H, n, d] to encode and to keep raw."""

    encode: tuple[Tensor, Tensor]
    keep: tuple[Tensor, Tensor]
    prompt: Tensor | None = None
    """Keys of the row's prompt, if its statistics come from them (paper preset)."""


@dataclass(frozen=True)
class Statistics:
    """What pages share and what it is measured from; fields as in `LayerStore`."""

    constants: Tensor | None
    query_square: Tensor
    queries_seen: int
    has_constants: list[bool]
    prompt_tokens: list[int]


@dataclass(frozen=True)
class Change:
    """New content of a store, worked out by `LayerStore.plan`, stored by `LayerStore.commit`.

    Attributes:
        pages: index and payload planes, and the rows that get them with the tokens of each page.
        raw: rows, a first token, and the keys and values that rows hold from there on.
        step: keys and values [B, H, 1, d] that every row appends.
    """

    statistics: Statistics | None = None
    pages: tuple[tuple[Tensor, Tensor, list[tuple[int, list[int]]]], ...] = ()
    raw: tuple[tuple[slice, int, Tensor, Tensor], ...] = ()
    step: tuple[Tensor, Tensor] | None = None
