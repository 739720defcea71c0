"""Speed and memory of `model.generate` with a dense cache and with this one, and where the one pays."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from ..config import SelfIndexConfig
from ..errors import InputError
from ..integrations.transformers import SelfIndexCache
from .timing import Timing, free_memory, measure, out_of_memory

WAYS = ("dense", "ours")

TURNS = 2
"""How often each size is measured; see `Bench.row`."""

TRIED, TRIED_NEW = 256, 4
"""Tokens of the first, short try: with some more than a page, encoding is warm afterwards too."""

LENGTHS = {"cuda": (2048, 8192, 32768, 131072), "cpu": (1024, 2048, 4096, 8192)}
"""Lengths to measure unless told otherwise; on a CPU reading a longer prompt takes minutes."""


@dataclass(frozen=True)
class Row:
    """Both ways at one size; None where there was not enough memory."""

    batch: int
    length: int
    dense: Timing | None
    ours: Timing | None

    @property
    def faster(self) -> bool:
        """Whether a token takes less time with this cache, or only with this cache is there room for it."""
        if self.ours is None or self.dense is None:
            return self.ours is not None
        return self.ours.ms < self.dense.ms


class Bench:
    """Measures a model, after a first short try that tells whether it works at all.

    Attributes:
        new: tokens to generate in each measurement.
        limit: tokens that the model's positions reach; None where its configuration does not say.
        cache_token, other_token: bytes that a token of the prompt needs about: in the dense cache, and
            while the prompt is read.

    Raises:
        UnsupportedModelError: the cache does not support the model.
        InputError: there is no memory for the first try.
    """

    def __init__(self, model: Any, config: SelfIndexConfig, new: int) -> None:
        self.model, self.config, self.new = model, config, new
        text = model.config.get_text_config()
        self.vocabulary: int = text.vocab_size
        self.limit: int | None = getattr(text, "max_position_embeddings", None)
        width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        self.other_token: int = model.dtype.itemsize * (8 * text.hidden_size + 4 * width)
        ids = self._prompts(1, min(TRIED, (self.limit or TRIED) - TRIED_NEW))
        try:
            measure(model, ids, TRIED_NEW, self._cache("ours"))
            dense = measure(model, ids, TRIED_NEW, self._cache("dense"))
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):
                raise InputError(f"no memory for {ids.shape[1]} tokens beside the weights") from error
            raise
        self.cache_token = dense.cache / ids.shape[1]

    def default_lengths(self, batch: int) -> list[int]:
        """Lengths within the model's positions, that the free memory has room for, shortest first."""
        device, limit = self.model.device, self.limit or 2**62
        sizes = LENGTHS["cuda" if device.type == "cuda" else "cpu"]
        lengths = {min(n, limit - self.new) for n in sizes if n <= limit} or {limit - self.new}
        free = free_memory(device)
        return [n for n in sorted(lengths) if n > 0 and self._need("dense", batch, n) < free]

    def row(self, batch: int, length: int) -> Row:
        """Measure one size, both ways with the same prompts.

        Twice, by turns, and the better times count: libraries prepare their kernels for every size
        that they have not seen, and other processes come and go.
        """
        found: dict[str, list[Timing | None]] = {way: [] for way in WAYS}
        for way in TURNS * WAYS:
            if None not in found[way]:
                found[way].append(self._measure(way, batch, length))
        return Row(batch, length, *(_best(found[way]) for way in WAYS))

    def _measure(self, way: str, batch: int, length: int) -> Timing | None:
        device = self.model.device
        # A CPU's system stops a process that uses more than there is, instead of saying so.
        if device.type == "cpu" and self._need(way, batch, length) > free_memory(device):
            return None
        try:
            return measure(self.model, self._prompts(batch, length), self.new, self._cache(way))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        return None

    def _need(self, way: str, batch: int, length: int) -> float:
        """Bytes beside the weights, roughly."""
        share = 1 if way == "dense" else 0.5
        return batch * (length + self.new) * (share * self.cache_token + self.other_token)

    def _cache(self, way: str) -> Cache:
        if way == "dense":
            return DynamicCache(config=self.model.config)
        return SelfIndexCache(self.model, self.config)

    def _prompts(self, batch: int, length: int) -> torch.Tensor:
        device = self.model.device
        generator = torch.Generator(device).manual_seed(0)
        return torch.randint(self.vocabulary, (batch, length), generator=generator, device=device)


def _best(found: list[Timing | None]) -> Timing | None:
    """The best times of some measurements, their highest peak; None if one ran out of memory."""
    known = [timing for timing in found if timing is not None]
    if len(known) < len(found):
        return None
    fastest = min(known, key=lambda timing: timing.ms)
    return replace(fastest, first=min(x.first for x in known), peak=max(x.peak for x in known))


def crossover(rows: Iterable[Row]) -> int | None:
    """The shortest length of one batch's rows from which on this cache is faster at every length."""
    start = None
    for row in sorted(rows, key=lambda row: row.length):
        if not row.faster:
            start = None
        elif start is None:
            start = row.length
    return start


def verdict(batch: int, rows: Iterable[Row]) -> str:
    """A sentence that says from which length on this cache pays, of the rows of that batch."""
    known = sorted(
        (row for row in rows if row.batch == batch and (row.dense or row.ours)), key=lambda row: row.length
    )
    if not known:
        return f"nothing fitted into memory (batch {batch})"
    start = crossover(known)
    if start is not None:
        row = next(row for row in known if row.length == start)
        shortest = ", the shortest measured" if row is known[0] else ""
        return f"pays from {start:,} tokens on{shortest} (batch {batch}): {_compared(row)}"
    last = known[-1]
    how = "no longer pays at" if any(row.faster for row in known) else "does not pay up to"
    return f"{how} {last.length:,} tokens here (batch {batch}): {_compared(last)}"


def _compared(row: Row) -> str:
    """What one row says, in words."""
    dense, ours = row.dense, row.ours
    if ours is None:
        return "there is no memory for it there"
    if dense is None:
        return f"{ours.ms:.2f} ms a token there, where there is no memory for the dense cache"
    text = f"{ours.ms:.2f} ms a token there, {dense.ms:.2f} with the dense cache"
    later, gained = 1e3 * (ours.first - dense.first), dense.ms - ours.ms
    if later > gained > 0:
        tokens = math.ceil(later / gained)
        text += f"; its first token comes {later:.0f} ms later, which {tokens:,} tokens make up for"
    if gained <= 0 and ours.cache < dense.cache:
        text += f"; its cache is {dense.cache / ours.cache:.1f} times smaller"
    return text
