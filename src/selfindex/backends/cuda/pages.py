"""`decode_pages` on a GPU: one launch, a block a page and KV head, bound by what it writes.

Nothing is read back: counts stay on the device.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...codec import PageFormat
from .decode import HEAD_DIMS, PAGE_SIZE, addressable
from .loader import INPUT_TYPES, load, module_for

THREADS = 256
"""As in pages.cuh."""


class PagesParams(ctypes.Structure):
    """`struct PagesParams` of pages.cuh."""

    _fields_ = (
        ("index", ctypes.c_void_p),
        ("index_stride", ctypes.c_longlong),
        ("payload", ctypes.c_void_p),
        ("payload_stride", ctypes.c_longlong),
        *((name, ctypes.c_void_p) for name in ("table", "counts")),
        *((name, ctypes.c_longlong) for name in ("table_row", "counts_row")),
        *((name, ctypes.c_void_p) for name in ("starts", "constants")),
        ("constants_row", ctypes.c_longlong),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((f"{of}_{what}", ctypes.c_longlong) for of in ("key", "value") for what in ("head", "token")),
        ("tokens", ctypes.c_longlong),
        ("heads", ctypes.c_int),
    )


def supported(
    index_pool: Tensor,
    payload_pool: Tensor,
    block_table: Tensor,
    keys: Tensor,
    values: Tensor,
    fmt: PageFormat,
) -> bool:
    """Whether the kernel serves this call; the reference operator serves the others."""
    return (
        fmt.page_size == PAGE_SIZE
        and fmt.head_dim in HEAD_DIMS
        and keys.dtype in INPUT_TYPES
        and keys.dtype == values.dtype
        and all(whole_vectors(x) for x in (keys, values))
        and addressable(index_pool, payload_pool, fmt)
        and 0 < block_table.shape[0] < 1 << 16
        and block_table.shape[1] > 0
    )


def whole_vectors(x: Tensor) -> bool:
    """Whether 8 neighbouring channels can be read and written in pieces of 16 bytes."""
    unit = 16 // x.element_size()
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s % unit == 0 for s in x.stride()[:-1])


def decode_pages(
    index_pool: Tensor,
    payload_pool: Tensor,
    block_table: Tensor,
    page_counts: Tensor,
    starts: Tensor,
    keys: Tensor,
    values: Tensor,
    constants: Tensor,
    format: str,
) -> None:
    """The operator `selfindex::decode_pages` for a `supported` call.

    Raises:
        KernelsUnavailable: cuda-core is missing, or the GPU is too old.
    """
    fmt, device = PageFormat.parse(format), keys.device
    kernels = load(module_for("pages", fmt), device, fmt.head_dim, 1, fmt.value_bits, keys.dtype)
    table, counts = (
        x.int() if x.stride(1) == 1 else x.int().contiguous() for x in (block_table, page_counts)
    )
    starts, constants = starts.int().contiguous(), constants.contiguous()
    params = PagesParams(
        index_pool.data_ptr(),
        index_pool.stride(0),
        payload_pool.data_ptr(),
        payload_pool.stride(0),
        table.data_ptr(),
        counts.data_ptr(),
        table.stride(0),
        counts.stride(0),
        starts.data_ptr(),
        constants.data_ptr(),
        constants.stride(0) if constants.shape[0] > 1 else 0,
        keys.data_ptr(),
        values.data_ptr(),
        *keys.stride()[:2],
        *values.stride()[:2],
        keys.shape[1],
        fmt.kv_heads,
    )
    rows, pages = table.shape
    with torch.cuda.device(device):
        kernels["restore_pages"]((pages * fmt.kv_heads, rows), THREADS, [params])
