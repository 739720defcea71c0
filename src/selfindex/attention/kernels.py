"""PyTorch's attention kernels with the log-sum-exp that `scaled_dot_product_attention` keeps to itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from ..backends.partial import attend_exact, join_parts

BLOCK = 512
"""Queries and keys at a time where no kernel serves: bounds the logits held at once."""

_WITH_SUM = {"attn_bias": None, "compute_log_sumexp": True}
KERNELS: dict[tuple[str, SDPBackend], tuple[str, dict[str, Any]]] = {
    ("cpu", SDPBackend.FLASH_ATTENTION): ("_scaled_dot_product_flash_attention_for_cpu", {}),
    ("cuda", SDPBackend.FLASH_ATTENTION): ("_scaled_dot_product_flash_attention", {}),
    ("cuda", SDPBackend.EFFICIENT_ATTENTION): ("_scaled_dot_product_efficient_attention", _WITH_SUM),
    ("cuda", SDPBackend.CUDNN_ATTENTION): ("_scaled_dot_product_cudnn_attention", _WITH_SUM),
}
"""The operator behind each choice of `scaled_dot_product_attention`, and its further arguments."""


def attend_plain(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention to all keys or, of as many queries as keys, causal; memory is linear in both.

    It runs the kernel that `scaled_dot_product_attention` would choose, `sdpa_kernel` included.

    Args:
        query: [B, Hq, T, d]; keys, values: [B, H, K, d], one dtype; T and K are at least 1.
        scaling: factor on q.k.
        causal: query t sees keys up to t; T is K.
    Returns:
        (output [B, Hq, T, d], log-sum-exp float32 [B, Hq, T]).
    """
    groups = query.shape[1] // keys.shape[1]
    kernel = _kernel(query, keys, values, scaling, causal=causal)
    if kernel is not None:
        return kernel(query)
    if groups > 1:
        # Not every kernel knows groups of query heads: one query head of each KV head at a time.
        heads = query.unflatten(1, (-1, groups)).unbind(2)
        kernel = _kernel(heads[0], keys, values, scaling, causal=causal)
        if kernel is not None:
            parts = [kernel(head) for head in heads]
            output, lse = (torch.stack(x, 2).flatten(1, 2) for x in zip(*parts, strict=True))
            return output, lse
    return attend_blocks(query, keys, values, scaling, causal)


def has_kernel(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> bool:
    """Whether `attend_plain`, not causal, of tensors like these runs a kernel."""
    heads = query[:, : keys.shape[1]]
    return any(_kernel(each, keys, values, scaling) is not None for each in (query, heads))


def attend_masked(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention of a few queries under a mask.

    Args:
        query: [B, Hq, T, d]; keys, values: [B, H, K, d].
        bias: [B or 1, 1, T, K] in the query's dtype, 0 where a query sees a key and -inf elsewhere;
            every query sees a key.
        scaling: factor on q.k.
    Returns:
        (output [B, Hq, T, d], log-sum-exp float32 [B, Hq, T]).
    """
    if query.device.type == "cpu":  # the kernels of GPUs are particular about masks
        kernel = _kernel(query, keys, values, scaling, bias=bias)
        if kernel is not None:
            return kernel(query)
    return attend_exact(query, keys, values, bias[:, :, None] == 0, scaling)


def attend_blocks(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """`attend_plain` from products of float32 blocks, for where there is no kernel."""
    parts = []
    diagonal = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=query.device).tril()
    for t in range(0, query.shape[2], BLOCK):
        q = query[:, :, t : t + BLOCK]
        joined = None
        for s in range(0, t + 1 if causal else keys.shape[2], BLOCK):
            k, v = keys[:, :, s : s + BLOCK], values[:, :, s : s + BLOCK]
            visible = diagonal if causal and s == t else torch.ones_like(diagonal[:1])
            part = attend_exact(q, k, v, visible[: q.shape[2], : k.shape[2]][None, None, None], scaling)
            joined = part if joined is None else join_parts(joined, part)
        assert joined is not None
        parts.append(joined)
    output, lse = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return output, lse


def _kernel(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    causal: bool = False,
    bias: Tensor | None = None,
) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """What `scaled_dot_product_attention` would run for these and like queries; None if in products.

    The operators and the choice among them are PyTorch's own, not a public interface: without one
    of them attention goes on in blocks.
    """
    choose = getattr(torch, "_fused_sdp_choice", None)
    if choose is None:
        return None
    grouped = query.shape[1] != keys.shape[1]
    try:
        choice = choose(query, keys, values, bias, 0.0, causal, scale=scaling, enable_gqa=grouped)
    except RuntimeError:  # `sdpa_kernel` allows none that takes these
        return None
    name, further = KERNELS.get((query.device.type, SDPBackend(choice)), ("", {}))
    operator = getattr(torch.ops.aten, name, None) if name else None
    if operator is None:
        return None
    if bias is not None:
        further = further | {"attn_mask": bias}

    def run(query: Tensor) -> tuple[Tensor, Tensor]:
        output, lse = operator(query, keys, values, is_causal=causal, scale=scaling, **further)[:2]
        return output, lse.flatten(2)[..., : query.shape[2]]  # some pad it, some add a dimension

    return run
