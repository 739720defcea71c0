"""The compiled operators over encoded tokens: checks, addresses, results."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...codec import PageFormat, codec_for
from ...codec.rotation import KEY_SEED, VALUE_SEED, rotation
from ..partial import join_parts
from .loader import instruction_set, native
from .tensors import CPU, FORMATS, layout

FEW_ROWS = 192
"""Queries of a KV head up to which `dense_attend` multiplies with the codes themselves; for more it
decodes keys and values and leaves the products to PyTorch."""

DENSE_CHUNK = 4096
"""Tokens decoded at a time for those: bounds the memory."""


@lru_cache(maxsize=16)
def _rotations(dim: int) -> tuple[Tensor, Tensor]:
    """Matrices to the coded domain of keys and from that of values, both applied as x @ matrix."""
    return rotation(dim, KEY_SEED, CPU).T.contiguous(), rotation(dim, VALUE_SEED, CPU).contiguous()


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
            layout(fmt),
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


def attention_supported(query: Tensor, index_pool: Tensor, payload_pool: Tensor, *rest: Any) -> bool:
    """Whether `sparse_decode` and `dense_attend` serve these arguments."""
    format = next(x for x in rest if isinstance(x, str))
    fmt, pools = PageFormat.parse(format), (index_pool, payload_pool)
    return (
        fmt.preset == "balanced"
        and query.dtype in FORMATS
        and query.shape[1] > 0
        and query.shape[2] > 0
        and all(pool.device == CPU and pool.stride(1) == 1 for pool in pools)
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
    recent: Tensor | None = None,
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
    fmt = PageFormat.parse(format)
    if query.shape[1] // fmt.kv_heads * query.shape[2] <= FEW_ROWS:
        native().dense_attend(name, call.cache, call.queries)
        return call.output, call.lse
    return _dense_products(name, call, query, page_counts, constants, scaling, fmt)


def _dense_products(
    name: str,
    call: Call,
    query: Tensor,
    page_counts: Tensor,
    constants: Tensor,
    scaling: float,
    fmt: PageFormat,
) -> tuple[Tensor, Tensor]:
    """Decode a chunk of tokens compiled, attend to it with PyTorch's flash attention, merge."""
    codec = codec_for(fmt.name)
    mapped = codec.map_query(query.detach().unflatten(1, (fmt.kv_heads, -1)).flatten(2, 3), constants)
    present = torch.arange(fmt.page_size, device=CPU) < page_counts[..., None]
    room = min(DENSE_CHUNK, int(present.sum((1, 2)).max()))
    keys, values = mapped.new_empty(2, fmt.kv_heads * room * fmt.head_dim).unbind()
    parts = []
    for b, row in enumerate(present.flatten(1)):
        one = mapped[b : b + 1]
        joined = torch.zeros_like(one), one.new_full(one.shape[:-1], -torch.inf)
        every = row.nonzero().flatten().int()
        for slots in every.split(DENSE_CHUNK) if len(every) else ():
            n, shape = len(slots), (1, fmt.kv_heads, len(slots), fmt.head_dim)
            k, v = (x[: fmt.kv_heads * n * fmt.head_dim].view(shape) for x in (keys, values))
            where = slots.data_ptr(), n, torch.get_num_threads(), k.data_ptr(), v.data_ptr()
            native().read_tokens(name, call.cache, b, *where)
            part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(one, k, v, scale=scaling)
            joined = join_parts(joined, part)
        parts.append(joined)
    # Rows are query heads times new queries; both go back to where they came from.
    shape = (*query.shape[:3], fmt.head_dim)
    output = codec.unmap_output(torch.cat([output for output, _ in parts])).view(shape)
    return output, torch.cat([lse for _, lse in parts]).view(shape[:3])


def top_k(scores: Tensor, count: int) -> Tensor:
    """The selection of `sparse_decode` on given scores float32 [S]: int32, ascending."""
    scores = scores.contiguous()
    chosen = torch.empty(count + 1, dtype=torch.int32, device=CPU)
    return chosen[
        : native().top_k(instruction_set(), scores.data_ptr(), scores.shape[0], count, chosen.data_ptr())
    ]
