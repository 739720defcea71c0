"""What the engine is told of a layer's memory: pages of all tokens, a window of full-precision ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from .geometry import Geometry
from .manager import WindowManager

_DESCRIBES_CELLS = "state_content_bytes" in {field.name for field in fields(FullAttentionSpec)}
"""Whether a spec says itself what a block holds (0.29 and later); before, subclasses override its size."""


@dataclass(frozen=True, kw_only=True)
class PageSpec(FullAttentionSpec):
    """A block is one encoded page: `page_bytes` opaque bytes."""

    page_bytes: int = 0

    if not _DESCRIBES_CELLS:

        @property
        def real_page_size_bytes(self) -> int:
            return self.page_bytes

    @classmethod
    def merge(cls, specs: Sequence[PageSpec]) -> PageSpec:
        merged = super().merge(specs)
        assert all(spec.page_bytes == specs[0].page_bytes for spec in specs)
        return replace(merged, page_bytes=specs[0].page_bytes)


@dataclass(frozen=True, kw_only=True)
class WindowSpec(SlidingWindowSpec):
    """Sinks and recent tokens in full precision, in blocks padded to a page's size.

    Attributes:
        front: blocks at a request's start that stay as long as it does.
        kept: last tokens of a step that are stored, however long it is.
        batches: steps that may be scheduled before the first of them is over.
    """

    front: int = 1
    kept: int = 0
    batches: int = 1

    def max_admission_blocks_per_request(self, *args: Any, **kwargs: Any) -> int:
        """Most blocks of a request: its front, and a window for each step in flight and the last one done."""
        return self.front + (self.batches + 1) * (-(-self.kept // self.block_size) + 1)


def block_bytes(geometry: Geometry, layers: Iterable[Any]) -> int:
    """Bytes of a block: of a page, or of the smallest block of a layer that stays with the engine, if larger.

    Args:
        layers: all attention layers of a model.
    """
    found = [geometry.page_bytes]
    for layer in layers:
        if getattr(layer, "sliding_window", None) is not None:
            sizes = layer.attn_backend.get_supported_kernel_block_sizes()
            smallest = min(getattr(size, "base", size) for size in sizes)
            token = 2 * layer.num_kv_heads * layer.head_size * layer.kv_cache_torch_dtype.itemsize
            found.append(smallest * token)
    return max(found)


def page_spec(geometry: Geometry, padded: int) -> PageSpec:
    """Spec of an attention layer, in blocks of `padded` bytes."""
    fmt, size = geometry.format, geometry.page_bytes
    cells = {}
    if _DESCRIBES_CELLS:
        cells = {"num_head_slots": 1, "tokens_per_state": geometry.page, "state_content_bytes": size}
    return PageSpec(
        block_size=geometry.page,
        num_kv_heads=fmt.kv_heads,
        head_size=fmt.head_dim,
        dtype=torch.uint8,
        page_bytes=size,
        page_size_padded=padded if padded > size else None,
        **cells,
    )


def window_spec(geometry: Geometry, padded: int, batches: int) -> WindowSpec:
    """Spec of the pseudo-layer that stands for an attention layer's full-precision tokens."""
    return WindowSpec(
        block_size=geometry.block,
        num_kv_heads=geometry.format.kv_heads,
        head_size=geometry.format.head_dim,
        dtype=geometry.dtype,
        sliding_window=geometry.window,
        page_size_padded=padded,
        front=geometry.front,
        kept=geometry.kept,
        batches=batches,
    )


# Tell who manages them, wherever they come to: the process that schedules gets them from those that run
# the model. Asked first, lest the registry takes ours for all there are.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(PageSpec, FullAttentionManager, uniform_type_base_spec=FullAttentionSpec)
KVCacheSpecRegistry.register(WindowSpec, WindowManager)
