"""`merge_into` on a GPU: one launch reads the parts and writes their union."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .decode import HEAD_DIMS
from .loader import INPUT_TYPES, load
from .pages import whole_vectors

THREADS, MOST_PARTS = 256, 4
"""As in join.cuh."""
_STRIDES = "row", "head", "token"


class Part(ctypes.Structure):
    """`struct Part` of join.cuh."""

    _fields_ = (
        ("out", ctypes.c_void_p),
        *((f"out_{what}", ctypes.c_longlong) for what in _STRIDES),
        ("lse", ctypes.c_void_p),
        *((f"lse_{what}", ctypes.c_longlong) for what in _STRIDES),
        ("whole", ctypes.c_int),
    )


class JoinParams(ctypes.Structure):
    """`struct JoinParams` of join.cuh."""

    _fields_ = (
        ("part", Part * MOST_PARTS),
        *((name, ctypes.c_void_p) for name in ("sink", "out")),
        *((f"out_{what}", ctypes.c_longlong) for what in _STRIDES),
        ("lse", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("parts", "heads", "queries", "whole")),
        ("threads", ctypes.c_uint),
    )


def supported(outputs: list[Tensor], sums: list[Tensor], sink_logit: Tensor | None, out: Tensor) -> bool:
    """Whether the kernel serves this call; the reference operator serves the others."""
    dtypes = {x.dtype for x in (*outputs, out)} - {torch.float32}
    return (
        1 <= len(outputs) <= MOST_PARTS
        and len(dtypes) <= 1
        and dtypes <= set(INPUT_TYPES)
        and out.shape[3] in HEAD_DIMS
        and 0 < out.numel() < 1 << 34
        and all(map(whole_vectors, (*outputs, out)))
        and all(x.dtype == torch.float32 for x in sums)
    )


def merge_into(outputs: list[Tensor], sums: list[Tensor], sink_logit: Tensor | None, out: Tensor) -> Tensor:
    """The operator `selfindex::merge_into` for a `supported` call.

    Raises:
        KernelsUnavailable: cuda-core is missing, or the GPU is too old.
    """
    device, (batch, heads, queries, dim) = out.device, out.shape
    dtype = next((x.dtype for x in (*outputs, out) if x.dtype != torch.float32), torch.float32)
    kernel = load("join", device, dim, 1, 2, dtype)["join"]
    total = torch.empty((batch, queries, heads), dtype=torch.float32, device=device)
    sink = None if sink_logit is None else sink_logit.to(device, torch.float32).contiguous()
    parts = (
        Part(x.data_ptr(), *x.stride()[:3], lse.data_ptr(), *lse.stride(), x.dtype == torch.float32)
        for x, lse in zip(outputs, sums, strict=True)
    )
    threads = batch * heads * queries * dim // 8
    params = JoinParams(
        (Part * MOST_PARTS)(*parts),
        None if sink is None else sink.data_ptr(),
        out.data_ptr(),
        *out.stride()[:3],
        total.data_ptr(),
        len(outputs),
        heads,
        queries,
        out.dtype == torch.float32,
        threads,
    )
    with torch.cuda.device(device):
        kernel((-(-threads // THREADS), 1), THREADS, [params])
    return total.transpose(1, 2)
