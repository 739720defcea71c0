"""The compiled operators that end a decode step: attention to full-precision tokens, merged with the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...codec.rotation import HEAD_DIMS
from .loader import instruction_set, native
from .tensors import CPU, FORMATS, adjacent, integers, is_paged_window, paged, strided


class _Step:
    """`struct Step`; keeps the tensors alive whose addresses it hands over."""

    def __init__(
        self,
        query: Tensor,
        new_keys: Tensor,
        new_values: Tensor,
        lengths: Tensor,
        part: Tensor,
        part_lse: Tensor,
        sink_logit: Tensor | None,
    ) -> None:
        (batch, query_heads, _, dim), heads = query.shape, new_keys.shape[1]
        new = [adjacent(x) for x in (query, new_keys, new_values)]
        lengths = integers(lengths)
        part, part_lse = part.to(torch.float32).contiguous(), part_lse.to(torch.float32).contiguous()
        sink = None if sink_logit is None else sink_logit.detach().to(torch.float32).contiguous()
        self.output = query.new_empty(batch, 1, query_heads, dim)
        self._kept = new, lengths, part, part_lse, sink
        self.numbers = [
            *(FORMATS[query.dtype], batch, heads, query_heads // heads, dim),
            *(number for x in new for number in strided(x)),
            *(lengths.data_ptr(), part.data_ptr(), part_lse.data_ptr()),
            *(0 if sink is None else sink.data_ptr(), self.output.data_ptr(), torch.get_num_threads()),
        ]


def _served(query: Tensor, *others: Tensor) -> bool:
    """Whether all have a dtype in common that is served, and a head_dim that is."""
    return (
        query.dtype in FORMATS
        and all(x.dtype == query.dtype and x.device == CPU for x in (query, *others))
        and query.shape[3] % 16 == 0
        and query.shape[3] <= max(HEAD_DIMS)
    )


def window_supported(
    query: Tensor, new_keys: Tensor, new_values: Tensor, keys: Tensor, values: Tensor, *rest: Any
) -> bool:
    """Whether `window_attend` serves these arguments."""
    return (
        _served(query, new_keys, new_values, keys, values) and keys.is_contiguous() and values.is_contiguous()
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
    step = _Step(query, new_keys, new_values, lengths, part, part_lse, sink_logit)
    numbers = [keys.data_ptr(), values.data_ptr(), keys.shape[2], *step.numbers]
    native().window_attend(instruction_set(), numbers, scaling)
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
    step = _Step(query, new_keys, new_values, lengths, part, part_lse, sink_logit)
    table, starts = integers(table), integers(starts)
    numbers = [*paged(window, table), starts.data_ptr(), sinks, *step.numbers]
    native().paged_window_attend(instruction_set(), numbers, scaling)
    return step.output
