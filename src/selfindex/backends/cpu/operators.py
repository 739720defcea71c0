"""The compiled operators on tensors: checks, addresses, results."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...codec import PageFormat
from ...codec.rotation import KEY_SEED, VALUE_SEED, rotation
from .loader import instruction_set, native

_CPU = torch.device("cpu")


@lru_cache(maxsize=256)
def _layout(fmt: PageFormat) -> Any:
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


@lru_cache(maxsize=16)
def _rotations(dim: int) -> tuple[Tensor, Tensor]:
    """Matrices to the coded domain of keys and from that of values, both applied as x @ matrix."""
    return rotation(dim, KEY_SEED, _CPU).T.contiguous(), rotation(dim, VALUE_SEED, _CPU).contiguous()


class Call:
    """Arguments of an operator as the compiled module takes them.

    Keeps the tensors alive whose addresses it hands over. Shapes are those of `reference`.
    """

    def __init__(
        self,
        query: Tensor,
        index_pool: Tensor,
        payload_pool: Tensor,
        block_table: Tensor,
        page_counts: Tensor,
        constants: Tensor,
        scaling: float,
        format: str,
    ) -> None:
        fmt = PageFormat.parse(format)
        query = query.detach().to(torch.float32).contiguous()
        table, counts = (x.to(torch.int32).contiguous() for x in (block_table, page_counts))
        balance = constants.to(torch.float32).contiguous()
        rotations = _rotations(fmt.head_dim)
        self.output = torch.empty_like(query)
        self.lse = query.new_empty(query.shape[:3])
        self._kept = (query, index_pool, payload_pool, table, counts, balance, rotations)
        module = native()
        self.cache = module.Cache(
            _layout(fmt),
            index_pool.data_ptr(),
            index_pool.stride(0),
            payload_pool.data_ptr(),
            payload_pool.stride(0),
            min(index_pool.shape[0], payload_pool.shape[0]),
            table.data_ptr(),
            counts.data_ptr(),
            table.shape[0],
            table.shape[1],
            balance.data_ptr(),
            balance.stride(0) if balance.shape[0] > 1 else 0,
            rotations[0].data_ptr(),
            rotations[1].data_ptr(),
            scaling,
        )
        self.queries = module.Queries(
            query.data_ptr(),
            query.shape[1] // fmt.kv_heads,
            query.shape[2],
            torch.get_num_threads(),
            self.output.data_ptr(),
            self.lse.data_ptr(),
        )


def supported(query: Tensor, index_pool: Tensor, payload_pool: Tensor, fmt: PageFormat) -> bool:
    """Whether the compiled operators serve these arguments."""
    pools = (index_pool, payload_pool)
    return (
        fmt.preset == "balanced"
        and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and query.shape[1] > 0
        and query.shape[2] > 0
        and all(pool.device == _CPU and pool.stride(1) == 1 for pool in pools)
        and (index_pool.shape[1], payload_pool.shape[1]) == (fmt.index_bytes, fmt.payload_bytes)
    )


def sparse_decode(
    query: Tensor,
    index_pool: Tensor,
    payload_pool: Tensor,
    block_table: Tensor,
    page_counts: Tensor,
    budgets: Tensor,
    width: int,
    constants: Tensor,
    scaling: float,
    format: str,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.sparse_decode`. `chosen`, int32 [B, H, T, width], receives the selected slots."""
    name = instruction_set()
    call = Call(query, index_pool, payload_pool, block_table, page_counts, constants, scaling, format)
    wanted = budgets.to(torch.int32).contiguous()
    where = 0 if chosen is None else chosen.data_ptr()
    native().sparse_decode(name, call.cache, call.queries, wanted.data_ptr(), width, where)
    return call.output, call.lse


def dense_attend(
    query: Tensor,
    index_pool: Tensor,
    payload_pool: Tensor,
    block_table: Tensor,
    page_counts: Tensor,
    constants: Tensor,
    scaling: float,
    format: str,
) -> tuple[Tensor, Tensor]:
    """See `reference.dense_attend`."""
    name = instruction_set()
    call = Call(query, index_pool, payload_pool, block_table, page_counts, constants, scaling, format)
    native().dense_attend(name, call.cache, call.queries)
    return call.output, call.lse


def top_k(scores: Tensor, count: int) -> Tensor:
    """The selection of `sparse_decode` on given scores float32 [S]: int32, ascending."""
    scores = scores.contiguous()
    chosen = torch.empty(count + 1, dtype=torch.int32)
    return chosen[
        : native().top_k(instruction_set(), scores.data_ptr(), scores.shape[0], count, chosen.data_ptr())
    ]
