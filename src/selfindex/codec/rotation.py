"""Randomised Hadamard rotations for every supported head dimension."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

# Hadamard orders that are not powers of two, built by Paley's first construction from the prime
# one below: d = order * 2**n covers 96 and 192 (order 12) and 80 (order 20).
_PALEY = {12: 11, 20: 19}

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
"""Head dimensions the formats are defined for."""

KEY_SEED, VALUE_SEED = 1, 2
"""Seeds of the sign diagonals; part of format version 1."""


_HOST: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
"""Where matrices are built, whatever PyTorch's defaults are."""


def _paley(order: int) -> Tensor:
    prime = _PALEY[order]
    squares = {(i * i) % prime for i in range(1, prime)}
    jacobsthal = torch.zeros(prime, prime, **_HOST)
    for i in range(prime):
        for j in range(prime):
            if i != j:
                jacobsthal[i, j] = 1.0 if (i - j) % prime in squares else -1.0
    matrix = torch.zeros(order, order, **_HOST)
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = -1.0
    matrix[1:, 1:] = jacobsthal
    return matrix + torch.eye(order, **_HOST)


def block_order(dim: int) -> int:
    """Order of the block that `hadamard(dim)` doubles: 12 or 20 of Paley's, else 1."""
    return next((o for o in _PALEY if dim % o == 0 and (dim // o) & (dim // o - 1) == 0), 1)


def hadamard(dim: int) -> Tensor:
    """A Hadamard matrix (entries +-1, rows orthogonal), float32 [dim, dim].

    Raises:
        InputError: no construction is known here for `dim`.
    """
    order = block_order(dim)
    rest = dim // order
    if dim < 1 or rest & (rest - 1):
        raise InputError(f"no Hadamard matrix for head_dim {dim}; supported are {HEAD_DIMS}")
    matrix = _paley(order) if order > 1 else torch.ones(1, 1, **_HOST)
    while matrix.shape[0] < dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix


def sign_diagonal(dim: int, seed: int) -> Tensor:
    """Fixed pseudo-random signs, float32 [dim]: bit 63 of SplitMix64 started at `seed`.

    Written out here, not drawn from a library's generator, because stored pages depend on it.
    """
    mask, state, signs = (1 << 64) - 1, seed, []
    for _ in range(dim):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        signs.append(-1.0 if (z ^ (z >> 31)) >> 63 else 1.0)
    return torch.tensor(signs, **_HOST)


@lru_cache(maxsize=64)
def rotation(dim: int, seed: int, device: torch.device) -> Tensor:
    """Orthonormal R = H diag(signs) / sqrt(dim), float32 [dim, dim]; rotate with x @ R.T."""
    matrix = hadamard(dim) * sign_diagonal(dim, seed) / dim**0.5
    return matrix.to(device)
