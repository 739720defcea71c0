"""Tensors as the compiled module takes them: addresses, strides in bytes, byte offsets of a format."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...codec import PageFormat
from ...codec.rotation import KEY_SEED, VALUE_SEED, rotation
from .loader import native

CPU = torch.device("cpu")

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of a model, numbered as `enum Format` in native/kernels.h."""

PRESET_NUMBERS = {"balanced": 0, "paper": 1}
"""Presets, numbered as `enum Preset` in native/cache.h."""


@lru_cache(maxsize=256)
def layout(fmt: PageFormat) -> Any:
    """Byte offsets of a format, in the order of `struct Layout` in native/cache.h."""
    index, payload = fmt.index.sections, fmt.payload.sections
    names = ("codes", "key_scale", "mean", "mean_step", "key_base", "value_base")
    later = ("magnitudes", "values", "value_signs", "value_scale", "key_zero", "value_zero")
    sections = payload | index  # no name is in both planes of a preset

    def offset(name: str) -> int:
        return sections[name].offset if name in sections else 0

    numbers = [
        *(fmt.kv_heads, fmt.head_dim, fmt.page_size, fmt.value_bits),
        *(fmt.index.record, *map(offset, names)),
        *(fmt.payload.record, payload["magnitudes"].stride or 0, *map(offset, later)),
        PRESET_NUMBERS[fmt.preset],
    ]
    return native().Layout(numbers)


def strided(x: Tensor) -> tuple[int, int, int, int]:
    """Address and byte strides of a tensor [outer, heads, tokens, channels]: `struct Strided`."""
    size, (outer, head, token, _) = x.element_size(), x.stride()
    return x.data_ptr(), outer * size, head * size, token * size


def adjacent(x: Tensor) -> Tensor:
    """The tensor with its channels side by side."""
    return x if x.stride(3) == 1 else x.detach().contiguous()


def plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype, contiguous."""
    # Most are, and to ask is faster than to convert, twenty times in every layer of a step.
    return x if x.dtype is dtype and x.is_contiguous() else x.to(dtype).contiguous()


def integers(x: Tensor) -> Tensor:
    """The tensor as the compiled module reads integers: int32, contiguous."""
    return plain(x, torch.int32)


@lru_cache(maxsize=16)
def _rotations(dim: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Matrices to the coded domain of keys and from that of values, for x @ matrix; their addresses."""
    matrices = rotation(dim, KEY_SEED, CPU).T.contiguous(), rotation(dim, VALUE_SEED, CPU).contiguous()
    return *matrices, (matrices[0].data_ptr(), matrices[1].data_ptr())


class Pools:
    """`struct Cache`, without layout and scaling; keeps the tensors alive whose addresses it hands over."""

    __slots__ = ("_kept", "numbers")

    def __init__(
        self,
        index_pool: Tensor,
        payload_pool: Tensor,
        block_table: Tensor,
        page_counts: Tensor,
        constants: Tensor,
        fmt: PageFormat,
    ) -> None:
        table, counts = integers(block_table), integers(page_counts)
        constants = plain(constants, torch.float32)
        self._kept = index_pool, payload_pool, table, counts, constants
        self.numbers = [
            *(index_pool.data_ptr(), index_pool.stride(0), payload_pool.data_ptr(), payload_pool.stride(0)),
            *(
                min(index_pool.shape[0], payload_pool.shape[0]),
                table.data_ptr(),
                counts.data_ptr(),
                *table.shape,
            ),
            *(constants.data_ptr(), constants.stride(0) if constants.shape[0] > 1 else 0),
            *(_rotations(fmt.head_dim)[2] if fmt.preset == "balanced" else (0, 0)),
        ]


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
