"""Exact attention of chunks, packed as the engine packs tokens: one behind the other, whatever their rows."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ...attention.kernels import attend_plain

Part = tuple[Tensor, Tensor]
"""(output [n, Hq, d] in the query's dtype or float32, log-sum-exp float32 [Hq, n])."""


class Exact(Protocol):
    """Exact attention; query [n, Hq, d]; keys, values [n or L, H, d]."""

    def causal(self, query: Tensor, keys: Tensor, values: Tensor, lengths: list[int]) -> Part:
        """Of sequences of these lengths, each on itself."""
        ...

    def held(self, query: Tensor, keys: Tensor, values: Tensor, used: Tensor) -> Part:
        """To the first `used` (int32 []) of L keys; none of them is as good as any."""
        ...


class PlainExact:
    """Through PyTorch's kernels, sequence by sequence; asks the device for `used`."""

    def __init__(self, scaling: float) -> None:
        self.scaling = scaling

    def causal(self, query: Tensor, keys: Tensor, values: Tensor, lengths: list[int]) -> Part:
        parts = []
        for q, k, v in zip(*(x.split(lengths) for x in (query, keys, values)), strict=True):
            q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
            parts.append(attend_plain(q, k, v, self.scaling, causal=True))
        outputs, sums = zip(*parts, strict=True)
        return torch.cat([x[0].transpose(0, 1) for x in outputs]), torch.cat([x[0] for x in sums], 1)

    def held(self, query: Tensor, keys: Tensor, values: Tensor, used: Tensor) -> Part:
        count = int(used)
        if not count:
            return torch.zeros_like(query), query.new_full(
                query.shape[1::-1], -torch.inf, dtype=torch.float32
            )
        q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (query, keys[:count], values[:count]))
        output, lse = attend_plain(q, k, v, self.scaling, causal=False)
        return output[0].transpose(0, 1), lse[0]


class FlashExact:
    """Through the engine's FlashAttention: all sequences at once, lengths stay on the device."""

    def __init__(self, scaling: float, version: int) -> None:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        self._attend, self.scaling, self.version = flash_attn_varlen_func, scaling, version

    def causal(self, query: Tensor, keys: Tensor, values: Tensor, lengths: list[int]) -> Part:
        places = [0]
        for length in lengths:
            places.append(places[-1] + length)
        bounds = torch.tensor(places, dtype=torch.int32, pin_memory=True).to(query.device, non_blocking=True)
        return self._run(query, keys, values, bounds, bounds, max(lengths), max(lengths), True)

    def held(self, query: Tensor, keys: Tensor, values: Tensor, used: Tensor) -> Part:
        queries = torch.full((2,), query.shape[0], dtype=torch.int32, device=query.device)
        queries[0] = 0
        bounds = torch.stack((torch.zeros_like(used), used))
        output, lse = self._run(query, keys, values, queries, bounds, query.shape[0], keys.shape[0], False)
        return output, torch.where(used > 0, lse, -torch.inf)  # kernels have their own idea of no keys

    def _run(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        query_bounds: Tensor,
        key_bounds: Tensor,
        most_queries: int,
        most_keys: int,
        causal: bool,
    ) -> Part:
        output, lse = self._attend(
            query,
            keys,
            values,
            max_seqlen_q=most_queries,
            cu_seqlens_q=query_bounds,
            max_seqlen_k=most_keys,
            cu_seqlens_k=key_bounds,
            softmax_scale=self.scaling,
            causal=causal,
            return_softmax_lse=True,
            fa_version=self.version,
        )
        return output, lse


def exact_attention(scaling: float, head_dim: int, dtype: torch.dtype, device: torch.device) -> Exact:
    """What serves a device and dtype best."""
    if device.type == "cuda" and dtype != torch.float32:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        version = get_flash_attn_version(head_size=head_dim)
        if version is not None:
            return FlashExact(scaling, version)
    return PlainExact(scaling)
