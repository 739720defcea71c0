"""`encode`, `encode_into` and `encode_paged` on a GPU: one launch, one pass over keys and values.

Nothing is read back and the shape of the launch does not depend on the numbers given, so that a call
can be captured in a CUDA graph. Pages that are skipped cost the start of a block a KV head.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ...codec import PageFormat
from .decode import HEAD_DIMS, PAGE_SIZE, addressable
from .loader import INPUT_TYPES, load, module_for


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
        ("constants", ctypes.c_void_p),
        ("constants_row", ctypes.c_longlong),
        *((name, ctypes.c_void_p) for name in ("blocks", "index", "payload")),
        *((f"{of}_stride", ctypes.c_longlong) for of in ("index", "payload")),
        *((f"{of}_bytes", ctypes.c_longlong) for of in ("index", "payload")),
        ("heads", ctypes.c_int),
    )


class PagedTokens(ctypes.Structure):
    """`struct PagedTokens` of encode.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("table", "first")),
        *((name, ctypes.c_int) for name in ("columns", "block")),
    )


def supported(keys: Tensor, values: Tensor, fmt: PageFormat, pools: tuple[Tensor, ...] = ()) -> bool:
    """Whether the kernels serve this call; the reference operator serves the others.

    `pools` are those that the pages go to, if there are any.
    """
    return (
        fmt.page_size == PAGE_SIZE
        and fmt.head_dim in HEAD_DIMS
        and keys.dtype == values.dtype
        and keys.dtype in INPUT_TYPES
        and keys.shape[0] > 0
        and (not pools or addressable(pools[0], pools[1], fmt))
    )


def encode(
    keys: Tensor, values: Tensor, counts: Tensor, constants: Tensor, format: str
) -> tuple[Tensor, Tensor]:
    """The operator `selfindex::encode` for a `supported` call.

    Raises:
        KernelsUnavailable: cuda-core is missing, or the GPU is too old.
    """
    fmt = PageFormat.parse(format)
    sizes = fmt.index_bytes, fmt.payload_bytes
    index, payload = (keys.new_empty((keys.shape[0], size), dtype=torch.uint8) for size in sizes)
    _launch(keys, values, counts, None, (index, payload), constants, fmt)
    return index, payload


def encode_into(
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    blocks: Tensor,
    index_pool: Tensor,
    payload_pool: Tensor,
    constants: Tensor,
    format: str,
) -> None:
    """The operator `selfindex::encode_into` for a `supported` call; raises as `encode`."""
    pools = index_pool, payload_pool
    _launch(keys, values, counts, blocks, pools, constants, PageFormat.parse(format))


def encode_paged(
    window: Tensor,
    table: Tensor,
    first: Tensor,
    counts: Tensor,
    blocks: Tensor,
    index_pool: Tensor,
    payload_pool: Tensor,
    constants: Tensor,
    format: str,
) -> None:
    """The operator `selfindex::encode_paged` for a `supported` call; raises as `encode`."""
    table, first = table.int(), first.to(table.device, torch.int32).contiguous()
    table = table if table.stride(1) == 1 else table.contiguous()
    tokens = PagedTokens(table.data_ptr(), first.data_ptr(), table.stride(0), window.shape[2])
    keys, values = window.chunk(2, -1)
    pools = index_pool, payload_pool
    _launch(keys, values, counts, blocks, pools, constants, PageFormat.parse(format), tokens)


def _launch(
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    blocks: Tensor | None,
    pools: tuple[Tensor, Tensor],
    constants: Tensor,
    fmt: PageFormat,
    tokens: PagedTokens | None = None,
) -> None:
    """Encode a page a count; keys and values are pages of their own, or blocks in which `tokens` are."""
    device, n = keys.device, counts.shape[0]
    kernels = load(module_for("encode", fmt), device, fmt.head_dim, 1, fmt.value_bits, keys.dtype)
    keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (keys, values))
    counts, constants = counts.to(device, torch.int32).contiguous(), constants.contiguous()
    blocks = None if blocks is None else blocks.to(device, torch.int32).contiguous()
    params = EncodeParams(
        keys.data_ptr(),
        values.data_ptr(),
        *keys.stride()[:3],
        *values.stride()[:3],
        counts.data_ptr(),
        constants.data_ptr(),
        constants.stride(0) if constants.shape[0] > 1 else 0,
        None if blocks is None else blocks.data_ptr(),
        *(pool.data_ptr() for pool in pools),
        *(pool.stride(0) for pool in pools),
        fmt.index_bytes,
        fmt.payload_bytes,
        fmt.kv_heads,
    )
    arguments: list[Any] = [params] if tokens is None else [params, tokens]
    kernel, threads = kernels["encode" if tokens is None else "encode_paged"], 256
    with torch.cuda.device(device):
        kernel((n * fmt.kv_heads, 1), 2 * threads if fmt.head_dim == 256 else threads, arguments)
