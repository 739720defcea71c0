"""What the demo measures: one prefill for two caches, answers, speed and fidelity."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..config import SelfIndexConfig
from ..integrations.transformers import SelfIndexCache
from .models import Loaded

Tick = Callable[[], None]


class TwinCache(SelfIndexCache):
    """Fills a dense cache with the same keys and values while `twin` is set.

    Attention over a prompt is exact with either cache, so one prefill serves both.

    Args:
        tick: called once per layer.
    """

    def __init__(self, model: Any, config: SelfIndexConfig, tick: Tick) -> None:
        super().__init__(model, config)
        self.twin: DynamicCache | None = DynamicCache(config=model.config)
        self.tick = tick
        self.encode_seconds = 0.0
        for layer in self.compressed_layers:
            layer.commit = self._timed(layer.commit)  # type: ignore[method-assign]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        if self.twin is not None:
            self.twin.update(key_states, value_states, layer_idx, *args, **kwargs)
            self.tick()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _timed(self, commit: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any) -> None:
            start = time.perf_counter()
            commit(*args)
            self.encode_seconds += time.perf_counter() - start

        return timed


@dataclass(frozen=True)
class Reading:
    """Both caches after the prefill. `encode_seconds` are part of `seconds`."""

    cache: SelfIndexCache
    dense: DynamicCache
    seconds: float
    encode_seconds: float


@torch.inference_mode()
def read(loaded: Loaded, config: SelfIndexConfig, ids: Tensor, tick: Tick) -> Reading:
    """Prefill token ids [1, N] once, into a self-indexing and a dense cache."""
    cache = TwinCache(loaded.model, config, tick)
    dense = cache.twin
    assert dense is not None
    start = time.perf_counter()
    forward(loaded, ids, cache, logits_to_keep=1)
    cache.twin = None
    return Reading(cache, dense, time.perf_counter() - start, cache.encode_seconds)


@dataclass(frozen=True)
class Reply:
    """A generated answer and how long the steps after its first token took."""

    text: str
    seconds_per_token: float


@torch.inference_mode()
def reply(loaded: Loaded, cache: Any, question: Tensor, steps: int, tick: Tick) -> Reply:
    """Greedy decoding of exactly `steps` tokens; the text ends at the first end-of-turn token.

    The cache keeps all of it; `rewind` takes it back.
    """
    ends = loaded.model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    chosen: list[int] = []
    seconds: list[float] = []
    ids = question.to(loaded.model.device)
    for _ in range(steps):
        start = time.perf_counter()
        chosen.append(int(forward(loaded, ids, cache, logits_to_keep=1)[0, -1].argmax()))
        seconds.append(time.perf_counter() - start)
        ids = torch.tensor([chosen[-1:]], device=ids.device)
        tick()
    length = next((i for i, token in enumerate(chosen) if token in ends), steps)
    text = loaded.tokenizer.decode(chosen[:length], skip_special_tokens=True)
    return Reply(" ".join(text.split()), statistics.median(seconds[1:] or seconds))


@dataclass(frozen=True)
class Fidelity:
    """Next-token predictions over a cache against those over the dense one.

    Attributes:
        tokens: predictions compared.
        same: how many have the same most likely token.
        kl: mean KL divergence from the dense distribution, in nats.
    """

    tokens: int
    same: int
    kl: float


@torch.inference_mode()
def log_probabilities(loaded: Loaded, cache: Any, ids: Tensor) -> Tensor:
    """Next-token log-probabilities float32 [T, vocabulary] after each of ids [1, T], teacher-forced."""
    return forward(loaded, ids, cache)[0].float().log_softmax(-1)


def fidelity(dense: Tensor, other: Tensor) -> Fidelity:
    """Compare two results of `log_probabilities`."""
    kl = (dense.exp() * (dense - other)).sum(-1).mean()
    same = int((dense.argmax(-1) == other.argmax(-1)).sum())
    return Fidelity(dense.shape[0], same, float(kl))


def forward(loaded: Loaded, ids: Tensor, cache: Any, **options: Any) -> Tensor:
    """Logits [1, T, vocabulary] of ids [1, T] on top of a cache."""
    ids = ids.to(loaded.model.device)
    return loaded.model(input_ids=ids, use_cache=True, **{loaded.cache_argument: cache}, **options).logits


def rewind(cache: Any, length: int) -> None:
    """Make a cache forget everything after its first `length` tokens."""
    cache.crop(length - cache.get_seq_length())
