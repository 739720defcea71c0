"""The compiled operators on tensors: checks, addresses, results."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...codec import PageFormat, codec_for
from ...codec.rotation import HEAD_DIMS, KEY_SEED, VALUE_SEED, block_order, hadamard, rotation, sign_diagonal
from ..partial import join_parts
from .loader import instruction_set, native

_CPU = torch.device("cpu")

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of a model, numbered as `enum Format` in native/kernels.h."""

FEW_ROWS = 192
"""Queries of a KV head up to which `dense_attend` multiplies with the codes themselves; for more it
decodes keys and values and leaves the products to PyTorch."""

DENSE_CHUNK = 4096
"""Tokens decoded at a time for those: bounds the memory."""


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


def attention_supported(query: Tensor, index_pool: Tensor, payload_pool: Tensor, *rest: Any) -> bool:
    """Whether `sparse_decode` and `dense_attend` serve these arguments."""
    fmt, pools = PageFormat.parse(rest[-1]), (index_pool, payload_pool)
    return (
        fmt.preset == "balanced"
        and query.dtype in FORMATS
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
    present = torch.arange(fmt.page_size, device=_CPU) < page_counts[..., None]
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


def encode_supported(keys: Tensor, values: Tensor, counts: Tensor, constants: Tensor, format: str) -> bool:
    """Whether `encode` serves these arguments."""
    return (
        PageFormat.parse(format).preset == "balanced"
        and keys.dtype == values.dtype
        and keys.dtype in FORMATS
        and keys.shape[0] > 0
    )


@lru_cache(maxsize=16)
def _rotation_parts(dim: int) -> tuple[int, Tensor, Tensor, Tensor]:
    """Order and matrix that doubling starts from, and what channels of keys and values are multiplied by."""
    order = block_order(dim)
    factors = [sign_diagonal(dim, seed) / dim**0.5 for seed in (KEY_SEED, VALUE_SEED)]
    return order, hadamard(order), factors[0], factors[1]


def _strided(x: Tensor) -> tuple[int, int, int, int]:
    """Address and byte strides of a tensor [outer, heads, tokens, channels]: `struct Strided`."""
    size = x.element_size()
    return x.data_ptr(), x.stride(0) * size, x.stride(1) * size, x.stride(2) * size


def _adjacent(x: Tensor) -> Tensor:
    """The tensor with its channels side by side."""
    x = x.detach()
    return x if x.stride(3) == 1 else x.contiguous()


def encode(
    keys: Tensor, values: Tensor, counts: Tensor, constants: Tensor, format: str
) -> tuple[Tensor, Tensor]:
    """See `reference.encode`. Bytes differ from the reference's where rounding decides."""
    name, fmt, n = instruction_set(), PageFormat.parse(format), keys.shape[0]
    keys, values, counts = _adjacent(keys), _adjacent(values), counts.to(torch.int32).contiguous()
    order, block, key_signs, value_factor = _rotation_parts(fmt.head_dim)
    key_factor = (constants.to(torch.float32) * key_signs).contiguous()
    index = torch.zeros(n, fmt.index_bytes, dtype=torch.uint8, device=_CPU)
    payload = torch.zeros(n, fmt.payload_bytes, dtype=torch.uint8, device=_CPU)
    numbers = [
        *(FORMATS[keys.dtype], n, *_strided(keys), *_strided(values), counts.data_ptr()),
        *(key_factor.data_ptr(), key_factor.stride(0) if len(key_factor) > 1 else 0, value_factor.data_ptr()),
        *(order, block.data_ptr(), index.data_ptr(), payload.data_ptr()),
        *(fmt.index_bytes, fmt.payload_bytes, torch.get_num_threads()),
    ]
    native().encode(name, _layout(fmt), numbers)
    fmt.count(index).copy_(counts)
    return index, payload


def window_supported(
    query: Tensor, new_keys: Tensor, new_values: Tensor, keys: Tensor, values: Tensor, *rest: Any
) -> bool:
    """Whether `window_attend` serves these arguments."""
    tensors = (query, new_keys, new_values, keys, values)
    return (
        query.dtype in FORMATS
        and all(x.dtype == query.dtype and x.device == _CPU for x in tensors)
        and query.shape[3] % 16 == 0
        and query.shape[3] <= max(HEAD_DIMS)
        and keys.is_contiguous()
        and values.is_contiguous()
    )


def window_attend(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    part: Tensor,
    part_lse: Tensor,
    sink_logit: Tensor | None,
    scaling: float,
) -> Tensor:
    """See `reference.window_attend`.

    Raises:
        IndexError: a row's length is not below `room`.
    """
    (batch, query_heads, _, dim), (heads, room) = query.shape, keys.shape[1:3]
    query, new_keys, new_values = _adjacent(query), _adjacent(new_keys), _adjacent(new_values)
    lengths = lengths.to(torch.int32).contiguous()
    part, part_lse = part.to(torch.float32).contiguous(), part_lse.to(torch.float32).contiguous()
    sink = None if sink_logit is None else sink_logit.detach().to(torch.float32).contiguous()
    output = query.new_empty(batch, 1, query_heads, dim)
    numbers = [
        *(FORMATS[query.dtype], batch, heads, room, query_heads // heads, dim),
        *(*_strided(query), *_strided(new_keys), *_strided(new_values)),
        *(keys.data_ptr(), values.data_ptr(), lengths.data_ptr(), part.data_ptr(), part_lse.data_ptr()),
        *(0 if sink is None else sink.data_ptr(), output.data_ptr(), torch.get_num_threads()),
    ]
    native().window_attend(instruction_set(), numbers, scaling)
    return output


def top_k(scores: Tensor, count: int) -> Tensor:
    """The selection of `sparse_decode` on given scores float32 [S]: int32, ascending."""
    scores = scores.contiguous()
    chosen = torch.empty(count + 1, dtype=torch.int32, device=_CPU)
    return chosen[
        : native().top_k(instruction_set(), scores.data_ptr(), scores.shape[0], count, chosen.data_ptr())
    ]
