"""Packing of 1-bit and 2-bit codes into bytes (docs/format.md, "Bit order")."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(bits: Tensor) -> Tensor:
    """Pack booleans, channel i into bit i % 8 of byte i // 8.

    Args:
        bits: bool or 0/1 integers [..., n], n a multiple of 8.
    Returns:
        uint8 [..., n / 8].
    """
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    grouped = bits.to(torch.uint8).unflatten(-1, (-1, 8))
    return (grouped * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """Inverse of `pack_bits`: uint8 [..., m] -> bool [..., 8 m]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)


def pack_crumbs(codes: Tensor) -> Tensor:
    """Pack 2-bit codes, channel i into bits 2 (i % 4) and up of byte i // 4.

    Args:
        codes: integers 0..3 [..., n], n a multiple of 4.
    Returns:
        uint8 [..., n / 4].
    """
    weights = 1 << (2 * torch.arange(4, dtype=torch.uint8, device=codes.device))
    grouped = codes.to(torch.uint8).unflatten(-1, (-1, 4))
    return (grouped * weights).sum(-1, dtype=torch.uint8)


def unpack_crumbs(packed: Tensor) -> Tensor:
    """Inverse of `pack_crumbs`: uint8 [..., m] -> uint8 0..3 [..., 4 m]."""
    shifts = 2 * torch.arange(4, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 3).flatten(-2)


def group_codes(packed: Tensor) -> Tensor:
    """Sign codes of the groups of 4 channels: uint8 [..., m] -> uint8 0..15 [..., 2 m].

    The code of group g is nibble g % 2 of byte g // 2; its bit i is the sign bit of channel
    4 g + i (paper, section on sign-based vector quantisation).
    """
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
