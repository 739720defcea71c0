"""Running a suite: every measurement becomes a record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from ..errors import InputError
from .baselines import LIBRARY, Unavailable
from .fidelity import compare, continue_from
from .layers import Seen, measure, observe
from .methods import Candidate, answering, head_dim, methods, own_bytes, wanted
from .quiz import Quiz
from .recording import Recording, record
from .records import Records
from .suites import Suite
from .tasks import TASKS, Sample, Source, needle
from .tasks.sample import whole_pages
from .timing import attempt

START = 20000
"""First character of a text that is used: past title pages and tables of contents."""

PROBE, FLOOR = 8, 0.25
"""Where the dense model scores less than FLOOR on the first PROBE samples, other methods are not run."""

LAYER_QUERIES = 64
"""Queries over which attention is compared layer by layer."""

NO_MEMORY = "out of memory"

ALONE, TOGETHER = 1, 8
"""Batch sizes whose replies are compared."""


@dataclass
class Run:
    """A suite on one model.

    Args:
        texts: name -> text.
        batch: prompts at a time; None fits them to the device.
        tick: called with the number of records that a step added, or found there already.
        deadline: of `time.monotonic`, after which no method is asked any more.
    """

    model: Any
    tokenizer: Any
    suite: Suite
    texts: dict[str, str]
    budget: float
    records: Records
    batch: int | None = None
    tick: Callable[[int], None] = lambda steps: None
    deadline: float = math.inf
    candidates: dict[str, Candidate] = field(init=False)
    quiz: Quiz = field(init=False)
    unavailable: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        suite, dim = self.suite, head_dim(self.model)
        teacher_forced = methods(self.budget, dim)
        self.candidates = {name: teacher_forced[name] for name in wanted(teacher_forced, suite.methods)}
        asked = answering(self.budget, dim, suite.policies, suite.prefills)
        self.quiz = Quiz(
            self.model,
            self.tokenizer,
            {name: asked[name] for name in wanted(asked, suite.methods)},
            self.batch,
        )
        self.unavailable = self.quiz.unavailable

    def total(self, part: str) -> int:
        """Records that a part adds at most."""
        suite, count, asked = self.suite, len(self.candidates), len(self.quiz.candidates)
        return {
            "fidelity": len(suite.fidelity) * len(self.texts) * count,
            "layers": len(suite.layers) * len(self.texts) * count,
            "tasks": len(suite.tasks) * len(suite.task_lengths) * suite.samples * asked,
            "heatmap": len(suite.heat) * suite.depths * suite.heat_samples * len(self._heat_methods()),
            "batches": len(suite.batch_tasks) * TOGETHER * len(self._batch_methods()),
        }[part]

    def run(self, part: str) -> None:
        """Measure what is not in the records yet."""
        parts = {
            "fidelity": self._fidelity,
            "layers": self._layers,
            "tasks": self._tasks,
            "heatmap": self._heatmap,
            "batches": self._batches,
        }
        parts[part]()

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() > self.deadline

    def _heat_methods(self) -> list[str]:
        return wanted(self.quiz.candidates, self.suite.heat_methods)

    def _batch_methods(self) -> list[str]:
        return wanted(self.quiz.candidates, (f"selfindex balanced {100 * self.budget:g} %",))

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
                if self.late:
                    return
                measured = partial(self._continued, name, recording, dense, fed, targets)
                self._add_row(measured, part="fidelity", name=text, length=length, method=name)

    def _layers(self) -> None:
        for text, length, todo, ids in self._prefixes("layers", self.suite.layers):
            cut = whole_pages(length - LAYER_QUERIES)
            recording = record(self.model, ids[:, :cut])
            seen = observe(self.model, recording, ids[:, cut : cut + LAYER_QUERIES])
            for name in todo:
                if self.late:
                    return
                measured = partial(self._by_layer, name, recording, seen)
                self._add_row(measured, part="layers", name=text, length=length, method=name)

    def _continued(
        self, name: str, recording: Recording, dense: Tensor, fed: Tensor, targets: Tensor
    ) -> dict[str, Any]:
        cache, size = self._fill(name, recording)
        found = compare(dense, continue_from(self.model, cache, fed), targets)
        return size | {key: [round(float(x), 6) for x in values] for key, values in found.items()}

    def _by_layer(self, name: str, recording: Recording, seen: list[Seen]) -> dict[str, Any]:
        if name in LIBRARY:
            raise Unavailable("its layers do not tell what they read")
        cache, _ = self._fill(name, recording)
        return measure(cache, recording, seen, self.budget)

    def _add_row(self, measured: Callable[[], dict[str, Any]], **key: Any) -> None:
        """Record a measurement, or that there was no memory for it; nothing of a method that cannot run."""
        try:
            found = attempt(measured)
        except Unavailable as error:
            self.unavailable[key["method"]] = str(error)
        else:
            self.records.add(**key, **({"failed": NO_MEMORY} if found is None else found))
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

                self._replies("tasks", task, length, self.suite.samples, list(self.quiz.candidates), make)

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
        size = self.quiz.rows(length)
        for first in range(0, count, size):
            if self.late:
                return
            rows = range(first, min(first + size, count))
            todo = [m for m in names if not all(has(sample=i, method=m) for i in rows)]
            todo = [m for m in todo if m not in self.unavailable]
            if not todo or (todo[0] != "dense" and self._hopeless(part, name, length)):
                self.tick(len(rows) * len(names))
                continue
            self.tick(len(rows) * (len(names) - len(todo)))
            for samples in _by_length({i: self._asked(make(i)) for i in rows}):
                for recording, group in self.quiz.prefilled(samples):
                    self._group(part, name, length, todo, recording, group)

    def _asked(self, sample: Sample) -> Sample:
        return sample.in_prompt() if self.suite.asked == "prompt" else sample

    def _group(
        self,
        part: str,
        name: str,
        length: int,
        todo: list[str],
        recording: Recording | None,
        samples: dict[int, Sample],
    ) -> None:
        """Record what methods answer to samples that were read together."""
        for method in todo:
            if self.late:
                return
            # Dense comes first, and where it fails there is nothing to compare.
            skipped = method != "dense" and self._hopeless(part, name, length)
            if recording is not None and not skipped:
                answered = self.quiz.ask(method, recording, list(samples.values())) or []
                given = dict(zip(samples, answered, strict=False))
            else:
                given = {}
            for i, sample in samples.items():
                key = {"part": part, "name": name, "length": length, "sample": i, "method": method}
                said = given.get(i)
                if self.records.has(**key) or skipped or method in self.unavailable:
                    continue
                if said is None or said.replies is None:
                    self.records.add(**key, failed=NO_MEMORY)
                    continue
                where = {"depth": self._depth(i)} if part == "heatmap" else {}
                found = sample.scores(said.replies) | said.sizes
                reply: Any = said.replies if sample.later else said.replies[0]
                self.records.add(**key, **where, **found, reply=reply, answers=sample.answers)
            self.tick(len(samples))

    def _batches(self) -> None:
        """Whether replies depend on the number of prompts that are answered at a time."""
        source, length, methods = self._sources()[0], self.suite.task_lengths[0], self._batch_methods()
        for task in self.suite.batch_tasks:
            key = {"part": "batches", "name": task, "length": length}
            has = partial(self.records.has, **key)
            todo = [m for m in methods if not all(has(sample=i, method=m) for i in range(TOGETHER))]
            self.tick(TOGETHER * (len(methods) - len(todo)))
            # Of one length, as a batch has to be.
            samples = _by_length({i: TASKS[task](source, length, i) for i in range(2 * TOGETHER)})
            chosen = list(max(samples, key=len).values())[:TOGETHER]
            for method in todo:
                if self.late:
                    return
                both = (self._said(method, chosen, size) for size in (ALONE, TOGETHER))
                for i, (sample, one, many) in enumerate(zip(chosen, *both, strict=True)):
                    if has(sample=i, method=method):
                        continue
                    if one is None or many is None:
                        self.records.add(**key, sample=i, method=method, failed=NO_MEMORY)
                        continue
                    scores = {"score": sample.scores(one)["score"], "together": sample.scores(many)["score"]}
                    self.records.add(**key, sample=i, method=method, **scores, same=one == many)
                self.tick(TOGETHER)

    def _said(self, method: str, samples: list[Sample], size: int) -> list[list[str] | None]:
        """Replies of a method, `size` prompts at a time; None where there was no memory."""
        found: list[list[str] | None] = []
        for first in range(0, len(samples), size):
            for recording, group in self.quiz.prefilled(dict(enumerate(samples[first : first + size]))):
                answered = recording and self.quiz.ask(method, recording, list(group.values()))
                found += [one.replies for one in answered] if answered else [None] * len(group)
        return found

    def _hopeless(self, part: str, name: str, length: int) -> bool:
        if part != "tasks":
            return False
        scores = [
            row["score"]
            for row in self.records.of(part)
            if (row["name"], row["length"], row["method"]) == (name, length, "dense")
            and row["sample"] < PROBE
            and "score" in row
        ]
        return len(scores) >= PROBE and sum(scores) / len(scores) < FLOOR


def _by_length(samples: dict[int, Sample]) -> list[dict[int, Sample]]:
    """Samples by the length of their documents."""
    groups: dict[int, dict[int, Sample]] = {}
    for i, sample in samples.items():
        groups.setdefault(len(sample.document), {})[i] = sample
    return list(groups.values())
