"""Exact attention of chunks, packed as the engine packs tokens: one behind the other, whatever their rows."""

from __future__ import annotations

import sys
from typing import Protocol

import torch
from torch import Tensor

from ...attention.decoded import FEWEST_QUERIES
from ...attention.kernels import attend_plain
from ...backends.partial import join_parts

Part = tuple[Tensor, Tensor]
"""(output [n, Hq, d] in the query's dtype or float32, log-sum-exp float32 [Hq, n])."""


class Exact(Protocol):
    """Exact attention; query [n, Hq, d]; keys, values [n or L, H, d].

    Attributes:
        decoded_from: new tokens of a chunk from which the encoded ones before it are decoded for `span`.
    """

    decoded_from: int

    def packed(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: list[int],
        bounds: Tensor,
        out: Tensor | None = None,
    ) -> Part:
        """Of sequences of these lengths, each on itself and causal; bounds: int32, their sums from 0 on.

        The output is `out` where it is given.
        """
        ...

    def span(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        queries: Tensor,
        span: Tensor,
        causal: bool,
        out: Tensor | None = None,
    ) -> Part:
        """To keys span[0] up to span[1], int32 [2] on the device; queries: int32 [2], 0 and n.

        Causal: the last n keys are the queries' own. Without it there may be none.
        """
        ...


class PlainExact:
    """Through PyTorch's kernels, sequence by sequence; asks the device for bounds."""

    decoded_from = sys.maxsize  # pages are attended to as they are

    def __init__(self, scaling: float) -> None:
        self.scaling = scaling

    def packed(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: list[int],
        bounds: Tensor,
        out: Tensor | None = None,
    ) -> Part:
        each = zip(*(x.split(lengths) for x in (query, keys, values)), strict=True)
        outputs, sums = zip(*(self._attend(q, k, v, True) for q, k, v in each), strict=True)
        return _put(torch.cat(outputs), out), torch.cat(sums, 1)

    def span(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        queries: Tensor,
        span: Tensor,
        causal: bool,
        out: Tensor | None = None,
    ) -> Part:
        first, last = span.tolist()
        before = last - query.shape[0] if causal else last
        output, lse = self._attend(query, keys[first:before], values[first:before], False)
        if causal:
            own = self._attend(query, keys[before:last], values[before:last], True)
            joined = join_parts((output, lse.T), (own[0], own[1].T))
            output, lse = joined[0], joined[1].T
        return _put(output, out), lse

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Part:
        if not keys.shape[0]:
            none = query.new_full(query.shape[1::-1], -torch.inf, dtype=torch.float32)
            return torch.zeros_like(query), none
        q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (query, keys, values))
        output, lse = attend_plain(q, k, v, self.scaling, causal)
        return output[0].transpose(0, 1), lse[0]


def _put(output: Tensor, out: Tensor | None) -> Tensor:
    return output if out is None else out.copy_(output)


class FlashExact:
    """Through the engine's FlashAttention: all sequences at once, lengths stay on the device."""

    decoded_from = FEWEST_QUERIES

    def __init__(self, scaling: float, version: int) -> None:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        self._attend, self.scaling, self.version = flash_attn_varlen_func, scaling, version

    def packed(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: list[int],
        bounds: Tensor,
        out: Tensor | None = None,
    ) -> Part:
        longest = max(lengths)
        return self._run(query, keys, values, (bounds, bounds), (longest, longest), True, out)

    def span(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        queries: Tensor,
        span: Tensor,
        causal: bool,
        out: Tensor | None = None,
    ) -> Part:
        most = query.shape[0], keys.shape[0]
        output, lse = self._run(query, keys, values, (queries, span), most, causal, out)
        if not causal:  # kernels have their own idea of no keys
            lse = torch.where(span[1] > span[0], lse, -torch.inf)
        return output, lse

    def _run(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        bounds: tuple[Tensor, Tensor],
        most: tuple[int, int],
        causal: bool,
        out: Tensor | None,
    ) -> Part:
        """bounds, most: of the queries and the keys."""
        output, lse = self._attend(
            query,
            keys,
            values,
            max_seqlen_q=most[0],
            cu_seqlens_q=bounds[0],
            max_seqlen_k=most[1],
            cu_seqlens_k=bounds[1],
            softmax_scale=self.scaling,
            causal=causal,
            return_softmax_lse=True,
            out=out,
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
