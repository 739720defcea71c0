"""`block_attend` on a GPU: PyTorch's FlexAttention, which skips the blocks that a mask leaves out.

The mask is made of the selection itself, a KV head of a row being a batch of its own, whose query heads
share what is selected. Lengths are dynamic: one compilation serves all of a model's prompts, another one its
later chunks, which have fewer queries than keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config, maybe_mark_dynamic
from torch._dynamo.exc import TorchDynamoException
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    FlexKernelOptions,
    flex_attention,
)

from ..operators.block_attend import laid_out, whole_blocks
from ..operators.select_blocks import BLOCK, blocks_of
from .launch import KernelsUnavailable

OPTIONS: FlexKernelOptions = {"ROWS_GUARANTEED_SAFE": True}
"""Of the kernel: every query sees itself."""

VARIANTS = 64
"""Compilations at most: one for each head_dim, dtype, size of a group of heads, and layout of tensors."""

_refused: dict[tuple[torch.dtype, int], str] = {}
"""Why there is no kernel for a dtype and head_dim, so that it is tried once."""


def supported(query: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> bool:
    """Whether FlexAttention serves this call; the reference operator serves the others."""
    return query.dtype is keys.dtype is values.dtype


def block_attend(
    query: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, counts: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The operator `selfindex::block_attend` for a `supported` call.

    Raises:
        KernelsUnavailable: torch.compile cannot compile this here.
    """
    given, kind = query, (query.dtype, query.shape[3])
    if kind in _refused:
        raise KernelsUnavailable(_refused[kind])
    (batch, heads), dim = keys.shape[:2], query.shape[3]
    # The scale is a constant of the kernel. Another one than the usual would make another compilation for
    # every model: queries take it over instead.
    if scaling != dim**-0.5:
        query = query * (scaling * dim**0.5)
    _, _, before = blocks_of(query, keys)
    # With whole blocks the kernel checks no bounds.
    query, keys, values = whole_blocks(query, keys, values)
    q = query.unflatten(1, (heads, -1)).flatten(0, 1)  # [B H, G, n BLOCK, d]
    k, v = (x.flatten(0, 1)[:, None] for x in (keys, values))
    inputs = [x.unflatten(2, (-1, BLOCK)) for x in (q, k, v)]
    inputs += [x.flatten(0, 1)[:, None] for x in (blocks, counts)]
    for x in inputs:
        maybe_mark_dynamic(x, 0)
        maybe_mark_dynamic(x, 2)
    maybe_mark_dynamic(inputs[3], 3)
    try:
        with torch.cuda.device(query.device), config.patch(recompile_limit=VARIANTS):
            output, lse = _compiled()(*inputs)
    except _failures() as error:
        first = next((line for line in str(error).splitlines() if line), type(error).__name__)
        _refused[kind] = f"torch.compile cannot compile FlexAttention for {kind[0]}, head_dim {dim}: {first}"
        raise KernelsUnavailable(_refused[kind]) from error
    shape, asked = (batch, -1, query.shape[2]), slice(before, before + given.shape[2])
    output = output.reshape(*shape, dim)[:, :, asked]
    return laid_out(output, given), lse.view(shape)[:, :, asked].contiguous()


def attend(
    query: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """`block_attend` of R batches with a KV head each, to be compiled; log-sum-exp is [R, G, n BLOCK].

    Args:
        query: [R, G, n, BLOCK, d], in the last n blocks of keys; keys, values: [R, 1, m, BLOCK, d]: sizes
            say that blocks are whole.
        blocks: int32 [R, 1, n, W]; counts: int32 [R, 1, n].
    """
    q, k, v = (x.flatten(2, 3) for x in (query, keys, values))
    # The last block kept is the queries' own: the only one that needs a mask. Both lists have the same
    # strides, which PyTorch 2.11 takes for granted.
    own = torch.zeros_like(blocks)
    last = keys.shape[2]
    own[..., 0] = torch.arange(last - blocks.shape[2], last, dtype=torch.int32, device=blocks.device)
    mask = BlockMask.from_kv_blocks(
        torch.ones_like(counts),
        own,
        counts - 1,
        blocks,
        BLOCK_SIZE=BLOCK,
        mask_mod=_causal,
        seq_lengths=(q.shape[2], k.shape[2]),
        compute_q_blocks=False,
    )
    output, more = flex_attention(
        q,
        k,
        v,
        block_mask=mask,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
        kernel_options=OPTIONS,
    )
    assert more.lse is not None
    return output, more.lse


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    # Of the queries' own block of keys, wherever it is: both begin at the same place.
    return query % BLOCK >= key % BLOCK


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(attend, fullgraph=True)


def _failures() -> tuple[type[Exception], ...]:
    """What is raised where there is no compiler, or a kernel does not fit the GPU."""
    try:
        from triton.runtime.errors import OutOfResources
    except ImportError:  # said by torch.compile
        return TorchDynamoException, ImportError
    return TorchDynamoException, ImportError, OutOfResources
