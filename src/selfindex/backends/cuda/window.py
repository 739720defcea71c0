"""`window_attend` on a GPU: one launch, a block per KV head."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .decode import HEAD_DIMS, LOG2_E, MAX_GROUPS
from .loader import INPUT_TYPES, load

MAX_LOGITS = 64 * 1024
"""Bytes of shared memory for a block's logits; longer windows take the reference operator."""


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


def supported(query: Tensor, new_keys: Tensor, new_values: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernel serves this call; the reference operator serves the others."""
    groups = query.shape[1] // keys.shape[1]
    return (
        query.shape[3] in HEAD_DIMS
        and groups <= MAX_GROUPS
        and query.dtype in INPUT_TYPES
        and all(x.dtype == query.dtype for x in (new_keys, new_values, keys, values))
        and all(x.stride(3) == 1 for x in (query, new_keys, new_values))
        and keys.is_contiguous()
        and values.is_contiguous()
        and 4 * groups * keys.shape[2] <= MAX_LOGITS
        # Vectors of four channels.
        and all(s % 4 == 0 for s in query.stride()[:2])
        and query.data_ptr() % 16 == 0
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
    batch, query_heads, _, dim = query.shape
    heads, room, device = keys.shape[1], keys.shape[2], query.device
    properties = torch.cuda.get_device_properties(device)
    threads = 512 if batch * heads <= properties.multi_processor_count else 256
    kernel = load("window", device, dim, query_heads // heads, 2, query.dtype)[f"window{threads}"]
    part, part_lse = part.contiguous(), part_lse.contiguous()
    lengths = lengths.to(device, torch.int32)
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
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        lengths=lengths.data_ptr(),
        part=part.data_ptr(),
        part_lse=part_lse.data_ptr(),
        sink=None if sink is None else sink.data_ptr(),
        out=output.data_ptr(),
        heads=heads,
        room=room,
        scale=scaling * LOG2_E,
    )
    groups, turns = query_heads // heads, threads // (dim // 4)
    shared = 4 * (-(-groups * room // 4) * 4 + turns * min(groups, 4) * dim)
    with torch.cuda.device(device):
        kernel((batch * heads, 1), threads, [params], shared, overlap=properties.major >= 9)
    return output
