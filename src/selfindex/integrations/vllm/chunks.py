"""Chunks of prompts: encoding the pages that they fill, and attention to all that came before them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...attention.attend import BLOCK
from ...backends import ops
from ...backends.partial import merge_parts
from .exact import Exact
from .geometry import Geometry
from .metadata import Chunk, PageMetadata, WindowMetadata
from .plan import Reads
from .window import gather_window

Pools = tuple[Tensor, Tensor]


def encode_chunk(
    geometry: Geometry,
    chunk: Chunk,
    meta: PageMetadata,
    held: WindowMetadata,
    new: tuple[Tensor, Tensor],
    window: Tensor,
    pools: Pools,
    constants: Tensor,
) -> None:
    """Encode the pages that end in a chunk; what the window no longer takes comes from the new tokens.

    Args:
        new: keys and values [tokens, H, d] of the batch.
    """
    page, name = geometry.page, geometry.format.name
    total = chunk.computed + chunk.last - chunk.first
    first, last = chunk.computed // page, total // page
    if first == last:
        return
    blocks = meta.table[chunk.row, first:last]
    whole = first
    if first == 0 or chunk.computed % page:
        # The first page is without the sinks, or began before the chunk.
        begin, end = first * page + (geometry.sinks if first == 0 else 0), (first + 1) * page
        tokens = [x[chunk.first : chunk.first + end - chunk.computed] for x in new]
        if begin < chunk.computed:
            positions = torch.arange(begin, chunk.computed, device=window.device)
            before = gather_window(window, held.table[chunk.row], positions)
            tokens = [torch.cat(x) for x in zip(before, tokens, strict=True)]
        else:
            tokens = [x[begin - chunk.computed :] for x in tokens]
        keys, values = (pad(x.transpose(0, 1), (0, 0, 0, page - (end - begin)))[None] for x in tokens)
        counts = blocks.new_full((1,), end - begin)
        ops.encode_into(keys, values, counts, blocks[:1], *pools, constants, name)
        whole = first + 1
    if whole < last:
        at = chunk.first + whole * page - chunk.computed
        keys, values = (
            x[at : at + (last - whole) * page].unflatten(0, (-1, page)).transpose(1, 2) for x in new
        )
        counts = blocks.new_full((last - whole,), page)
        ops.encode_into(keys, values, counts, blocks[whole - first :], *pools, constants, name)


@dataclass(frozen=True)
class ChunkReader:
    """Attention of chunks in one layer: causal on themselves, to everything before them otherwise."""

    geometry: Geometry
    exact: Exact
    scaling: float
    sink_logit: Tensor | None
    constants: Tensor

    def attend(
        self,
        new: tuple[Tensor, Tensor, Tensor],
        meta: PageMetadata,
        held: WindowMetadata,
        window: Tensor,
        pools: Pools,
        output: Tensor,
    ) -> None:
        """Write the attention of all chunks to their places in output [tokens, Hq, d]."""
        chunks = meta.chunks
        lengths = [chunk.last - chunk.first for chunk in chunks]
        if sum(lengths) == chunks[-1].last - chunks[0].first:
            packed = [x[chunks[0].first : chunks[-1].last] for x in new]
        else:
            packed = [torch.cat([x[c.first : c.last] for c in chunks]) for x in new]
        attended, sums = self.exact.causal(packed[0], packed[1], packed[2], lengths)
        reads = meta.once("chunks", lambda: self._reads(meta, held))
        parts = zip(chunks, attended.split(lengths), sums.split(lengths, 1), range(len(chunks)), strict=True)
        for chunk, own, lse, i in parts:
            if not chunk.computed and self.sink_logit is None:
                output[chunk.first : chunk.last] = own
                continue
            before = self._before(chunk, meta, held, window, reads, i) if chunk.computed else None
            for t in range(0, chunk.last - chunk.first, BLOCK):
                queries = new[0][chunk.first + t : min(chunk.first + t + BLOCK, chunk.last)]
                joined = [(_by_head(own[t : t + BLOCK]), lse[None, :, t : t + BLOCK])]
                if before is not None:
                    part, total = self.exact.held(queries, *before[0])
                    joined.append((_by_head(part), total[None]))
                    if before[1] is not None:
                        stored = _by_head(queries), *pools, *before[1], self.constants
                        joined.append(ops.dense_attend(*stored, self.scaling, self.geometry.format.name))
                merged = merge_parts(joined, self.sink_logit)[0].transpose(0, 1)
                output[chunk.first + t : chunk.first + t + len(queries)] = merged

    def _reads(self, meta: PageMetadata, held: WindowMetadata) -> Reads:
        """What the first token of every chunk reads before the chunk: it holds for all of them."""
        rows = [chunk.row for chunk in meta.chunks]
        numbers = torch.tensor([rows, [chunk.computed + 1 for chunk in meta.chunks]], dtype=torch.int32)
        if held.table.device.type == "cuda":
            numbers = numbers.pin_memory().to(held.table.device, non_blocking=True)
        return meta.planner.reads(numbers[1], held.table[numbers[0].long()])

    def _before(
        self, chunk: Chunk, meta: PageMetadata, held: WindowMetadata, window: Tensor, reads: Reads, i: int
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        """(keys, values and number of full-precision tokens before a chunk), (its pages, their counts)."""
        geometry, start = self.geometry, reads.starts[i]
        most = min(chunk.computed, geometry.sinks + geometry.window)
        sinks = start.clamp(max=geometry.sinks)
        used = sinks + chunk.computed - start
        place = torch.arange(most, device=window.device)
        positions = torch.where(place < sinks, place, place + (start - sinks))
        positions = torch.where(place < used, positions, 0)
        tokens = gather_window(window, held.table[chunk.row], positions)
        pages = chunk.computed // geometry.page
        if not pages:
            return (*tokens, used), None
        row = slice(chunk.row, chunk.row + 1)
        return (*tokens, used), (meta.table[row, :pages], reads.counts[i : i + 1, :pages])


def _by_head(x: Tensor) -> Tensor:
    """[n, Hq, d] -> [1, Hq, n, d]."""
    return x.transpose(0, 1)[None]
