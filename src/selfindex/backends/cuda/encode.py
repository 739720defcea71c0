"""`encode` on a GPU: one launch, one pass over the pages of keys and values."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...codec import PageFormat
from .decode import HEAD_DIMS, PAGE_SIZE
from .loader import INPUT_TYPES, load


class EncodeParams(ctypes.Structure):
    """`struct EncodeParams` of encode.cuh."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        *(
            (f"{of}_{what}", ctypes.c_longlong)
            for of in ("key", "value")
            for what in ("page", "head", "token")
        ),
        ("counts", ctypes.c_void_p),
        ("balance", ctypes.c_void_p),
        ("balance_row", ctypes.c_longlong),
        ("index", ctypes.c_void_p),
        ("payload", ctypes.c_void_p),
        ("index_bytes", ctypes.c_longlong),
        ("payload_bytes", ctypes.c_longlong),
        ("heads", ctypes.c_int),
    )


def supported(keys: Tensor, values: Tensor, fmt: PageFormat) -> bool:
    """Whether the kernel serves this call; the reference operator serves the others."""
    return (
        fmt.preset == "balanced"
        and fmt.page_size == PAGE_SIZE
        and fmt.head_dim in HEAD_DIMS
        and keys.dtype == values.dtype
        and keys.dtype in INPUT_TYPES
        and keys.shape[0] > 0
    )


def encode(
    keys: Tensor, values: Tensor, counts: Tensor, constants: Tensor, format: str
) -> tuple[Tensor, Tensor]:
    """The operator `selfindex::encode` for a `supported` call.

    Raises:
        KernelsUnavailable: cuda-core is missing, or the GPU is too old.
    """
    fmt, device, n = PageFormat.parse(format), keys.device, keys.shape[0]
    kernel = load("encode", device, fmt.head_dim, 1, fmt.value_bits, keys.dtype)["encode"]
    keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (keys, values))
    counts, balance = counts.to(device, torch.int32).contiguous(), constants.contiguous()
    index = torch.empty(n, fmt.index_bytes, dtype=torch.uint8, device=device)
    payload = torch.empty(n, fmt.payload_bytes, dtype=torch.uint8, device=device)
    params = EncodeParams(
        keys.data_ptr(),
        values.data_ptr(),
        *keys.stride()[:3],
        *values.stride()[:3],
        counts.data_ptr(),
        balance.data_ptr(),
        balance.stride(0) if balance.shape[0] > 1 else 0,
        index.data_ptr(),
        payload.data_ptr(),
        fmt.index_bytes,
        fmt.payload_bytes,
        fmt.kv_heads,
    )
    with torch.cuda.device(device):
        kernel((n * fmt.kv_heads, 1), 512 if fmt.head_dim == 256 else 256, [params])
    return index, payload
