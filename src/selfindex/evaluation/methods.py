"""Every cache that is compared, by name: this project's presets and the baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ..config import BARE_SHARE, EVERY_QUERY, SelfIndexConfig, parse_prefill
from ..errors import InputError
from ..integrations.transformers import SelfIndexCache
from .baselines import LIBRARY, LibraryCache, baseline_cache, baselines
from .baselines.base import Method
from .recording import Recording

OURS: dict[str, dict[str, Any]] = {
    "selfindex balanced": {},
    "selfindex balanced, 3-bit values": {"value_bits": 3},
    "selfindex balanced, 128 pinned": {"pinned_tokens": 128},
    "selfindex paper": {"preset": "paper"},
    "selfindex balanced, all tokens": {"budget": 1.0},
}

POLICIES = {"default": SelfIndexConfig().sparse_queries, "every": EVERY_QUERY}
"""Which queries select what they read, as `sparse_queries`: "default", the steps that decode a reply, while a
question reads everything that is stored; "every", those of the question as well.
"""
STRESS = ", every query"
"""What the policy "every" adds to a method's name where both are compared."""


PREFILL = ", prefill "
"""What comes between the name of a method and how it reads documents, where that is not exactly."""


class Candidate(NamedTuple):
    """A cache under test.

    Attributes:
        make: cache of (model, recorded prefix); the recording is left as it is. Raises
            `baselines.Unavailable` where the method cannot run.
        stored, read: bytes per token and KV head that are held, and read by a decode step; None
            where `own_bytes` of the filled cache knows.
    """

    make: Callable[[Any, Recording], Any]
    stored: float | None
    read: float | None


def methods(budget: float, head_dim: int, policy: str = "every") -> dict[str, Candidate]:
    """All candidates by name; sparse ones read the same share `budget` of the prefix."""
    queries = POLICIES[policy]
    every = {name: _baseline(m, head_dim, queries) for name, m in baselines(budget, head_dim).items()}
    every |= {name: _library(cache, head_dim) for name, cache in LIBRARY.items()}
    for name, options in OURS.items():
        share = "" if "budget" in options else f" {100 * budget:g} %"
        every[name + share] = Candidate(_ours({"budget": budget} | options, queries), None, None)
    return every


def selecting(budget: float, head_dim: int) -> list[str]:
    """Names of the methods that depend on the policy."""
    found = [name for name, method in baselines(budget, head_dim).items() if method.selects]
    return found + [f"{name} {100 * budget:g} %" for name in OURS if "budget" not in OURS[name]]


def answering(
    budget: float, head_dim: int, policies: Sequence[str], prefills: Sequence[str] = ()
) -> dict[str, Candidate]:
    """Candidates for tasks, under one policy or both.

    Args:
        prefills: other ways than exactly, see `parse_prefill`, in which the dense model and this project's
            methods read documents as well.

    Raises:
        InputError: there is no such policy.
        ConfigError: there is no such way to read.
    """
    unknown = [policy for policy in policies if policy not in POLICIES]
    if unknown or not policies:
        raise InputError(f"no policy {', '.join(unknown) or 'given'}; there are {', '.join(POLICIES)}")
    found = methods(budget, head_dim, "default")
    depend = selecting(budget, head_dim)
    if "every" in policies:
        stress = methods(budget, head_dim, "every")
        found |= {name + STRESS: stress[name] for name in depend}
    if "default" not in policies:
        found = {name: candidate for name, candidate in found.items() if name not in depend}
    own = [name for name in found if name == "dense" or name.startswith(tuple(OURS))]
    others = [(text, SelfIndexConfig(**parse_prefill(text))) for text in prefills]
    return found | {
        f"{name}{PREFILL}{text}": _read_anew(found[name], config)
        for text, config in others
        if config.prefill != "exact"
        for name in own
    }


def _read_anew(candidate: Candidate, config: SelfIndexConfig) -> Candidate:
    """A candidate that reads documents in another way."""

    def make(model: Any, recording: Recording) -> Any:
        return candidate.make(model, recording.again(model, config))

    return candidate._replace(make=make)


def wanted(names: Iterable[str], starts: Sequence[str]) -> list[str]:
    """Names that begin with one of `starts`, and those of the dense model, however it reads documents.

    All of them if `starts` is empty.
    """
    chosen = (f"dense{PREFILL}", *starts)
    return [name for name in names if name == "dense" or not starts or name.startswith(chosen)]


def _baseline(method: Method, head_dim: int, sparse_queries: int) -> Candidate:
    def make(model: Any, recording: Recording) -> Any:
        return baseline_cache(model, recording, method, sparse_queries)

    return Candidate(make, method.bytes_per_token(head_dim), method.bytes_read(head_dim))


def _library(cache: LibraryCache, head_dim: int) -> Candidate:
    size = cache.bytes_per_token(head_dim)
    return Candidate(cache.make, size, size)


def _ours(options: dict[str, Any], sparse_queries: int) -> Callable[[Any, Recording], SelfIndexCache]:
    def make(model: Any, recording: Recording) -> SelfIndexCache:
        # Without the floor under the budget, so that all methods read the same share.
        fair: dict[str, Any] = BARE_SHARE | {"sparse_queries": sparse_queries}
        return recording.fill(SelfIndexCache(model, **fair, **options))

    return make


def own_bytes(cache: SelfIndexCache) -> tuple[float, float]:
    """(bytes per encoded token and KV head, bytes a step reads of them) of a filled cache.

    Pinned tokens count, sinks and recent ones do not: these every method has.
    """
    memory, store = cache.report(missed=False).memory, cache.compressed_layers[0].store
    assert store is not None
    tokens = sum(map(store.encoded, range(store.batch)))
    pairs = len(cache.compressed_layers) * store.format.kv_heads * tokens
    token = 2 * store.format.head_dim * store.window.keys.element_size()
    pinned = cache.config.pinned_tokens * token * store.batch / tokens
    share = cache.config.budget_tokens(store.length(0), store.encoded(0)) / store.encoded(0)
    held, read = memory.index + memory.payload, memory.index + share * memory.payload
    return held / pairs + pinned, read / pairs + pinned


def head_dim(model: Any) -> int:
    """Head dimension of a model."""
    text = model.config.get_text_config()
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
