"""Other KV caches, for comparison; see `base` for the interface."""

from __future__ import annotations

from .base import Method, baseline_cache
from .quantised import FP8, KIVI, Dense, RotatedLloydMax
from .sparse import DoubleSparse, Oracle, Quest, SnapKV, StreamingLLM


def baselines(budget: float) -> dict[str, Method]:
    """All methods by name; sparse ones read a share `budget` of the tokens."""
    share = f"{100 * budget:g} %"
    return {
        "dense": Dense(),
        "fp8": FP8(),
        "KIVI-4": KIVI(4),
        "KIVI-2": KIVI(2),
        "rotated Lloyd-Max 4": RotatedLloydMax(4),
        "rotated Lloyd-Max 3": RotatedLloydMax(3),
        "rotated Lloyd-Max 2": RotatedLloydMax(2),
        f"oracle {share}": Oracle(budget),
        f"Quest {share}": Quest(budget),
        f"DoubleSparse {share}": DoubleSparse(budget),
        f"SnapKV {share}": SnapKV(budget),
        f"StreamingLLM {share}": StreamingLLM(budget),
    }


__all__ = ["Method", "baseline_cache", "baselines"]
