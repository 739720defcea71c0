"""What a row's pages share, measured from its first tokens: balance, or the paper preset's constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", bound=int)


@dataclass(frozen=True)
class Statistics:
    """Constants of rows, and what they are measured from.

    Attributes:
        constants: float32 [B, H, ...], of every row; meaningless for those that have none yet. One row in
            common if `shared`; None before any row has some.
        query_square: sums of squares [B, H, d] of the queries of each row's first page, until its balance is
            fixed; queries_seen: how many of them.
        has_constants: rows whose constants are fixed; if `shared`, those of all rows are.
        prompt_tokens: of every row's prompt if each head pins some of its tokens, else 0.
        shared: the constants are those of a profile.
    """

    constants: Tensor | None
    query_square: Tensor
    queries_seen: tuple[int, ...]
    has_constants: tuple[bool, ...]
    prompt_tokens: tuple[int, ...]
    shared: bool = False

    @classmethod
    def of(cls, like: Tensor, profile: Tensor | None) -> Statistics:
        """Those of rows without tokens; like: keys [B, H, T, d]; profile: balance [H, d], or None."""
        batch, heads, _, dim = like.shape
        constants = None if profile is None else profile.to(like.device, torch.float32)[None]
        square = like.new_zeros(batch, heads, dim, dtype=torch.float32)
        none = (0,) * batch
        return cls(constants, square, none, (False,) * batch, none, constants is not None)

    def fixed(self, row: int) -> bool:
        """Whether the constants of a row are fixed."""
        return self.shared or self.has_constants[row]

    @property
    def own(self) -> Tensor | None:
        """Constants of the rows that have some, or the one row that all have in common; None without any."""
        rows = [b for b, has in enumerate(self.has_constants) if has]
        if self.constants is None or self.shared:
            return self.constants
        return self.constants[rows] if rows else None

    def fix(self, own: Mapping[int, Tensor]) -> Statistics:
        """With constants [H, ...] of rows."""
        if not own:
            return self
        first = next(iter(own.values()))
        rows = len(self.has_constants)
        constants = first.new_ones(rows, *first.shape) if self.constants is None else self.constants.clone()
        for row, its in own.items():
            constants[row] = its
        fixed = tuple(b in own or has for b, has in enumerate(self.has_constants))
        return replace(self, constants=constants, has_constants=fixed)

    def placed(self, old: Statistics) -> Statistics:
        """With constants where `old` has its own, if they have the same shape: captured graphs read them.

        Those of rows that have had some stay what they were.
        """
        new, there = self.constants, old.constants
        if new is None or there is None or new is there or new.shape != there.shape:
            return self
        return replace(self, constants=there.copy_(new))

    def emptied(self, row: int) -> Statistics:
        """With a row that starts anew."""
        square = self.query_square
        if self.queries_seen[row]:
            square = square.clone()
            square[row] = 0
        return replace(
            self,
            query_square=square,
            queries_seen=_with(self.queries_seen, row, 0),
            has_constants=_with(self.has_constants, row, False),
            prompt_tokens=_with(self.prompt_tokens, row, 0),
        )

    def selected(self, rows: Tensor, order: list[int]) -> Statistics:
        """With row i a copy of old row order[i]; rows: the same, int64 on the device."""
        before = len(self.has_constants)
        if order == list(range(before)):
            return self

        def moved(x: Tensor) -> Tensor:
            # In its place, where captured graphs read it.
            return x.copy_(x[rows]) if len(order) == before else x[rows]

        unused = len(order) == before and all(map(self.fixed, range(before)))
        constants = self.constants
        return replace(
            self,
            constants=constants if constants is None or self.shared else moved(constants),
            query_square=self.query_square if unused else moved(self.query_square),
            queries_seen=tuple(self.queries_seen[i] for i in order),
            has_constants=tuple(self.has_constants[i] for i in order),
            prompt_tokens=tuple(self.prompt_tokens[i] for i in order),
        )

    def copied(self) -> Statistics:
        """The same in tensors of its own: some are written in their place."""
        constants = self.constants if self.constants is None or self.shared else self.constants.clone()
        return replace(self, constants=constants, query_square=self.query_square.clone())

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.query_square.nbytes + (0 if self.constants is None else self.constants.nbytes)


def _with(values: tuple[Number, ...], at: int, value: Number) -> tuple[Number, ...]:
    return (*values[:at], value, *values[at + 1 :])
