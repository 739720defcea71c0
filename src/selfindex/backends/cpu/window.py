"""The compiled operators that end a decode step: attention to full-precision tokens, merged with the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...codec import PageFormat
from ...codec.rotation import HEAD_DIMS
from .loader import instruction_set, native
from .operators import attention_supported
from .tensors import FORMATS, Pools, adjacent, integers, is_paged_window, layout, paged, plain, strided

LARGEST_HEAD = max(HEAD_DIMS)


class _Step:
    """`struct Step`; keeps the tensors alive whose addresses it hands over."""

    __slots__ = ("_kept", "numbers", "output")

    def __init__(
        self,
        query: Tensor,
        new_keys: Tensor,
        new_values: Tensor,
        lengths: Tensor,
        part: tuple[Tensor, Tensor] | None,
        sink_logit: Tensor | None,
    ) -> None:
        (batch, query_heads, _, dim), heads = query.shape, new_keys.shape[1]
        query, new_keys, new_values = adjacent(query), adjacent(new_keys), adjacent(new_values)
        lengths = integers(lengths)
        parts = [] if part is None else [plain(x, torch.float32) for x in part]
        sink = None if sink_logit is None else plain(sink_logit.detach(), torch.float32)
        self.output = query.new_empty(batch, 1, query_heads, dim)
        self._kept = query, new_keys, new_values, lengths, parts, sink
        self.numbers = [
            *(FORMATS[query.dtype], batch, heads, query_heads // heads, dim),
            *(*strided(query), *strided(new_keys), *strided(new_values), lengths.data_ptr()),
            *([x.data_ptr() for x in parts] or (0, 0)),
            *(0 if sink is None else sink.data_ptr(), self.output.data_ptr(), torch.get_num_threads()),
        ]


def _served(query: Tensor, *others: Tensor) -> bool:
    """Whether all have a dtype in common that is served, and the step a shape that is."""
    dtype, shape = query.dtype, query.shape
    for x in (query, *others):
        if x.dtype is not dtype or not x.is_cpu:
            return False
    return dtype in FORMATS and shape[2] == 1 and shape[3] % 16 == 0 and shape[3] <= LARGEST_HEAD


def window_supported(
    query: Tensor, new_keys: Tensor, new_values: Tensor, keys: Tensor, values: Tensor, *rest: Any
) -> bool:
    """Whether `window_attend` serves these arguments."""
    return (
        _served(query, new_keys, new_values, keys, values)
        and keys.shape[1] == new_keys.shape[1]
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
    step = _Step(query, new_keys, new_values, lengths, (part, part_lse), sink_logit)
    numbers = [keys.data_ptr(), values.data_ptr(), keys.shape[2], *step.numbers]
    native().window_attend(instruction_set(), numbers, scaling)
    return step.output


def step_supported(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    index_pool: Tensor,
    payload_pool: Tensor,
    block_table: Tensor,
    page_counts: Tensor,
    budgets: Tensor | None,
    width: int,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    sink_logit: Tensor | None,
    constants: Tensor,
    scaling: float,
    format: str,
    recent: Tensor | None = None,
) -> bool:
    """Whether `step_attend` serves these arguments."""
    fmt = PageFormat.parse(format)
    return (
        window_supported(query, new_keys, new_values, keys, values)
        and (new_keys.shape[1], query.shape[3]) == (fmt.kv_heads, fmt.head_dim)
        and attention_supported(query, index_pool, payload_pool, format)
    )


def step_attend(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    index_pool: Tensor,
    payload_pool: Tensor,
    block_table: Tensor,
    page_counts: Tensor,
    budgets: Tensor | None,
    width: int,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    sink_logit: Tensor | None,
    constants: Tensor,
    scaling: float,
    format: str,
    recent: Tensor | None = None,
) -> Tensor:
    """See `reference.step_attend`.

    Raises:
        IndexError: a row's length is not below `room`, or a block not in the pools; nothing is written.
    """
    fmt = PageFormat.parse(format)
    step = _Step(query, new_keys, new_values, lengths, None, sink_logit)
    pools = Pools(index_pool, payload_pool, block_table, page_counts, constants, fmt)
    wanted = None if budgets is None else integers(budgets)
    numbers = [
        *(keys.data_ptr(), values.data_ptr(), keys.shape[2]),
        *(0 if wanted is None else wanted.data_ptr(), width, *pools.numbers, *step.numbers),
    ]
    native().step_attend(instruction_set(), layout(fmt), numbers, scaling)
    return step.output


def paged_window_supported(
    query: Tensor, new_keys: Tensor, new_values: Tensor, window: Tensor, *rest: Any
) -> bool:
    """Whether `paged_window_attend` serves these arguments."""
    served = _served(query, new_keys, new_values, window)
    return served and is_paged_window(window, new_keys.shape[1], query.shape[3])


def paged_window_attend(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    window: Tensor,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    sinks: int,
    part: Tensor,
    part_lse: Tensor,
    sink_logit: Tensor | None,
    scaling: float,
) -> Tensor:
    """See `reference.paged_window_attend`.

    Raises:
        IndexError: a position is not in the table, a block not in the window, or a row starts behind its
            new token; nothing is written.
    """
    step = _Step(query, new_keys, new_values, lengths, (part, part_lse), sink_logit)
    table, starts = integers(table), integers(starts)
    numbers = [*paged(window, table), starts.data_ptr(), sinks, *step.numbers]
    native().paged_window_attend(instruction_set(), numbers, scaling)
    return step.output
