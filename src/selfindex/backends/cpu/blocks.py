"""`block_attend` on a CPU: PyTorch's flash attention over the gathered blocks of each block of queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operators.block_attend import laid_out, whole_blocks
from ..operators.select_blocks import BLOCK, blocks_of
from ..partial import join_parts
from .loader import NativeUnavailable, check_enabled

GATHERED = 1 << 22
"""Numbers of the keys, or values, that are gathered at a time."""

OPERATOR = "_scaled_dot_product_flash_attention_for_cpu"
"""The kernel behind `scaled_dot_product_attention`, which keeps the log-sum-exp to itself. Not a public
interface: without it the reference operator runs."""


def supported(query: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> bool:
    """Whether the kernel serves this call; the reference operator serves the others."""
    alike = query.dtype is keys.dtype is values.dtype and query.is_cpu
    return alike and all(x.stride(3) == 1 for x in (query, keys, values))


def block_attend(
    query: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, counts: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The operator `selfindex::block_attend` for a `supported` call.

    Raises:
        NativeUnavailable: this version of PyTorch has no such kernel, or the user wants none.
    """
    check_enabled()
    attend = getattr(torch.ops.aten, OPERATOR, None)
    if attend is None:
        raise NativeUnavailable(f"this version of PyTorch has no {OPERATOR}")
    given, heads = query, keys.shape[1]
    _, start, before = blocks_of(query, keys)
    query, keys, values = (x.unflatten(2, (-1, BLOCK)) for x in whole_blocks(query, keys, values))
    grouped = query.unflatten(1, (heads, -1))  # [B, H, G, n, BLOCK, d]
    own = torch.empty_like(grouped), grouped.new_empty(grouped.shape[:5], dtype=torch.float32)
    # The queries' own blocks, the only ones with a mask: all of them at once for each head of a group.
    for b, row in enumerate(grouped):
        for g, q in enumerate(row.unbind(1)):
            part = attend(q, keys[b, :, start:], values[b, :, start:], is_causal=True, scale=scaling)
            own[0][b, :, g], own[1][b, :, g] = part[:2]
    others = torch.zeros_like(own[0]), torch.full_like(own[1], -torch.inf)
    # Blocks of queries that read as many others are a batch.
    for count in counts.unique().tolist():
        if count == 1:
            continue
        alike = (counts == count).nonzero()
        for pairs in alike.split(max(1, GATHERED // (count * BLOCK * keys.shape[4]))):
            b, h, i = pairs.unbind(1)
            read = b[:, None], h[:, None], blocks[b, h, i, : count - 1].long()
            k, v = (x[read].flatten(1, 2)[:, None] for x in (keys, values))
            # Queries of a group are rows of one head: they share what they read.
            q = grouped[b, h, :, i].flatten(1, 2)[:, None]
            part = attend(q, k, v, scale=scaling)
            for whole, found in zip(others, part[:2], strict=True):
                whole[b, h, :, i] = found[:, 0].unflatten(1, (-1, BLOCK))
    output, lse = join_parts(own, others)
    shape, asked = (query.shape[0], query.shape[1], -1), slice(before, before + given.shape[2])
    output = output.to(query.dtype).view(*shape, given.shape[3])[:, :, asked]
    return laid_out(output, given), lse.view(shape)[:, :, asked].contiguous()
