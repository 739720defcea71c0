"""One run of the demo: read, compress, ask, compare."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.progress import Progress

from ..config import SelfIndexConfig
from ..evaluation.cache_layers import full_attention_layers
from ..evaluation.fidelity import continue_from
from ..evaluation.models import Loaded
from ..evaluation.tasks.fact import Task, build_task
from ..integrations.transformers import SelfIndexCache
from ..report import Report
from .console import CommandError
from .measure import Fidelity, Reply, fidelity, read, reply, rewind

ANSWER_STEPS = 20


@dataclass
class Result:
    """Everything the screen shows.

    Attributes:
        seconds: duration of each stage, in order.
        read_tokens, cached: tokens read per step and head, and tokens in the cache, at the last step.
        report: of the cache right after the document.
        pair_bytes, dense_pair_bytes: of one encoded token in one KV head: compressed, and in 16 bits.
    """

    model: str
    device: str
    task: Task
    config: SelfIndexConfig
    depth: float
    seconds: dict[str, float] = field(default_factory=dict)
    encode_seconds: float = 0.0
    dense: Reply = field(default_factory=lambda: Reply("", 0.0))
    ours: Reply = field(default_factory=lambda: Reply("", 0.0))
    report: Report = field(default_factory=lambda: Report("", []))
    pair_bytes: float = 0.0
    dense_pair_bytes: int = 0
    read_tokens: int = 0
    cached: int = 0
    fidelity: Fidelity = field(default_factory=lambda: Fidelity(0, 0, 0.0))

    def right(self, answer: Reply) -> bool:
        """Whether a reply contains the hidden answer."""
        return self.task.answer in answer.text


def run(
    loaded: Loaded,
    text: str,
    config: SelfIndexConfig,
    tokens: int,
    depth: float,
    seed: int,
    bars: Progress,
    compared: int,
) -> Result:
    """The whole demo on a loaded model; prints nothing but progress.

    Raises:
        CommandError: the text does not fit the model's context.
    """
    task = build_task(loaded.tokenizer, text, tokens, depth, seed, compared)
    document, question = task.document, task.question_ids
    need = tokens + max(question.shape[1] + ANSWER_STEPS, compared)
    limit = loaded.model.config.max_position_embeddings
    if need > limit:
        raise CommandError(
            f"the model's context is {limit:,} tokens; --tokens can be at most {limit - need + tokens:,}"
        )
    result = Result(loaded.name, str(loaded.model.device), task, config, depth)

    def stage(name: str, description: str, total: int) -> Callable[[], None]:
        """Start a stage; the time up to the next start is its duration."""
        bar = bars.add_task(description, total=total)
        result.seconds[name] = 0.0
        marks.append((name, time.perf_counter()))
        return lambda: bars.advance(bar)

    marks: list[tuple[str, float]] = []
    layers = len(full_attention_layers(loaded.model))
    reading = read(loaded, config, document, stage("read", f"read {tokens:,} tokens and compress", layers))
    cache, dense = reading.cache, reading.dense
    result.encode_seconds = reading.encode_seconds
    result.report = cache.report(missed=False)
    result.pair_bytes, result.dense_pair_bytes = _bytes_of_a_pair(cache)

    tick = stage("ask", "ask, dense and compressed", 2 * ANSWER_STEPS)
    result.dense = reply(loaded, dense, question, ANSWER_STEPS, tick)
    result.ours = reply(loaded, cache, question, ANSWER_STEPS, tick)
    last = cache.report(missed=False).layers
    result.read_tokens, result.cached = max(layer.read for layer in last), last[0].tokens
    for used in (dense, cache):
        rewind(used, tokens)

    tick = stage("compare", f"compare {compared} predictions", 2)
    probabilities = []
    for used in (dense, cache):
        fed = task.continuation.to(loaded.model.device)
        probabilities.append(continue_from(loaded.model, used, fed))
        tick()
    result.fidelity = fidelity(*probabilities)

    ends = [start for _, start in marks[1:]] + [time.perf_counter()]
    result.seconds = {name: end - start for (name, start), end in zip(marks, ends, strict=True)}
    return result


def _bytes_of_a_pair(cache: SelfIndexCache) -> tuple[float, int]:
    """Bytes of one encoded token in one KV head, and of its 16-bit key and value."""
    memory, pairs, head_dim = cache.report(missed=False).memory, 0, 0
    for layer in cache.compressed_layers:
        assert layer.store is not None
        pairs += layer.store.format.kv_heads * layer.store.encoded(0)
        head_dim = layer.store.format.head_dim
    return (memory.index + memory.payload) / max(1, pairs), 4 * head_dim
