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
from ..evaluation.cache_layers import observe_dense
from ..evaluation.fidelity import divergence
from ..evaluation.greedy import end_tokens, greedy
from ..evaluation.models import Loaded
from ..evaluation.recording import copy_other_layers
from ..integrations.transformers import SelfIndexCache
from ..integrations.transformers.observer import Observation

Tick = Callable[[], None]


@dataclass(frozen=True)
class Reading:
    """Both caches after the prefill. `encode_seconds` are part of `seconds`."""

    cache: SelfIndexCache
    dense: DynamicCache
    seconds: float
    encode_seconds: float


@torch.inference_mode()
def read(loaded: Loaded, config: SelfIndexConfig, ids: Tensor, tick: Tick) -> Reading:
    """Prefill token ids [1, N] once, into a self-indexing and a dense cache.

    Attention over a prompt is exact with either cache, so one prefill serves both.

    Args:
        tick: called once per compressed layer.
    """
    model, encoding = loaded.model, list[float]()
    cache, dense = SelfIndexCache(model, config), DynamicCache(config=model.config)
    layers = {layer.layer_idx: layer for layer in cache.compressed_layers}

    def store(seen: Observation) -> None:
        start = time.perf_counter()
        layers[seen.layer.layer_idx].commit(seen.query, seen.keys, seen.values, None, seen.scaling)
        encoding.append(time.perf_counter() - start)
        tick()

    start = time.perf_counter()
    observe_dense(model, dense, ids.to(model.device), store, logits_to_keep=1)
    copy_other_layers(dense, cache)
    return Reading(cache, dense, time.perf_counter() - start, sum(encoding))


@dataclass(frozen=True)
class Reply:
    """A generated answer and how long the steps after its first token took."""

    text: str
    seconds_per_token: float


def reply(loaded: Loaded, cache: Any, question: Tensor, steps: int, tick: Tick) -> Reply:
    """Greedy decoding of exactly `steps` tokens; the text ends at the first end-of-turn token.

    The cache keeps all of it; `rewind` takes it back.
    """
    chosen: list[int] = []
    seconds: list[float] = []
    following = greedy(loaded.model, cache, question)
    for _ in range(steps):
        start = time.perf_counter()
        chosen.append(int(next(following)))
        seconds.append(time.perf_counter() - start)
        tick()
    ends = end_tokens(loaded.model)
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


def fidelity(dense: Tensor, other: Tensor) -> Fidelity:
    """Compare two results of `continue_from`."""
    kl, same = divergence(dense, other)
    return Fidelity(dense.shape[0], int(same.sum()), float(kl.mean()))


def rewind(cache: Any, length: int) -> None:
    """Make a cache forget everything after its first `length` tokens."""
    cache.crop(length - cache.get_seq_length())
