"""Running a suite: every measurement becomes a record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..errors import InputError
from .fidelity import compare, continue_from
from .layers import measure, observe
from .methods import Candidate, head_dim, methods, own_bytes
from .recording import Recording, record
from .records import Records
from .replies import read, replies
from .suites import Suite
from .tasks import TASKS, Sample, Source, needle, score
from .tasks.sample import whole_pages

START = 20000
"""First character of a text that is used: past title pages and tables of contents."""

PROBE, FLOOR = 4, 0.25
"""Where the dense model scores less than FLOOR after PROBE samples, other methods are not run."""

LAYER_QUERIES = 64
"""Queries over which attention is compared layer by layer."""

BATCH_TOKENS = 1 << 17
"""Tokens of all prompts of a batch on a GPU."""


@dataclass
class Run:
    """A suite on one model.

    Args:
        texts: name -> text.
        batch: prompts at a time; None fits them to the device.
        tick: called with the number of records that a step added, or found there already.
    """

    model: Any
    tokenizer: Any
    suite: Suite
    texts: dict[str, str]
    budget: float
    records: Records
    batch: int | None = None
    tick: Callable[[int], None] = lambda steps: None
    candidates: dict[str, Candidate] = field(init=False)

    def __post_init__(self) -> None:
        found = methods(self.budget, head_dim(self.model))
        wanted = self.suite.methods
        self.candidates = {
            name: found[name] for name in found if name == "dense" or not wanted or name.startswith(wanted)
        }

    def total(self, part: str) -> int:
        """Records that a part adds at most."""
        suite, count = self.suite, len(self.candidates)
        return {
            "fidelity": len(suite.fidelity) * len(self.texts) * count,
            "layers": len(suite.layers) * len(self.texts) * count,
            "tasks": len(suite.tasks) * len(suite.task_lengths) * suite.samples * count,
            "heatmap": len(suite.heat) * suite.depths * suite.heat_samples * len(self._heat_methods()),
        }[part]

    def run(self, part: str) -> None:
        """Measure what is not in the records yet."""
        parts = {
            "fidelity": self._fidelity,
            "layers": self._layers,
            "tasks": self._tasks,
            "heatmap": self._heatmap,
        }
        parts[part]()

    def _heat_methods(self) -> list[str]:
        return [m for m in self.candidates if m == "dense" or m.startswith(self.suite.heat_methods)]

    def _prefixes(self, part: str, lengths: tuple[int, ...]) -> Iterator[tuple[str, int, list[str], Any]]:
        """(text, length, methods to run, token ids [1, length + 1]) of what is missing."""
        for length in lengths:
            for text, content in self.texts.items():
                todo = [
                    m
                    for m in self.candidates
                    if not self.records.has(part=part, name=text, length=length, method=m)
                ]
                self.tick(len(self.candidates) - len(todo))
                if todo:
                    start = START if len(content) > START + 12 * length else 0
                    ids = self.tokenizer(
                        content[start : start + 12 * length], return_tensors="pt", add_special_tokens=False
                    ).input_ids[:, : length + 1]
                    if ids.shape[1] <= length:
                        raise InputError(
                            f"the text {text} has {ids.shape[1]} tokens, {length + 1} are needed; give a "
                            "longer one, or fewer tokens with --length"
                        )
                    yield text, length, todo, ids.to(self.model.device)

    def _fidelity(self) -> None:
        for text, length, todo, ids in self._prefixes("fidelity", self.suite.fidelity):
            cut = whole_pages(length - self.suite.continuation)
            end = cut + self.suite.continuation
            fed, targets = ids[:, cut:end], ids[0, cut + 1 : end + 1]
            recording = record(self.model, ids[:, :cut])
            dense = continue_from(self.model, recording.dense_copy(), fed)
            for name in todo:
                cache, size = self._fill(name, recording)
                found = compare(dense, continue_from(self.model, cache, fed), targets)
                tokens = {metric: [round(float(x), 6) for x in values] for metric, values in found.items()}
                self.records.add(part="fidelity", name=text, length=length, method=name, **size, **tokens)
                self.tick(1)

    def _layers(self) -> None:
        for text, length, todo, ids in self._prefixes("layers", self.suite.layers):
            cut = whole_pages(length - LAYER_QUERIES)
            recording = record(self.model, ids[:, :cut])
            seen = observe(self.model, recording, ids[:, cut : cut + LAYER_QUERIES])
            for name in todo:
                cache, _ = self._fill(name, recording)
                found = measure(cache, recording, seen, self.budget)
                self.records.add(part="layers", name=text, length=length, method=name, **found)
                self.tick(1)

    def _fill(self, name: str, recording: Recording) -> tuple[Any, dict[str, float]]:
        """A candidate's cache, and its bytes per token and KV head."""
        make, stored, reads = self.candidates[name]
        cache = make(self.model, recording)
        if stored is None or reads is None:
            stored, reads = own_bytes(cache)
        return cache, {"bytes": stored, "read": reads}

    def _sources(self) -> list[Source]:
        return [Source(self.tokenizer, text) for text in self.texts.values()]

    def _tasks(self) -> None:
        sources = self._sources()
        for length in self.suite.task_lengths:
            for task in self.suite.tasks:

                def make(i: int, task: str = task, length: int = length) -> Sample:
                    return TASKS[task](sources[i % len(sources)], length, i)

                self._replies("tasks", task, length, self.suite.samples, list(self.candidates), make)

    def _heatmap(self) -> None:
        sources, suite = self._sources(), self.suite
        for length in suite.heat:

            def make(i: int, length: int = length) -> Sample:
                return needle(sources[i % len(sources)], length, i, depth=self._depth(i))

            count = suite.depths * suite.heat_samples
            self._replies("heatmap", "niah_single_2", length, count, self._heat_methods(), make)

    def _depth(self, i: int) -> float:
        """Depth of the heatmap's i-th needle."""
        return i // self.suite.heat_samples / max(1, self.suite.depths - 1)

    def _replies(
        self, part: str, name: str, length: int, count: int, names: list[str], make: Callable[[int], Sample]
    ) -> None:
        """Score `count` samples, those of a batch with one prefill for all methods."""
        has = partial(self.records.has, part=part, name=name, length=length)
        size = self.batch or self._batch(length)
        for first in range(0, count, size):
            rows = range(first, min(first + size, count))
            todo = [m for m in names if not all(has(sample=i, method=m) for i in rows)]
            self.tick(len(rows) * (len(names) - len(todo)))
            if not todo or (todo[0] != "dense" and self._hopeless(part, name, length)):
                self.tick(len(rows) * len(todo))
                continue
            groups: dict[int, dict[int, Sample]] = {}
            for i in rows:
                sample = make(i)
                groups.setdefault(len(sample.document), {})[i] = sample
            for group in groups.values():
                self._group(part, name, length, todo, group)
            self.tick(len(rows) * len(todo))

    def _group(self, part: str, name: str, length: int, todo: list[str], samples: dict[int, Sample]) -> None:
        """Score samples with documents of one length, and record what is new."""
        recording = read(self.model, list(samples.values()))
        for method in todo:
            # Dense comes first, and where it fails there is nothing to compare.
            if method != "dense" and self._hopeless(part, name, length):
                continue
            cache = self.candidates[method].make(self.model, recording)
            texts = replies(self.model, self.tokenizer, cache, list(samples.values()))
            for (i, sample), text in zip(samples.items(), texts, strict=True):
                key = {"part": part, "name": name, "length": length, "sample": i, "method": method}
                if not self.records.has(**key):
                    where = {"depth": self._depth(i)} if part == "heatmap" else {}
                    found = {"score": score(text, sample.answers), "reply": text, "answers": sample.answers}
                    self.records.add(**key, **where, **found)

    def _batch(self, length: int) -> int:
        return max(1, BATCH_TOKENS // length) if self.model.device.type == "cuda" else 1

    def _hopeless(self, part: str, name: str, length: int) -> bool:
        if part != "tasks":
            return False
        scores = [
            row["score"]
            for row in self.records.of(part)
            if row["name"] == name and row["length"] == length and row["method"] == "dense"
        ]
        return len(scores) >= PROBE and sum(scores) / len(scores) < FLOOR
