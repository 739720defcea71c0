"""Every cache that is compared, by name: this project's presets and the baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..config import EVERY_QUERY
from ..integrations.transformers import SelfIndexCache
from .baselines import baseline_cache, baselines
from .baselines.base import Method
from .cache_layers import ReplacedCache
from .recording import Recording

OURS: dict[str, dict[str, Any]] = {
    "selfindex balanced": {},
    "selfindex balanced, 3-bit values": {"value_bits": 3},
    "selfindex paper": {"preset": "paper"},
    "selfindex balanced, all tokens": {"budget": 1.0},
}


class Candidate(NamedTuple):
    """A cache under test.

    Attributes:
        make: cache of (model, recorded prefix); the recording is left as it is.
        stored, read: bytes per token and KV head that are held, and read by a decode step; None
            where `own_bytes` of the filled cache knows.
    """

    make: Callable[[Any, Recording], Any]
    stored: float | None
    read: float | None


def methods(budget: float, head_dim: int) -> dict[str, Candidate]:
    """All candidates by name; sparse ones read the same share `budget` of the prefix."""
    found = {name: _baseline(method, head_dim) for name, method in baselines(budget).items()}
    for name, options in OURS.items():
        share = "" if "budget" in options else f" {100 * budget:g} %"
        found[name + share] = Candidate(_ours({"budget": budget} | options), None, None)
    return found


def _baseline(method: Method, head_dim: int) -> Candidate:
    def make(model: Any, recording: Recording) -> ReplacedCache:
        return baseline_cache(model, recording, method)

    return Candidate(make, method.bytes_per_token(head_dim), method.bytes_read(head_dim))


def _ours(options: dict[str, Any]) -> Callable[[Any, Recording], SelfIndexCache]:
    def make(model: Any, recording: Recording) -> SelfIndexCache:
        # Without the floor under the budget, so that all methods read the same share.
        fair: dict[str, Any] = {"min_tokens": 1, "dense_below": 0, "sparse_queries": EVERY_QUERY}
        return recording.fill(SelfIndexCache(model, **fair, **options))

    return make


def own_bytes(cache: SelfIndexCache) -> tuple[float, float]:
    """(bytes per encoded token and KV head, bytes a step reads of them) of a filled cache."""
    memory, store = cache.report().memory, cache.compressed_layers[0].store
    assert store is not None
    tokens = sum(map(store.encoded, range(store.batch)))
    pairs = len(cache.compressed_layers) * store.format.kv_heads * tokens
    share = cache.config.budget_tokens(store.length(0), store.encoded(0)) / store.encoded(0)
    return (memory.index + memory.payload) / pairs, (memory.index + share * memory.payload) / pairs


def head_dim(model: Any) -> int:
    """Head dimension of a model."""
    text = model.config.get_text_config()
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
