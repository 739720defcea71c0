"""`select_blocks` on a GPU: moments of blocks of keys come from one launch, the rest from PyTorch.

Keys are most of what is read: once, where PyTorch would copy them to float32 first.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ..operators.select_blocks import BLOCK, select
from .decode import HEAD_DIMS
from .loader import INPUT_TYPES, load

THREADS = 256
"""As in moments.cuh."""


class MomentsParams(ctypes.Structure):
    """`struct MomentsParams` of moments.cuh."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        *((f"key_{what}", ctypes.c_longlong) for what in ("row", "head", "token")),
        ("moments", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("heads", "tokens", "blocks")),
    )


def supported(query: Tensor, keys: Tensor, *rest: Any) -> bool:
    """Whether the kernel serves this call; the reference operator serves the others."""
    return (
        keys.shape[3] in HEAD_DIMS
        and keys.dtype in INPUT_TYPES
        and 0 < keys.shape[0] < 1 << 16
        and 0 < keys.shape[1] * keys.shape[2] < 1 << 31
        # Vectors of four channels.
        and keys.stride(3) == 1
        and all(stride % 4 == 0 for stride in keys.stride()[:3])
        and keys.data_ptr() % 16 == 0
    )


def moments(keys: Tensor) -> Tensor:
    """What the plain `moments` gives, of `supported` keys."""
    batch, heads, tokens, dim = keys.shape
    kernel = load("moments", keys.device, dim, 1, 2, keys.dtype)["moments"]
    blocks = -(-tokens // BLOCK)
    found = keys.new_empty(batch, heads, blocks, 2 * dim, dtype=torch.float32)
    params = MomentsParams(keys.data_ptr(), *keys.stride()[:3], found.data_ptr(), heads, tokens, blocks)
    with torch.cuda.device(keys.device):
        kernel((blocks * heads, batch), THREADS, [params])
    return found


def select_blocks(
    query: Tensor, keys: Tensor, scaling: float, mass: float, density: float
) -> tuple[Tensor, Tensor]:
    """The operator `selfindex::select_blocks` for a `supported` call.

    Raises:
        KernelsUnavailable: cuda-core is missing, or the GPU is too old.
    """
    return select(query, keys, moments(keys), scaling, mass, density)
