"""A document that a model reads once, and the questions and answers after it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria

from ..config import SelfIndexConfig
from ..errors import StateError
from ..evaluation.models import Loaded, check_length
from ..evaluation.turns import Turns
from ..integrations.transformers import SelfIndexCache
from .console import CommandError
from .streaming import TimedStreamer

CHUNK = 8192
"""Tokens of a document read at a time: attention within them is exact, and memory stays bounded."""

KIND, VERSION = "selfindex-conversation", 1


class Stop(StoppingCriteria):
    """Ends an answer after the token at which `wanted` is set."""

    def __init__(self) -> None:
        self.wanted = False

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.wanted, dtype=torch.bool, device=input_ids.device)


@dataclass
class Conversation:
    """What was read and said so far, as tokens and in a cache.

    Attributes:
        ids: all tokens; the cache holds them, but perhaps not the last one.
        document: how many of them are the document and what comes before it.
    """

    loaded: Loaded
    turns: Turns
    cache: SelfIndexCache
    ids: list[int] = field(default_factory=list)
    document: int = 0

    def __post_init__(self) -> None:
        self._start: SelfIndexCache | None = None
        self._keep_start()

    def _keep_start(self) -> None:
        """Remember the cache as it is after the document, where what was said since can be taken back."""
        start = self.cache.fork()
        said = start.get_seq_length() - self.document
        with suppress(StateError):  # a loaded window or state has nothing of before
            if said > 0:
                start.crop(-said)
            self._start = start

    @torch.inference_mode()
    def read(self, text: str, room: int, tick: Callable[[float], None]) -> None:
        """Read a document and compress it.

        Args:
            room: tokens to leave for a question and its answer.
            tick: called with the share of the work that was done since the last call.

        Raises:
            CommandError: the document does not fit the model's context.
        """
        head, _ = self.turns.around("")
        ids = self.turns.encode(head + text, start=True)
        check_length(self.loaded, len(ids), room)
        model, left = self.loaded.model, torch.tensor([ids], device=self.loaded.model.device)
        layers = getattr(model.base_model, "layers", None) or [model]
        done = 0

        def after_layer(*_: Any) -> None:
            tick(done / len(ids) / len(layers))

        hooks = [layer.register_forward_hook(after_layer) for layer in layers]
        try:
            for chunk in left.split(CHUNK, dim=1):
                done = chunk.shape[1]
                model(chunk, use_cache=True, logits_to_keep=1, **{self.loaded.cache_argument: self.cache})
        finally:
            for hook in hooks:
                hook.remove()
        self.ids, self.document = ids, len(ids)
        self._keep_start()

    @torch.inference_mode()
    def ask(self, question: str, most: int, streamer: TimedStreamer, stop: Stop) -> None:
        """Answer a question; the answer goes to the streamer. An error or interrupt forgets the question.

        Raises:
            CommandError: the conversation does not fit the model's context.
        """
        ids = self.ids + self.turns.encode(self._framed(question), start=not self.ids)
        check_length(self.loaded, len(ids), most)
        model, cache = self.loaded.model, self.cache.fork()
        given = torch.tensor([ids], device=model.device)
        output = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=most,
            do_sample=False,
            streamer=streamer,
            stopping_criteria=[stop],
            **{self.loaded.cache_argument: cache},
        )
        said: list[int] = output[0].tolist()
        ends = model.generation_config.eos_token_id
        if said[-1] in (ends if isinstance(ends, list) else [ends]):
            said.pop()  # the next turn begins with the end of this one
        if cache.get_seq_length() > len(said):
            cache.crop(len(said) - cache.get_seq_length())
        self.ids, self.cache = said, cache

    def _framed(self, question: str) -> str:
        if len(self.ids) > self.document:
            return self.turns.later(question)
        return self.turns.around(question)[1] if self.document else self.turns.alone(question)

    def reset(self) -> None:
        """Forget what was said after the document.

        Raises:
            CommandError: it was loaded, and the model has layers that cannot go back.
        """
        if self._start is None:
            raise CommandError(
                "what was said cannot be taken back from this file: it has the model's sliding windows or "
                "states as they are now; read the document again with --file"
            )
        self.cache, self.ids = self._start.fork(), self.ids[: self.document]

    def set_budget(self, budget: float | int) -> None:
        """Change how much the answers to come read; see `SelfIndexCache.set_budget`."""
        self.cache.set_budget(budget)
        if self._start is not None:
            self._start.set_budget(budget)

    def save(self, path: Path) -> None:
        """Write the compressed tokens to `path`, and which tokens they are to `path`.json.

        Raises:
            StateError: there is nothing to save, or the cache cannot be saved.
            OSError: a file cannot be written.
        """
        self.cache.save(self.loaded.model, path)
        facts = {
            "format": KIND,
            "version": VERSION,
            "cache": _identity(path),
            "chat": self.turns.chat,
            "document": self.document,
            "ids": self.ids,
        }
        beside = _beside(path)
        draft = beside.with_name(f".{beside.name}.draft")
        draft.write_text(json.dumps(facts), encoding="utf-8")
        os.replace(draft, beside)

    @classmethod
    def load(cls, loaded: Loaded, turns: Turns, path: Path, offloading: bool | None = None) -> Conversation:
        """Go on from what `save` wrote; nothing is read again.

        Raises:
            CommandError: the two files do not belong together, or not to these options.
            FormatError: the file is damaged or of another model.
        """
        facts = _facts(path)
        if facts["cache"] != _identity(path):
            raise CommandError(f"{path} and {_beside(path)} were not written together; save them again")
        if facts["chat"] != turns.chat:
            raise CommandError(
                f"{path} was saved {'with' if facts['chat'] else 'without'} a chat template; "
                f"{'leave out' if facts['chat'] else 'give'} --raw"
            )
        cache = SelfIndexCache.load(loaded.model, path, offloading)
        return cls(loaded, turns, cache, facts["ids"], facts["document"])

    @classmethod
    def start(cls, loaded: Loaded, turns: Turns, config: SelfIndexConfig) -> Conversation:
        """A conversation in which nothing was said yet."""
        return cls(loaded, turns, SelfIndexCache(loaded.model, config))


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _identity(path: Path) -> str:
    """Of a cache's file: a digest of its header, which has the checksums of all its tensors."""
    with path.open("rb") as file:
        return hashlib.sha256(file.read(min(int.from_bytes(file.read(8), "little"), 1 << 28))).hexdigest()


def _facts(path: Path) -> dict[str, Any]:
    beside = _beside(path)
    if path.is_file() and not beside.is_file():
        raise CommandError(
            f"{beside} is missing: it says which tokens {path} holds; keep the two files together"
        )
    try:
        facts: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8"))
        known = (facts["format"], facts["version"]) == (KIND, VERSION)
        known = known and facts.keys() >= {"cache", "chat", "document", "ids"}
    except (ValueError, TypeError, KeyError):
        known = False
    if not known:
        raise CommandError(f"{beside} is not what `selfindex chat --save` of this release writes")
    return facts
