"""`measure_balance` on a GPU: two launches."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...codec.balance import LIMIT
from .decode import HEAD_DIMS
from .loader import INPUT_TYPES, load

THREADS = 512
"""As in balance.cuh."""


class BalanceParams(ctypes.Structure):
    """`struct BalanceParams` of balance.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys")),
        *(
            (f"{of}_{what}", ctypes.c_longlong)
            for of in ("query", "key")
            for what in ("row", "head", "token")
        ),
        *((name, ctypes.c_void_p) for name in ("before", "square", "variance", "balance")),
        *((name, ctypes.c_int) for name in ("queries", "tokens", "groups")),
        *((name, ctypes.c_float) for name in ("seen", "limit")),
    )


def supported(query: Tensor, keys: Tensor) -> bool:
    """Whether the kernels serve this call; the reference operator serves the others."""
    return (
        keys.shape[3] in HEAD_DIMS
        and query.dtype in INPUT_TYPES
        and keys.dtype in INPUT_TYPES
        and query.stride(3) == keys.stride(3) == 1
        and 0 < keys.shape[0] < 1 << 16  # a grid's second dimension
        and keys.shape[2] > 0
    )


def measure_balance(query: Tensor, keys: Tensor, query_square: Tensor, queries: int) -> Tensor:
    """The operator `selfindex::measure_balance` for a `supported` call.

    Raises:
        KernelsUnavailable: cuda-core is missing, or the GPU is too old.
    """
    (rows, heads, tokens, dim), device = keys.shape, keys.device
    if query.dtype != keys.dtype:  # in mixed precision
        query, keys = query.float(), keys.float()
    kernels = load("balance", device, dim, 1, 2, keys.dtype)
    before = query_square.float().contiguous()
    square, variance, balance = (torch.empty_like(before) for _ in range(3))
    params = BalanceParams(
        query.data_ptr(),
        keys.data_ptr(),
        *query.stride()[:3],
        *keys.stride()[:3],
        *(x.data_ptr() for x in (before, square, variance, balance)),
        query.shape[2],
        tokens,
        query.shape[1] // heads,
        max(1, queries),
        LIMIT,
    )
    with torch.cuda.device(device):
        kernels["measure"]((heads * dim // 32, rows), THREADS, [params])
        overlap = torch.cuda.get_device_properties(device).major >= 9
        kernels["balance"]((heads, rows), dim // 2, [params], overlap=overlap)
    return balance
