"""Other KV caches, for comparison; see `base` for the interface."""

from __future__ import annotations

from ...codec import PageFormat
from .base import Method, baseline_cache
from .library import LIBRARY, LibraryCache, Unavailable
from .quantised import FP8, KIVI, Dense, RotatedLloydMax
from .sparse import DoubleSparse, Oracle, Quest, SnapKV, StreamingLLM


def baselines(budget: float, head_dim: int) -> dict[str, Method]:
    """All methods by name; sparse ones read a share `budget` of the tokens.

    Two are there to be compared at the default preset's bytes: KIVI with scales for groups of 64 stores about
    as many, Quest with pages of 32 reads as many.
    """
    share = f"{100 * budget:g} %"
    return {
        "dense": Dense(),
        "fp8": FP8(),
        "KIVI-4": KIVI(4),
        "KIVI-2": KIVI(2),
        "KIVI-2, equal bytes": KIVI(2, group=64),
        "rotated Lloyd-Max 4": RotatedLloydMax(4),
        "rotated Lloyd-Max 3": RotatedLloydMax(3),
        "rotated Lloyd-Max 2": RotatedLloydMax(2),
        "TurboQuant 4": RotatedLloydMax(4, norm_correction=True),
        "TurboQuant 3": RotatedLloydMax(3, norm_correction=True),
        "TurboQuant 2": RotatedLloydMax(2, norm_correction=True),
        f"oracle {share}": Oracle(budget),
        f"Quest {share}": Quest(budget),
        f"Quest, bytes of {share}": _equal_quest(budget, head_dim),
        f"DoubleSparse {share}": DoubleSparse(budget),
        f"SnapKV {share}": SnapKV(budget),
        f"StreamingLLM {share}": StreamingLLM(budget),
    }


def _equal_quest(budget: float, head_dim: int) -> Quest:
    """Quest that reads the bytes of the default preset at this budget."""
    page = PageFormat("balanced", 8, head_dim, 128)
    read = (page.index_bytes + budget * page.payload_bytes) / (page.kv_heads * page.page_size)
    index = Quest(budget, page=32)
    left = read - (index.bytes_per_token(head_dim) - 4 * head_dim)
    return Quest(max(left, 1.0) / (4 * head_dim), page=32)


__all__ = ["LIBRARY", "LibraryCache", "Method", "Unavailable", "baseline_cache", "baselines"]
