"""What a store is about to hold, worked out before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import InputError
from .pool import Encoded


@dataclass(frozen=True)
class RowChange:
    """What one row's tokens become: (keys, values) [H, n, d] to encode and to keep in the window."""

    encode: tuple[Tensor, Tensor]
    keep: tuple[Tensor, Tensor]
    constants: Tensor | None = None
    """Constants [H, ...] of a prompt that begins the row (paper preset)."""
    prompt: int = 0
    """Tokens of that prompt."""


@dataclass(frozen=True)
class Statistics:
    """What pages share, and what it is measured from.

    Attributes:
        constants: balance [1, H, d] or the paper preset's of every row [B, H, ...]; None before they
            are fixed.
        query_square: sum of squares [H, d] of the queries of the first page, `queries_seen` of them.
        has_constants: paper preset: rows whose constants are fixed.
        prompt_tokens: paper preset: tokens of every row's prompt.
    """

    constants: Tensor | None
    query_square: Tensor
    queries_seen: int
    has_constants: tuple[bool, ...]
    prompt_tokens: tuple[int, ...]

    def emptied(self, row: int) -> Statistics:
        """With a row that starts anew."""
        return replace(
            self,
            has_constants=tuple(has and b != row for b, has in enumerate(self.has_constants)),
            prompt_tokens=tuple(0 if b == row else n for b, n in enumerate(self.prompt_tokens)),
        )

    def selected(self, rows: Sequence[int], shared: bool) -> Statistics:
        """With row i a copy of old row rows[i]; `shared`: the rows have their constants in common."""
        own = None if self.constants is None or shared else self.constants[list(rows)]
        return replace(
            self,
            constants=self.constants if own is None else own,
            has_constants=tuple(self.has_constants[i] for i in rows),
            prompt_tokens=tuple(self.prompt_tokens[i] for i in rows),
        )


@dataclass(frozen=True)
class Change:
    """New content of a store, worked out by `LayerStore.plan`, stored by `LayerStore.commit`.

    Attributes:
        pages: encoded ones, None if there are none; owners: the rows that get them, in order, with the
            tokens of each page.
        window: rows, a first token, and the keys and values that rows hold from there on.
        step: keys and values [B, H, 1, d] that every row appends.
        advanced: tokens that a decode step has written behind those of every row, which hold them now.
    """

    statistics: Statistics | None = None
    pages: Encoded | None = None
    owners: tuple[tuple[int, list[int]], ...] = ()
    window: tuple[tuple[slice, int, Tensor, Tensor], ...] = ()
    step: tuple[Tensor, Tensor] | None = None
    advanced: int = 0

    @property
    def writes(self) -> bool:
        """Whether anything is written to tensors."""
        return bool(self.pages or self.window or self.step is not None)


@lru_cache(maxsize=64)
def advanced_by(tokens: int) -> Change:
    """The change of a step that only takes over what it has written."""
    return Change(advanced=tokens)


def extremes(*tensors: Tensor) -> list[Tensor]:
    """Least and largest numbers, finite only if all are: one launch a tensor, and no temporary."""
    return [end for x in tensors for end in torch.aminmax(x)]


def check_finite(keys: Tensor, values: Tensor) -> None:
    """Raise InputError unless all numbers are finite; waits for the device."""
    if not bool(torch.isfinite(torch.stack(extremes(keys, values))).all()):
        raise InputError(
            "keys or values hold NaN or infinity; they cannot be encoded. Check the model's "
            "dtype (fp16 overflows in some models; use bf16) and its inputs"
        )
