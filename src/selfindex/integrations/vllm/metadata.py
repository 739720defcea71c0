"""What a step is made of, from the engine's batch: rows that take a decode step, and chunks of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder

from ...config import SelfIndexConfig
from .geometry import Geometry
from .options import drafts, serving_config
from .plan import Planner, Reads, Writes
from .specs import PageSpec, WindowSpec

Made = TypeVar("Made")


class Once:
    """Makes what all layers of a step ask for, at the first call; a graph records it there."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __call__(self, name: str, make: Callable[[], Made]) -> Made:
        if name not in self._made:
            self._made[name] = make()
        made: Made = self._made[name]
        return made


@dataclass
class WindowMetadata(AttentionMetadata):
    """Full-precision blocks of a batch.

    Attributes:
        table: int32 [B, M'].
        slots: int64 [tokens], place of each new token; below the block size or negative for none.
    """

    table: Tensor
    slots: Tensor
    once: Once = field(default_factory=Once, repr=False)


@dataclass(frozen=True)
class Chunk:
    """Several new tokens of one row.

    Attributes:
        row: in the batch.
        first, last: of its tokens, in the batch's.
        computed: tokens of the row before them.
    """

    row: int
    first: int
    last: int
    computed: int


@dataclass(frozen=True)
class StepPart:
    """The part of a batch that selects for every query: rows with one new token or a few.

    Attributes:
        tokens: which of the batch's tokens, in order of their rows.
        pages, window: int32 [n, M], [n, M'], tables of the rows of those n tokens.
        reads: of those tokens.
        row_window: int32 [B', M'], table of the B' rows; writes: the pages they complete.
    """

    tokens: slice | Tensor
    pages: Tensor
    window: Tensor
    reads: Reads
    row_window: Tensor
    writes: Writes


@dataclass
class PageMetadata(AttentionMetadata):
    """One batch, planned by the first layer that asks.

    Attributes:
        lengths: int32 [B], tokens of each row, new ones included; 0 for padding.
        table: int32 [B, M], pages.
        tokens: new tokens of the batch.
        rows: rows of the step part; None if there are none.
        owners: for rows of several tokens, int64 [2, n]: of each token its row, counted in `rows`, and
            how many of the row's tokens follow it; None where every row has one token.
        new: int32 [B'], new tokens of those rows; 1 likewise.
        step_tokens: see `StepPart.tokens`.
        chunks: the other rows.
    """

    planner: Planner
    lengths: Tensor
    table: Tensor
    tokens: int
    rows: slice | Tensor | None
    owners: Tensor | None
    new: Tensor | int
    step_tokens: slice | Tensor
    chunks: list[Chunk]
    once: Once = field(default_factory=Once, repr=False)

    def step(self, window: WindowMetadata) -> StepPart | None:
        """The step part; worked out on the device at the first call."""
        return None if self.rows is None else self.once("step", lambda: self._step(window))

    def _step(self, window: WindowMetadata) -> StepPart:
        lengths, pages, held = (x[self.rows] for x in (self.lengths, self.table, window.table))
        writes = self.planner.writes(lengths, self.new, pages, held)
        row_window = held
        if self.owners is not None:
            row, behind = self.owners
            lengths, pages, held = lengths[row] - behind.int(), pages[row], held[row]
        reads = self.planner.reads(lengths, held)
        return StepPart(self.step_tokens, pages, held, reads, row_window, writes)


class WindowBuilder(AttentionMetadataBuilder):
    """Builds `WindowMetadata`."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: WindowSpec, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(few_tokens(serving_config(vllm_config), vllm_config))

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> WindowMetadata:
        common = common_attn_metadata
        return WindowMetadata(common.block_table_tensor[: common.num_reqs], common.slot_mapping)


class PageBuilder(AttentionMetadataBuilder):
    """Builds `PageMetadata`."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: PageSpec, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.config, model = serving_config(vllm_config), vllm_config.model_config
        self.geometry = Geometry.make(
            self.config, kv_cache_spec.num_kv_heads, kv_cache_spec.head_size, model.dtype, drafts(vllm_config)
        )
        self.few, self.longest = few_tokens(self.config, vllm_config), model.max_model_len
        self._init_reorder_batch_threshold(self.few)
        self._planner: Planner | None = None

    def planner(self, pages: int) -> Planner:
        """For tables of so many columns, which do not change while an engine runs."""
        if self._planner is None:
            self._planner = Planner(self.config, self.geometry, self.longest, pages, self.device)
        return self._planner

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> PageMetadata:
        common = common_attn_metadata
        table = common.block_table_tensor[: common.num_reqs]
        place = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        new = [last - first for first, last in pairwise(place)]
        shared: dict[str, Any] = {
            "planner": self.planner(table.shape[1]),
            "lengths": common.seq_lens[: common.num_reqs],
            "table": table,
            "tokens": min(common.num_actual_tokens, common.slot_mapping.shape[0]),
        }
        single = new.count(1)
        if new[:single] == [1] * single and not any(new[single:]):
            # A decode step; behind its rows there may be padding, of no tokens by the host's count.
            every = slice(0, min(len(new), shared["tokens"]))
            return PageMetadata(**shared, rows=every, owners=None, new=1, step_tokens=every, chunks=[])
        lengths = self._lengths(common)
        chunks = [
            Chunk(row, place[row], place[row + 1], lengths[row] - n)
            for row, n in enumerate(new)
            if n > self.few
        ]
        rows = [row for row, n in enumerate(new) if 1 <= n <= self.few]
        if not rows:
            none = slice(0, 0)
            return PageMetadata(**shared, rows=None, owners=None, new=1, step_tokens=none, chunks=chunks)
        owners = [(i, new[row] - 1 - t) for i, row in enumerate(rows) for t in range(new[row])]
        tokens = [place[row] + t for row in rows for t in range(new[row])]
        several = any(new[row] > 1 for row in rows)
        return PageMetadata(
            **shared,
            rows=self._places(rows),
            owners=self._tensor(owners).T if several else None,
            new=self._tensor([new[row] for row in rows]).int() if several else 1,
            step_tokens=self._places(tokens),
            chunks=chunks,
        )

    def _lengths(self, common: Any) -> list[int]:
        """Tokens of every row as the host knows them: right for chunks, whatever becomes of drafts."""
        known = common.seq_lens if common.seq_lens.device.type == "cpu" else common.seq_lens_cpu_upper_bound
        found: list[int] = known[: common.num_reqs].tolist()
        return found

    def _places(self, places: list[int]) -> slice | Tensor:
        """An index; a slice where it can be one."""
        if places == list(range(places[0], places[0] + len(places))):
            return slice(places[0], places[0] + len(places))
        return self._tensor(places)

    def _tensor(self, numbers: Sequence[Any]) -> Tensor:
        """int64, on the device; the copy waits for nothing."""
        pinned = torch.tensor(numbers, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        return pinned.to(self.device, non_blocking=True)


def few_tokens(config: SelfIndexConfig, vllm_config: Any) -> int:
    """Most new tokens of a row that select for themselves: drafts, and what the options say of chunks."""
    return max(1, config.sparse_queries, 1 + drafts(vllm_config))
