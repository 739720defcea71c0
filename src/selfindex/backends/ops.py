"""The operators of the cache as PyTorch custom operators: one signature, several backends.

The reference implementation serves every device; a faster backend registers itself for its device
with `register_kernel`. Shapes are those of `reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..codec import PageFormat
from . import cpu, cuda, reference

Function = TypeVar("Function", bound=Callable[..., Any])

_library = torch.library.Library("selfindex", "DEF")


def _operator(fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[[Function], Function]:
    """Make an operator of a function that serves every device.

    `torch.library.custom_op` would do the same with checks in Python around every call.

    Args:
        fake: shapes and dtypes of the results, for torch.compile.
        mutates: names of the tensors that are written to.
    """

    def define(function: Function) -> Function:
        name = function.__name__
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"selfindex::{name}", fake, lib=_library)
        return cast(Function, getattr(torch.ops.selfindex, name).default)

    return define


def register_kernel(name: str, device: str, function: Callable[..., Any]) -> None:
    """Serve an operator on a device type ("cpu", "cuda") with another function of the same arguments."""
    _library.impl(name, function, device.upper())


def _fake_encode(
    keys: Tensor, values: Tensor, counts: Tensor, constants: Tensor, format: str
) -> tuple[Tensor, Tensor]:
    fmt, n = PageFormat.parse(format), keys.shape[0]
    planes = [keys.new_empty((n, size), dtype=torch.uint8) for size in (fmt.index_bytes, fmt.payload_bytes)]
    return planes[0], planes[1]


def _fake_score(query: Tensor, index_pool: Tensor, block_table: Tensor, *rest: Any) -> Tensor:
    slots = block_table.shape[1] * PageFormat.parse(rest[-1]).page_size
    return query.new_empty((*query.shape[:3], slots), dtype=torch.float32)


def _fake_select(scores: Tensor, budgets: Tensor, width: int) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], width), dtype=torch.int32)


def _fake_part(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    output = query.new_empty(query.shape, dtype=torch.float32)
    return output, query.new_empty(query.shape[:3], dtype=torch.float32)


def _fake_step(query: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], query.shape[3])


@_operator(_fake_encode)
def encode(
    keys: Tensor, values: Tensor, counts: Tensor, constants: Tensor, format: str
) -> tuple[Tensor, Tensor]:
    """Encode raw pages [n, H, P, d] into index and payload planes, uint8 [n, bytes] each."""
    return reference.encode(keys, values, counts, constants, format)


@_operator(_fake_score)
def score(
    query: Tensor,
    index_pool: Tensor,
    block_table: Tensor,
    page_counts: Tensor,
    constants: Tensor,
    scaling: float,
    format: str,
) -> Tensor:
    """Estimate logits from the index alone: float32 [B, Hq, T, S], -inf in empty slots."""
    return reference.score(query, index_pool, block_table, page_counts, constants, scaling, format)


@_operator(_fake_select)
def select(scores: Tensor, budgets: Tensor, width: int) -> Tensor:
    """Exact top-k with ties to the lower slot: int32 [B, H, T, width], -1 past a row's budget."""
    return reference.select(scores, budgets, width)


@_operator(_fake_part)
def sparse_attend(
    query: Tensor,
    index_pool: Tensor,
    payload_pool: Tensor,
    block_table: Tensor,
    slots: Tensor,
    constants: Tensor,
    scaling: float,
    format: str,
) -> tuple[Tensor, Tensor]:
    """Attend to selected slots [B, H, T, K]: (output [B, Hq, T, d], log-sum-exp), float32."""
    return reference.sparse_attend(
        query, index_pool, payload_pool, block_table, slots, constants, scaling, format
    )


@_operator(_fake_part)
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
    """Attend to all encoded tokens: (output [B, Hq, T, d], log-sum-exp [B, Hq, T]), float32."""
    return reference.dense_attend(
        query, index_pool, payload_pool, block_table, page_counts, constants, scaling, format
    )


@_operator(_fake_part)
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
) -> tuple[Tensor, Tensor]:
    """Score, select and attend in one: (output [B, Hq, T, d], log-sum-exp [B, Hq, T]), float32."""
    return reference.sparse_decode(
        query,
        index_pool,
        payload_pool,
        block_table,
        page_counts,
        budgets,
        width,
        constants,
        scaling,
        format,
    )


@_operator(_fake_step, mutates=("keys", "values"))
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
    """Finish a decode step: store the token, attend to the window, merge; [B, 1, Hq, d]."""
    return reference.window_attend(
        query, new_keys, new_values, keys, values, lengths, part, part_lse, sink_logit, scaling
    )


cpu.register(register_kernel)
cuda.register(register_kernel)
