"""Time per token and to the first token of `model.generate`, and the memory it takes."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache

from ..integrations.transformers import SelfIndexCache
from ..integrations.transformers.models import cache_argument
from ..report import held_bytes

T = TypeVar("T")

WARM_UP = 8
"""Steps at the start that do not count; the first ones record what later ones replay."""

SAMPLED_EVERY = 0.02
"""Seconds between two looks at the memory of a process; a prompt that matters takes longer to read."""


@dataclass(frozen=True)
class Timing:
    """One call of `model.generate`.

    Attributes:
        first: seconds to the first token.
        ms, p90_ms: median and 90th percentile of the milliseconds of each further token.
        peak: bytes at most: on a GPU all that PyTorch had allocated on it, weights included; else by
            how much the process grew.
        cache: bytes of the cache afterwards, in all its layers; 0 if transformers made the cache.
        replayed: share of the steps that replayed a graph.
    """

    first: float
    ms: float
    p90_ms: float
    peak: int
    cache: int
    replayed: float


class Clock(StoppingCriteria):
    """Notes when generate asks whether to stop, which it does once a token; never stops it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(now(input_ids.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def now(device: torch.device) -> float:
    """Seconds, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(model: Any, ids: Tensor, new: int, cache: Cache | None = None, **options: Any) -> Timing:
    """Generate `new` tokens, greedily and without a stop, and time them.

    Args:
        ids: int64 [B, T], the prompts, without padding.
        new: at least 2; so that medians mean something, a few times WARM_UP.
        cache: an empty one; None has transformers make its own.
        options: of `model.generate`, beside these.

    Raises:
        torch.OutOfMemoryError, RuntimeError, MemoryError: see `out_of_memory`.
    """
    options |= {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": new}
    # No token ends it: this one is not in the vocabulary.
    options |= {"eos_token_id": model.config.get_text_config().vocab_size, "pad_token_id": 0}
    if cache is not None:
        options[cache_argument(model)] = cache
    clock = Clock()
    with peak_memory(ids.device) as peak:
        start = now(ids.device)
        model.generate(ids, **options, stopping_criteria=StoppingCriteriaList([clock]))
    each = [1e3 * (b - a) for a, b in zip(clock.times, clock.times[1:], strict=False)]
    each = each[min(WARM_UP, len(each) // 2) :]
    replayed = cache.replay.steps if isinstance(cache, SelfIndexCache) else 0
    return Timing(
        first=clock.times[0] - start,
        ms=statistics.median(each),
        p90_ms=sorted(each)[int(0.9 * len(each))],
        peak=peak(),
        cache=cache_bytes(cache),
        replayed=replayed / (new - 1),
    )


def cache_bytes(cache: Cache | None) -> int:
    """Bytes that a cache of this package or of transformers holds, in all its layers."""
    if isinstance(cache, SelfIndexCache):
        report = cache.report(missed=False)
        return report.memory.total + report.other_bytes
    return sum(map(held_bytes, cache.layers)) if cache is not None else 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Watch the memory of a device; what it gives says `Timing.peak` afterwards."""
    if device.type == "cuda":
        gc.collect()  # recorded graphs may wait for it
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    process, done = psutil.Process(), threading.Event()
    before = most = process.memory_info().rss

    def sample() -> None:
        nonlocal most
        ended = False
        while not ended:
            ended = done.wait(SAMPLED_EVERY)
            most = max(most, process.memory_info().rss)

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    try:
        yield lambda: most - before
    finally:
        done.set()
        watcher.join()


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors on a device can have."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return psutil.virtual_memory().available


def out_of_memory(error: Exception) -> bool:
    """Whether an exception says that there was not enough memory, on whatever device."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def attempt(action: Callable[[], T]) -> T | None:
    """What an action gives, or None, with the memory free again, if it ran out of memory."""
    try:
        return action()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    # Only now, with the exception and the frames in it gone.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
