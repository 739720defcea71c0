"""The compiled operators over encoded tokens: checks, addresses, results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...codec import PageFormat, codec_for
from ..partial import join_parts
from .loader import instruction_set, native
from .tensors import CPU, FORMATS, Pools, integers, is_pool, layout, plain

FEW_ROWS = 192
"""Queries of a KV head up to which `dense_attend` multiplies with the codes themselves; for more it
decodes keys and values and leaves the products to PyTorch."""

DENSE_CHUNK = 4096
"""Tokens decoded at a time for those: bounds the memory."""


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
        fmt, module = PageFormat.parse(format), native()
        query = plain(query.detach(), torch.float32)
        self.output = torch.empty_like(query)
        self.lse = query.new_empty(query.shape[:3])
        pools = Pools(index_pool, payload_pool, block_table, page_counts, constants, fmt)
        self._kept = query, pools
        self.cache = module.Cache(layout(fmt), pools.numbers, scaling)
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
    fmt = PageFormat.parse(next(x for x in rest if isinstance(x, str)))
    return (
        query.dtype in FORMATS
        and query.shape[1] > 0
        and query.shape[2] > 0
        and is_pool(index_pool, fmt.index_bytes)
        and is_pool(payload_pool, fmt.payload_bytes)
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
    wanted = integers(budgets)
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
