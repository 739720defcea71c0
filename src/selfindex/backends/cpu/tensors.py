"""Tensors as the compiled module takes them: addresses, strides in bytes, byte offsets of a format."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...codec import PageFormat
from .loader import native

CPU = torch.device("cpu")

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of a model, numbered as `enum Format` in native/kernels.h."""


@lru_cache(maxsize=256)
def layout(fmt: PageFormat) -> Any:
    """Byte offsets of a format, in the order of `struct Layout` in native/cache.h."""
    index, payload = fmt.index.sections, fmt.payload.sections
    names = ("codes", "key_scale", "mean", "mean_step", "key_base", "value_base")
    magnitudes, signs = payload["magnitudes"], payload.get("value_signs")
    numbers = [
        *(fmt.kv_heads, fmt.head_dim, fmt.page_size, fmt.value_bits),
        fmt.index.record,
        *(index[name].offset for name in names),
        fmt.payload.record,
        magnitudes.stride or 0,
        magnitudes.offset,
        payload["values"].offset,
        signs.offset if signs else 0,
        payload["value_scale"].offset,
    ]
    return native().Layout(numbers)


def strided(x: Tensor) -> tuple[int, int, int, int]:
    """Address and byte strides of a tensor [outer, heads, tokens, channels]: `struct Strided`."""
    size = x.element_size()
    return x.data_ptr(), x.stride(0) * size, x.stride(1) * size, x.stride(2) * size


def adjacent(x: Tensor) -> Tensor:
    """The tensor with its channels side by side."""
    x = x.detach()
    return x if x.stride(3) == 1 else x.contiguous()


def integers(x: Tensor) -> Tensor:
    """The tensor as the compiled module reads it: int32, contiguous."""
    return x.to(torch.int32).contiguous()


def is_pool(pool: Tensor, nbytes: int) -> bool:
    """Whether this holds pages of so many bytes where the compiled module reads them, near or far apart."""
    return (
        pool.device == CPU and pool.dtype == torch.uint8 and pool.shape[1] == nbytes and pool.stride(1) == 1
    )


def is_paged_window(window: Tensor, heads: int, dim: int) -> bool:
    """Whether this is [blocks, heads, tokens, 2 dim] as `struct PagedTokens` describes it."""
    return (
        window.device == CPU
        and window.dtype in FORMATS
        and (window.shape[1], window.shape[3]) == (heads, 2 * dim)
        and window.shape[2] > 0
        and window.stride(3) == 1
        and window.stride(2) == 2 * dim
    )


def paged(window: Tensor, table: Tensor) -> tuple[int, ...]:
    """`struct PagedTokens` of a window and its table, which is `integers` of one."""
    at, block, head, token = strided(window)
    return at, window.shape[0], block, head, token, window.shape[2], table.data_ptr(), table.shape[1]
