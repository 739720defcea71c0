"""Full-precision tokens of a layer: sinks first, then the recent window."""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 32
"""Capacity grows in multiples of this many tokens."""


class Window:
    """Keys and values in the model's dtype, each row packed from the left.

    Attributes:
        keys, values: [B, H, capacity, d].
        lengths: tokens held per row.
    """

    def __init__(self, like: Tensor) -> None:
        self.keys = like.new_empty(*like.shape[:2], 0, like.shape[-1])
        self.values = torch.empty_like(self.keys)
        self.lengths = [0] * like.shape[0]

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens a row."""
        if tokens <= self.capacity:
            return
        capacity = -(-tokens // STEP) * STEP
        grown = []
        for old in (self.keys, self.values):
            new = old.new_empty(*old.shape[:2], capacity, old.shape[-1])
            if old.shape[2]:
                new[:, :, : old.shape[2]] = old
            grown.append(new)
        # Together: memory may run out after the first.
        self.keys, self.values = grown

    def fitted(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values in the dtype of those held, which becomes a wider one if need be.

        Mixed precision brings several; as with concatenation, nothing is rounded.
        """
        if keys.dtype is values.dtype is self.keys.dtype:
            return keys, values
        dtype = torch.promote_types(torch.promote_types(keys.dtype, values.dtype), self.keys.dtype)
        if dtype != self.keys.dtype:
            self.keys, self.values = self.keys.to(dtype), self.values.to(dtype)
        return keys.to(dtype), values.to(dtype)

    def put(self, rows: slice, start: int, keys: Tensor, values: Tensor) -> None:
        """Write tokens [H, n, d] or [rows, H, n, d] at `start` and make them the last of these rows."""
        end = start + keys.shape[-2]
        self.reserve(end)
        self.keys[rows, :, start:end] = keys
        self.values[rows, :, start:end] = values
        chosen = range(*rows.indices(len(self.lengths)))
        self.lengths = [end if b in chosen else n for b, n in enumerate(self.lengths)]

    def append_step(self, keys: Tensor, values: Tensor) -> None:
        """Append one token [B, H, 1, d] to every row."""
        self.reserve(self.width + 1)
        if len(set(self.lengths)) == 1:
            at = self.lengths[0]
            self.keys[:, :, at : at + 1] = keys
            self.values[:, :, at : at + 1] = values
        else:
            rows = torch.arange(len(self.lengths), device=keys.device)
            positions = torch.tensor(self.lengths, device=keys.device)
            self.keys[rows, :, positions] = keys[:, :, 0]
            self.values[rows, :, positions] = values[:, :, 0]
        self.lengths = [n + 1 for n in self.lengths]

    def select(self, rows: Tensor) -> None:
        """Make row i a copy of old row rows[i]."""
        keys, values = self.keys[rows], self.values[rows]
        if len(rows) == len(self.lengths):
            # In their place, where a captured CUDA graph reads them.
            self.keys.copy_(keys)
            self.values.copy_(values)
        else:
            self.keys, self.values = keys, values
        self.lengths = [self.lengths[i] for i in rows.tolist()]

    def held(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(keys, values [B, H, width, d], bool [B, width] of real tokens or None if all are)."""
        width = self.width
        keys, values, real = self.keys[:, :, :width], self.values[:, :, :width], None
        if any(n != width for n in self.lengths):
            positions = torch.arange(width, device=keys.device)
            real = positions < torch.tensor(self.lengths, device=keys.device)[:, None]
            # Memory nobody wrote may hold NaN, which neither -inf nor a weight of 0 removes.
            keys, values = (x.masked_fill(~real[:, None, :, None], 0) for x in (keys, values))
        return keys, values, real
