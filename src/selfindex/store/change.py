"""What a store is about to hold, worked out before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import InputError
from .pool import Encoded
from .statistics import Statistics


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
