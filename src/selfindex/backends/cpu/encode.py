"""The compiled operators that encode pages."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...codec import PageFormat
from ...codec.rotation import HEAD_DIMS, KEY_SEED, VALUE_SEED, block_order, hadamard, sign_diagonal
from .loader import instruction_set, native
from .tensors import CPU, FORMATS, adjacent, integers, is_paged_window, is_pool, layout, paged, strided


@lru_cache(maxsize=16)
def _rotation_parts(dim: int) -> tuple[int, Tensor, Tensor, Tensor]:
    """Order and matrix that doubling starts from, and what channels of keys and values are multiplied by."""
    order = block_order(dim)
    factors = [sign_diagonal(dim, seed) / dim**0.5 for seed in (KEY_SEED, VALUE_SEED)]
    return order, hadamard(order), factors[0], factors[1]


class _Pages:
    """`struct Pages`; keeps the tensors alive whose addresses it hands over."""

    def __init__(
        self,
        dtype: torch.dtype,
        counts: Tensor,
        blocks: Tensor,
        index_pool: Tensor,
        payload_pool: Tensor,
        constants: Tensor,
        fmt: PageFormat,
    ) -> None:
        counts, blocks, constants = integers(counts), integers(blocks), constants.to(torch.float32)
        rotation = 0, 1, 0
        if fmt.preset == "balanced":
            order, block, key_signs, value_factor = _rotation_parts(fmt.head_dim)
            constants, rotation = constants * key_signs, (value_factor.data_ptr(), order, block.data_ptr())
        constants = constants.contiguous()
        self._kept = counts, blocks, index_pool, payload_pool, constants
        own = constants.stride(0) if len(constants) > 1 else 0
        self.numbers = [
            *(FORMATS[dtype], len(counts), counts.data_ptr(), constants.data_ptr(), own),
            *(*rotation, blocks.data_ptr()),
            min(index_pool.shape[0], payload_pool.shape[0]),
            *(index_pool.data_ptr(), payload_pool.data_ptr(), fmt.index_bytes, fmt.payload_bytes),
            *(index_pool.stride(0), payload_pool.stride(0), torch.get_num_threads()),
        ]


def _served(fmt: PageFormat, index_pool: Tensor, payload_pool: Tensor) -> bool:
    return is_pool(index_pool, fmt.index_bytes) and is_pool(payload_pool, fmt.payload_bytes)


def encode_supported(keys: Tensor, values: Tensor, counts: Tensor, constants: Tensor, format: str) -> bool:
    """Whether `encode` serves these arguments."""
    return keys.dtype == values.dtype and keys.dtype in FORMATS and keys.shape[0] > 0


def encode(
    keys: Tensor, values: Tensor, counts: Tensor, constants: Tensor, format: str
) -> tuple[Tensor, Tensor]:
    """See `reference.encode`. Bytes differ from the reference's where rounding decides."""
    fmt, n = PageFormat.parse(format), keys.shape[0]
    index = torch.empty(n, fmt.index_bytes, dtype=torch.uint8, device=CPU)
    payload = torch.empty(n, fmt.payload_bytes, dtype=torch.uint8, device=CPU)
    every = torch.arange(n, dtype=torch.int32, device=CPU)
    encode_into(keys, values, counts, every, index, payload, constants, format)
    return index, payload


def encode_into_supported(
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    blocks: Tensor,
    index_pool: Tensor,
    payload_pool: Tensor,
    constants: Tensor,
    format: str,
) -> bool:
    """Whether `encode_into` serves these arguments."""
    served = _served(PageFormat.parse(format), index_pool, payload_pool)
    return served and keys.dtype == values.dtype and keys.dtype in FORMATS


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
    """See `reference.encode_into`.

    Raises:
        IndexError: a block is not in the pools; nothing is written.
    """
    name, fmt = instruction_set(), PageFormat.parse(format)
    keys, values = adjacent(keys), adjacent(values)
    pages = _Pages(keys.dtype, counts, blocks, index_pool, payload_pool, constants, fmt)
    native().encode(name, layout(fmt), [*strided(keys), *strided(values), *pages.numbers])


def encode_paged_supported(
    window: Tensor,
    table: Tensor,
    first: Tensor,
    counts: Tensor,
    blocks: Tensor,
    index_pool: Tensor,
    payload_pool: Tensor,
    constants: Tensor,
    format: str,
) -> bool:
    """Whether `encode_paged` serves these arguments."""
    fmt = PageFormat.parse(format)
    return _served(fmt, index_pool, payload_pool) and is_paged_window(window, fmt.kv_heads, fmt.head_dim)


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
    """See `reference.encode_paged`.

    Raises:
        IndexError: a block is not in the pools or the window, or a position not in the table; nothing is
            written.
    """
    name, fmt = instruction_set(), PageFormat.parse(format)
    table, first = integers(table), integers(first)
    pages = _Pages(window.dtype, counts, blocks, index_pool, payload_pool, constants, fmt)
    native().encode_paged(name, layout(fmt), [*paged(window, table), first.data_ptr(), *pages.numbers])


def statistics_supported(keys: Tensor) -> bool:
    """Whether `prompt_statistics` serves these keys."""
    return keys.dtype in FORMATS and keys.shape[-1] in HEAD_DIMS and keys.numel() > 0


def prompt_statistics(keys: Tensor) -> Tensor:
    """See `reference.prompt_statistics`."""
    name, prompts = instruction_set(), adjacent(keys if keys.ndim == 4 else keys[None])
    heads, tokens, dim = keys.shape[-3:]
    constants = torch.empty(*keys.shape[:-2], 18 * dim, dtype=torch.float32, device=CPU)
    for own, found in zip(prompts.split(1), constants.view(-1, heads, 18 * dim), strict=True):
        numbers = FORMATS[keys.dtype], *strided(own), heads, tokens, dim, torch.get_num_threads()
        native().prompt_statistics(name, [*numbers, found.data_ptr()])
    return constants
