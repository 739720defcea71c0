"""`window_attend` and `paged_window_attend` on a GPU: one launch, a block per KV head."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .decode import HEAD_DIMS, LOG2_E, MAX_GROUPS
from .loader import INPUT_TYPES, load

MAX_LOGITS = 64 * 1024
"""Bytes of shared memory for a block's logits; longer windows take the reference operator."""
PART = 512
"""Tokens of a paged window that a block takes at a time, an even number."""


class WindowParams(ctypes.Structure):
    """`struct WindowParams` of window.cuh."""

    _pointer, _long = ctypes.c_void_p, ctypes.c_longlong
    _fields_ = (
        ("query", _pointer),
        ("query_row", _long),
        ("query_head", _long),
        ("new_keys", _pointer),
        ("new_values", _pointer),
        *((name, ctypes.c_longlong) for name in ("key_row", "key_head", "value_row", "value_head")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "lengths", "part", "part_lse")),
        ("sink", _pointer),
        ("out", _pointer),
        ("heads", ctypes.c_int),
        ("room", ctypes.c_int),
        ("scale", ctypes.c_float),
    )


class PagedWindow(ctypes.Structure):
    """`struct PagedWindow` of window.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("table", "starts")),
        *((name, ctypes.c_longlong) for name in ("block_stride", "head_stride")),
        *((name, ctypes.c_int) for name in ("columns", "block", "sinks")),
    )


def _query_supported(query: Tensor, new_keys: Tensor, new_values: Tensor, heads: int) -> bool:
    return (
        query.shape[3] in HEAD_DIMS
        and query.shape[1] // heads <= MAX_GROUPS
        and query.dtype in INPUT_TYPES
        and all(x.dtype == query.dtype for x in (new_keys, new_values))
        and all(x.stride(3) == 1 for x in (query, new_keys, new_values))
        # Vectors of four channels.
        and all(s % 4 == 0 for s in query.stride()[:2])
        and query.data_ptr() % 16 == 0
    )


def supported(query: Tensor, new_keys: Tensor, new_values: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernel serves this call; the reference operator serves the others."""
    return (
        _query_supported(query, new_keys, new_values, keys.shape[1])
        and all(x.dtype == query.dtype and x.is_contiguous() for x in (keys, values))
        and 4 * (query.shape[1] // keys.shape[1]) * keys.shape[2] <= MAX_LOGITS
    )


def paged_supported(query: Tensor, new_keys: Tensor, new_values: Tensor, window: Tensor) -> bool:
    """Whether the kernel serves this call of `paged_window_attend`."""
    return (
        _query_supported(query, new_keys, new_values, window.shape[1])
        and window.dtype == query.dtype
        and window.stride()[2:] == (window.shape[3], 1)
        and all(s % 4 == 0 for s in window.stride()[:2])
        and window.data_ptr() % 16 == 0
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
    """The operator `selfindex::window_attend` for a `supported` call.

    Raises:
        KernelsUnavailable: cuda-core is missing, or the GPU is too old.
    """
    held = keys.data_ptr(), values.data_ptr()
    rest = lengths, part, part_lse, sink_logit, scaling
    return _launch(query, new_keys, new_values, held, keys.shape[1], keys.shape[2], *rest)


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
    """The operator `selfindex::paged_window_attend` for a call that `paged_supported` allows.

    Raises:
        KernelsUnavailable: as `window_attend`.
    """
    table, starts = table.int(), starts.to(table.device, torch.int32).contiguous()
    table = table if table.stride(1) == 1 else table.contiguous()
    paged = PagedWindow(
        table.data_ptr(),
        starts.data_ptr(),
        *window.stride()[:2],
        table.stride(0),
        window.shape[2],
        sinks,
    )
    held = window.data_ptr(), window.data_ptr() + query.shape[3] * window.element_size()
    rest = lengths, part, part_lse, sink_logit, scaling
    return _launch(query, new_keys, new_values, held, window.shape[1], PART, *rest, paged)


def _launch(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    held: tuple[int, int],
    heads: int,
    room: int,
    lengths: Tensor,
    part: Tensor,
    part_lse: Tensor,
    sink_logit: Tensor | None,
    scaling: float,
    paged: PagedWindow | None = None,
) -> Tensor:
    """Both operators; `held` are addresses of keys and values, `room` tokens are taken at a time."""
    (batch, query_heads, _, dim), device = query.shape, query.device
    groups = query_heads // heads
    properties = torch.cuda.get_device_properties(device)
    threads = 512 if batch * heads <= properties.multi_processor_count else 256
    part, part_lse = part.contiguous(), part_lse.contiguous()
    lengths = lengths.to(device, torch.int32).contiguous()
    sink = None if sink_logit is None else sink_logit.float().contiguous()
    output = query.new_empty(batch, 1, query_heads, dim)
    params = WindowParams(
        query=query.data_ptr(),
        query_row=query.stride(0),
        query_head=query.stride(1),
        new_keys=new_keys.data_ptr(),
        new_values=new_values.data_ptr(),
        key_row=new_keys.stride(0),
        key_head=new_keys.stride(1),
        value_row=new_values.stride(0),
        value_head=new_values.stride(1),
        keys=held[0],
        values=held[1],
        lengths=lengths.data_ptr(),
        part=part.data_ptr(),
        part_lse=part_lse.data_ptr(),
        sink=None if sink is None else sink.data_ptr(),
        out=output.data_ptr(),
        heads=heads,
        room=room,
        scale=scaling * LOG2_E,
    )
    turns = threads // (dim // 4)
    shared = 4 * (-(-groups * room // 4) * 4 + turns * min(groups, 4) * dim)
    name = f"window{threads}"
    arguments: list[Any] = [params]
    if paged is not None:
        shared += 8 * room + 4 * groups * dim  # places of its tokens, sums of the parts before
        name, arguments = f"window_paged{threads}", [params, paged]
    kernel = load("window", device, dim, groups, 2, query.dtype)[name]
    with torch.cuda.device(device):
        kernel((batch * heads, 1), threads, arguments, shared, overlap=properties.major >= 9)
    return output
