"""Positive scales in 8 bits: 4 exponent and 4 mantissa bits under a float32 base.

The byte is bits 6..13 of an IEEE half, so decoding is one shift: half = byte << 6. Relative
rounding error is at most 1/32 down to 2**-14 of the base, below which it degrades to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 1.9375
"""Value of byte 255; the base is chosen so that the largest scale of a page maps to it."""


def encode_scales(scales: Tensor, dims: tuple[int, ...] = (-1,)) -> tuple[Tensor, Tensor]:
    """Quantise non-negative scales.

    Args:
        scales: float32, finite, >= 0.
        dims: trailing dimensions that share one base.
    Returns:
        (uint8 codes shaped like `scales`, float32 base with `dims` removed).
    """
    base = scales.amax(dims, keepdim=True) / LARGEST
    ratio = torch.where(base > 0, scales / base, torch.zeros_like(scales))
    halves = ratio.clamp(max=LARGEST).to(torch.float16).view(torch.int16)
    # Adding half a unit before the shift rounds to nearest; a carry moves into the exponent.
    codes = ((halves + 32) >> 6).clamp(0, 255).to(torch.uint8)
    return codes, base.squeeze(dims)


def decode_scales(codes: Tensor, base: Tensor) -> Tensor:
    """Inverse of `encode_scales`; `base` is float32 and must broadcast to `codes`."""
    return (codes.to(torch.int16) << 6).view(torch.float16).float() * base
