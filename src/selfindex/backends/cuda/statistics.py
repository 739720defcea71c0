"""`prompt_statistics` on a GPU: sums of sub-vectors by code in one launch a prompt, the rest by PyTorch."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...codec.paper import statistics_from_sums
from .decode import HEAD_DIMS
from .loader import INPUT_TYPES, load

WARPS, BLOCKS = 4, 5
"""Warps of a block, as in statistics.cuh, and blocks that a multiprocessor's shared memory takes."""
LEAST_TOKENS = 256
"""Tokens of a block, at least: fewer cost more than they save."""


class StatisticsParams(ctypes.Structure):
    """`struct StatisticsParams` of statistics.cuh."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("key_head", ctypes.c_longlong),
        ("key_token", ctypes.c_longlong),
        ("mean", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("heads", "tokens", "share")),
    )


def supported(keys: Tensor) -> bool:
    """Whether the kernel serves this call; the reference operator serves the others."""
    return (
        keys.shape[-1] in HEAD_DIMS
        and keys.dtype in INPUT_TYPES
        and keys.numel() > 0
        and keys.shape[-2] < 1 << 31
        # Vectors of four channels.
        and keys.stride(-1) == 1
        and all(stride % 4 == 0 for stride in keys.stride()[:-1])
        and keys.data_ptr() % 16 == 0
    )


def prompt_statistics(keys: Tensor) -> Tensor:
    """The operator `selfindex::prompt_statistics` for a `supported` call.

    Raises:
        KernelsUnavailable: cuda-core is missing, or the GPU is too old.
    """
    heads, tokens, dim = keys.shape[-3:]
    prompts = keys if keys.ndim == 4 else keys[None]
    kernel = load("statistics", keys.device, dim, 1, 2, keys.dtype)["code_sums"]
    low, high = (extreme.float() for extreme in (prompts.amin(2), prompts.amax(2)))
    halves = -(-dim // 128)  # a block takes up to 32 groups of four channels
    sms = torch.cuda.get_device_properties(keys.device).multi_processor_count
    splits = max(1, min(sms * BLOCKS // (heads * halves), tokens // LEAST_TOKENS))
    share = -(-tokens // splits)
    means, totals = [], []
    for own in prompts:
        # The order in which PyTorch sums depends on shapes: a prompt is summed as if it were alone.
        mean = own.mean(1, dtype=torch.float32)
        sums = mean.new_empty(splits, heads, dim // 4, 16, 5)
        params = StatisticsParams(
            own.data_ptr(), *own.stride()[:2], mean.data_ptr(), sums.data_ptr(), heads, tokens, share
        )
        with torch.cuda.device(keys.device):
            kernel((splits, heads * halves), 32 * WARPS, [params])
        means.append(mean)
        totals.append(sums.sum(0))
    mean = torch.stack(means)
    found = statistics_from_sums(mean, torch.maximum(high - mean, mean - low), torch.stack(totals), tokens)
    return found.view(*keys.shape[:-2], 18 * dim)
