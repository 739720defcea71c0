"""Questions over the caches of several methods, within the memory that there is."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .baselines import Unavailable
from .methods import Candidate, own_bytes
from .recording import PASS_TOKENS, SAMPLED_QUERIES, Recording
from .replies import read, replies
from .tasks import Sample
from .timing import attempt, free_memory

MOST_ROWS = {"cuda": 64, "cpu": 8}
"""Prompts at a time at most; a batch that waits for its longest reply gains little from more."""

USED = 0.75
"""Share of the free memory that a batch is meant to fill; attention and fragments need the rest."""


@dataclass(frozen=True)
class Answered:
    """What a method said to one sample: a reply a turn, or None where there was not enough memory.

    Attributes:
        sizes: "bytes" held and "read" by a step, per token and KV head; empty without replies.
    """

    replies: list[str] | None
    sizes: dict[str, float]


class Quiz:
    """Asks a model the questions of samples over caches of candidates.

    Args:
        batch: prompts at a time; None takes what fits the free memory.

    Attributes:
        unavailable: why candidates cannot run here, by name, as far as it is known.
    """

    def __init__(
        self, model: Any, tokenizer: Any, candidates: dict[str, Candidate], batch: int | None = None
    ) -> None:
        self.model, self.tokenizer, self.candidates, self._batch = model, tokenizer, candidates, batch
        self.unavailable: dict[str, str] = {}

    def rows(self, length: int) -> int:
        """Prompts of so many tokens to take at a time."""
        device = self.model.device
        if self._batch is not None:
            return self._batch
        fit = USED * (free_memory(device) - self._pass_bytes(length)) / self._prompt_bytes(length)
        return max(1, min(int(fit), MOST_ROWS.get(device.type, 1)))

    def _prompt_bytes(self, length: int) -> float:
        """Of a prompt: its recording, and what a method makes of it, with an index of three quarters more."""
        text = self.model.config.get_text_config()
        heads, layers = text.num_attention_heads, text.num_hidden_layers
        dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        pairs = 2 * layers * (getattr(text, "num_key_value_heads", None) or heads)
        queries = layers * heads * min(length, SAMPLED_QUERIES)
        return float(self.model.dtype.itemsize * dim * (2.75 * pairs * length + queries))

    def _pass_bytes(self, length: int) -> float:
        """Of a pass over documents, beside what is kept of it."""
        text = self.model.config.get_text_config()
        width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        return float(
            self.model.dtype.itemsize * max(PASS_TOKENS, length) * (8 * text.hidden_size + 4 * width)
        )

    def prefilled(self, samples: dict[int, Sample]) -> Iterator[tuple[Recording | None, dict[int, Sample]]]:
        """Recordings of samples with documents of one length: all at once, or as many as there is memory for.

        Yields:
            (recording, its samples); None where there is no memory for a single one.
        """
        recording = attempt(lambda: read(self.model, list(samples.values())))
        if recording is not None or len(samples) == 1:
            yield recording, samples
            return
        keys = list(samples)
        for part in (keys[: len(keys) // 2], keys[len(keys) // 2 :]):
            yield from self.prefilled({key: samples[key] for key in part})

    def ask(self, name: str, recording: Recording, samples: Sequence[Sample]) -> list[Answered] | None:
        """A candidate's answers to samples that were recorded; None if it is unavailable."""
        if name in self.unavailable:
            return None
        try:
            return self._ask(name, recording, samples)
        except Unavailable as error:
            self.unavailable[name] = str(error)
            return None
        finally:
            if self.model.device.type == "cuda":
                gc.collect()  # recorded graphs, and the memory that belongs to them, may wait for it

    def _ask(self, name: str, recording: Recording, samples: Sequence[Sample]) -> list[Answered]:
        def answer() -> list[Answered]:
            make, stored, reads = self.candidates[name]
            cache = make(self.model, recording)
            if stored is None or reads is None:
                stored, reads = own_bytes(cache)
            sizes = {"bytes": round(stored, 2), "read": round(reads, 2)}
            texts = replies(self.model, self.tokenizer, cache, samples, recording.following)
            return [Answered(one, sizes) for one in texts]

        found = attempt(answer)
        if found is not None:
            return found
        if len(samples) == 1:
            return [Answered(None, {})]
        half = len(samples) // 2
        first = self._ask(name, recording.rows(0, half), samples[:half])
        return first + self._ask(name, recording.rows(half, len(samples)), samples[half:])
