"""Chunks of prompts: encoding the pages that they fill, and attention to all that came before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...attention.attend import BLOCK
from ...attention.decoded import even, pages_at_a_time
from ...attention.parts import Parts
from ...backends import ops
from .exact import Exact
from .geometry import Geometry
from .metadata import Chunk, PageMetadata, WindowMetadata
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
class Before:
    """What a chunk reads besides itself, planned once for all layers; numbers are on the device.

    Attributes:
        blocks, places: int64 [L], where the window has full-precision tokens: the last `L - held[0]` of
            them, others are any.
        queries, held: int32 [2], (0, new tokens) and (first of those tokens, L).
        table, counts: int32 [1, M], its pages and their tokens.
        room: tokens decoded to memory at a time, with those of the window and the chunk behind the last;
            allocated: as many, or more, and mostly the same: memory of many sizes would pile up.
        pieces: pages that are decoded and attended to first, for want of room, and their tokens (0, n).
        rest: page from which on the others come, directly before the window's tokens.
        start: int32 [1], where in the room; span: int32 [2], (there, room).
    """

    blocks: Tensor
    places: Tensor
    queries: Tensor
    held: Tensor
    table: Tensor
    counts: Tensor
    room: int
    allocated: int
    pieces: list[tuple[slice, Tensor]]
    rest: int
    start: Tensor
    span: Tensor


@dataclass(frozen=True)
class ChunkPlan:
    """The chunks of a step: those attended to part by part, which is cheaper for short ones, and the others.

    Attributes:
        bounds: int32 [n + 1], of the former, packed.
    """

    packed: list[tuple[Chunk, Before | None]]
    bounds: Tensor
    decoded: list[tuple[Chunk, Before]]


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
        plan = meta.once("chunks", lambda: self._plan(meta, held))
        if plan.packed:
            self._attend_packed(plan, new, window, pools, output)
        for chunk, before in plan.decoded:
            own = [x[chunk.first : chunk.last] for x in new]
            self._attend_decoded(before, own, window, pools, output[chunk.first : chunk.last])

    def _attend_packed(
        self,
        plan: ChunkPlan,
        new: tuple[Tensor, Tensor, Tensor],
        window: Tensor,
        pools: Pools,
        output: Tensor,
    ) -> None:
        chunks = [chunk for chunk, _ in plan.packed]
        lengths = [chunk.last - chunk.first for chunk in chunks]
        every = slice(chunks[0].first, chunks[-1].last)
        together = sum(lengths) == every.stop - every.start
        packed = [x[every] if together else torch.cat([x[c.first : c.last] for c in chunks]) for x in new]
        done = together and self.sink_logit is None and not any(chunk.computed for chunk in chunks)
        out = output[every] if done else None
        attended, sums = self.exact.packed(packed[0], packed[1], packed[2], lengths, plan.bounds, out)
        if done:
            return
        each = zip(plan.packed, attended.split(lengths), sums.split(lengths, 1), strict=True)
        for (chunk, before), own, lse in each:
            query, to = (x[chunk.first : chunk.last] for x in (new[0], output))
            full = None if before is None else window[before.blocks, :, before.places].chunk(2, -1)
            for at in (slice(t, t + BLOCK) for t in range(0, len(query), BLOCK)):
                parts = Parts()
                parts.add(_by_head(own[at]), lse[None, :, at])
                if before is not None and full is not None:
                    queries = before.queries.clamp(max=len(query[at]))
                    part, total = self.exact.span(query[at], full[0], full[1], queries, before.held, False)
                    parts.add(_by_head(part), total[None])
                    if before.table.shape[1]:
                        stored = *pools, before.table, before.counts, self.constants, self.scaling
                        parts.add(*ops.dense_attend(_by_head(query[at]), *stored, self.geometry.format.name))
                parts.write(_by_head(to[at]), self.sink_logit)

    def _attend_decoded(
        self, before: Before, new: list[Tensor], window: Tensor, pools: Pools, output: Tensor
    ) -> None:
        """All that a chunk reads, itself last, becomes one sequence in memory that kernels take as it is."""
        query, count, name = new[0], len(new[0]), self.geometry.format.name
        room = query.new_empty(before.allocated, *window.shape[1::2])[: before.room]
        keys, values = room.chunk(2, -1)
        places = keys.transpose(0, 1), values.transpose(0, 1)
        parts = Parts()
        for pages, tokens in before.pieces:
            stored = *pools, before.table[:, pages], before.counts[:, pages], tokens[:1]
            ops.decode_pages(*stored, *places, self.constants, name)
            part, lse = self.exact.span(query, keys, values, before.queries, tokens, False)
            parts.add(_by_head(part), lse[None])
        # What takes the places before the window's tokens that exist comes after them.
        first = before.room - count
        room[first - len(before.blocks) : first] = window[before.blocks, :, before.places]
        keys[first:], values[first:] = new[1], new[2]
        if before.rest < before.table.shape[1]:
            stored = *pools, before.table[:, before.rest :], before.counts[:, before.rest :], before.start
            ops.decode_pages(*stored, *places, self.constants, name)
        alone = not before.pieces and self.sink_logit is None
        out = output if alone else None
        part, lse = self.exact.span(query, keys, values, before.queries, before.span, True, out)
        if not alone:
            parts.add(_by_head(part), lse[None])
            parts.write(_by_head(output), self.sink_logit)

    def _plan(self, meta: PageMetadata, held: WindowMetadata) -> ChunkPlan:
        device, chunks = held.table.device, meta.chunks
        lengths = [chunk.last - chunk.first for chunk in chunks]
        # What the first token of a chunk reads before the chunk holds for all of them.
        rows = [[chunk.row for chunk in chunks], [chunk.computed + 1 for chunk in chunks], lengths]
        numbers = _on(device, rows)
        reads = meta.planner.reads(numbers[1], held.table[numbers[0].long()])
        packed: list[tuple[Chunk, Before | None]] = []
        decoded: list[tuple[Chunk, Before]] = []
        for i, chunk in enumerate(chunks):
            if not chunk.computed:
                packed.append((chunk, None))
                continue
            before = self._before(chunk, meta, held, reads.starts[i], reads.counts[i : i + 1], numbers[2, i])
            if lengths[i] >= self.exact.decoded_from:
                decoded.append((chunk, before))
            else:
                packed.append((chunk, before))
        bounds = [0]
        for chunk, _ in packed:
            bounds.append(bounds[-1] + chunk.last - chunk.first)
        return ChunkPlan(packed, _on(device, bounds), decoded)

    def _before(
        self,
        chunk: Chunk,
        meta: PageMetadata,
        held: WindowMetadata,
        start: Tensor,
        counts: Tensor,
        new: Tensor,
    ) -> Before:
        """start: from where on it reads full-precision tokens; counts [1, M]; new: its own tokens; int32."""
        geometry, fmt, device = self.geometry, self.geometry.format, start.device
        own, pages = chunk.last - chunk.first, chunk.computed // geometry.page
        most = min(chunk.computed, geometry.sinks + geometry.window)
        sinks = start.clamp(max=geometry.sinks)
        used = sinks + chunk.computed - start
        place = torch.arange(most, dtype=torch.int32, device=device) - (most - used)
        positions = torch.where(place < sinks, place, place + (start - sinks)).clamp(min=0)
        blocks = held.table[chunk.row][(positions // geometry.block).long()]
        table, counts = meta.table[chunk.row : chunk.row + 1, :pages], counts[:, :pages]
        fit = pages_at_a_time(fmt.kv_heads, fmt.head_dim, geometry.page, geometry.dtype)
        further = -(-(most + own) // geometry.page)
        each = even(pages + further, fit)
        rest = max(0, min(pages, pages + further - each))
        pieces = [slice(first, min(first + each, rest)) for first in range(0, rest, each)]
        room = max(each * geometry.page if pieces else 0, (pages - rest) * geometry.page + most + own)
        longest = meta.table.shape[1] * geometry.page + geometry.sinks + geometry.window
        zero = torch.zeros_like(start)
        begin = room - own - used - counts[:, rest:].sum(dtype=torch.int32)
        return Before(
            blocks.long(),
            (positions % geometry.block).long(),
            torch.stack((zero, new)),
            torch.stack((most - used, zero + most)),
            table,
            counts,
            room,
            max(room, min(longest, fit * geometry.page)),
            [(x, torch.stack((zero, counts[:, x].sum(dtype=torch.int32)))) for x in pieces],
            rest,
            begin[None],
            torch.stack((begin, zero + room)),
        )


def _on(device: torch.device, numbers: list[Any]) -> Tensor:
    """int32, on the device; the copy waits for nothing."""
    made = torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)


def _by_head(x: Tensor) -> Tensor:
    """[n, Hq, d] -> [1, Hq, n, d]."""
    return x.transpose(0, 1)[None]
