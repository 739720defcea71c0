"""What a task's sample is, how it is scored, and the text and words that samples are made from."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ...config import SelfIndexConfig
from ...errors import InputError
from .judges import ALL_FOUND, Judge

MARK = "@TEXT@"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


@dataclass(frozen=True)
class Turn:
    """One question: token ids that are read, and what the reply to them should hold."""

    question: list[int]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """One prompt. Together, document, questions and replies are no longer than was asked for.

    Attributes:
        document: token ids that are read and compressed.
        question: token ids that follow: the end of the document, the question, the reply's start; none
            where they are part of the document.
        answers: what `judge` looks for in the reply.
        new_tokens: tokens a reply may have.
        later: further turns of a chat, whose replies all have `new_tokens` tokens; their
            questions begin at the end of the reply before.
    """

    document: list[int]
    question: list[int]
    answers: tuple[str, ...]
    new_tokens: int
    judge: Judge = ALL_FOUND
    later: tuple[Turn, ...] = ()

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All questions in order."""
        return (Turn(self.question, self.answers), *self.later)

    @property
    def length(self) -> int:
        """Tokens that the model holds when all replies are as long as they may be."""
        asked = sum(len(turn.question) + self.new_tokens for turn in self.turns)
        return len(self.document) + asked

    def in_prompt(self) -> Sample:
        """The same with its first question in the document: as a prompt to `generate`."""
        return replace(self, document=self.document + self.question, question=[])

    def scores(self, replies: Sequence[str]) -> dict[str, float]:
        """What the judge says of one reply a turn, the mean over the turns."""
        found = [
            self.judge.scores(reply, turn.answers) for reply, turn in zip(replies, self.turns, strict=True)
        ]
        return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


class Maker(Protocol):
    """A task: makes the sample of a seed."""

    def __call__(self, source: Source, length: int, seed: int) -> Sample:
        """A sample whose prompt and reply together have `length` tokens at most."""


@dataclass
class Source:
    """A tokenizer and a haystack.

    Args:
        tokenizer: of the model under test.
        text: a long text in any language the model reads.
    """

    tokenizer: Any
    text: str
    _ends_line: dict[int, bool] = field(default_factory=dict)
    _words: list[str] = field(default_factory=list)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    @property
    def words(self) -> list[str]:
        """Common lower-case words of 4 to 8 letters of the text, sorted."""
        if not self._words:
            counts = Counter(re.findall(r"\b[a-z]{4,8}\b", self.text[:1_000_000]))
            self._words = sorted(word for word, _ in counts.most_common(3000))
            if len(self._words) < 1000:
                raise InputError(
                    f"the text has {len(self._words)} different words, the tasks need 1000; give a longer one"
                )
        return self._words

    def essay(self, rng: random.Random, tokens: int) -> list[int]:
        """`tokens` token ids of a random stretch of the text, from a line's start."""
        start = self.text.find("\n", rng.randrange(max(1, len(self.text) - 12 * tokens))) + 1
        ids = self.encode(self.text[start : start + 12 * tokens])
        if len(ids) < tokens:
            raise InputError(f"the text is too short for a haystack of {tokens} tokens; give a longer one")
        return ids[:tokens]

    def noise(self, tokens: int) -> list[int]:
        """`tokens` token ids of RULER's repeated sentences."""
        line = self.encode(NOISE)
        return (line * (1 + tokens // len(line)))[:tokens]

    def breaks(self, ids: list[int]) -> list[int]:
        """Places in ids where a line may be inserted: 0 and after every line end."""
        for token in set(ids) - self._ends_line.keys():
            self._ends_line[token] = "\n" in self.tokenizer.decode([token])
        return [0, *(i + 1 for i, token in enumerate(ids) if self._ends_line[token])]

    def insert(self, ids: list[int], lines: Sequence[str], depths: Sequence[float]) -> list[int]:
        """Put lines into a haystack, each at the first line break from its depth (0 to 1) on."""
        places = self.breaks(ids)
        marked = []
        for line, depth in zip(lines, depths, strict=True):
            at = next((p for p in places if p >= depth * len(ids)), places[-1])
            marked.append((at, self.encode(line + "\n")))
        for at, piece in sorted(marked, key=lambda pair: pair[0], reverse=True):
            ids = ids[:at] + piece + ids[at:]
        return ids

    def frame(self, before: str, after: str, reply: str) -> tuple[list[int], list[int]]:
        """Token ids around a document: of the turn's start, and of its end with the reply's start."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            return self.encode(before), self.encode(f"{after} {reply}")
        message = [{"role": "user", "content": before + MARK + after}]
        chat = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        head, tail = chat.split(MARK)
        return self.encode(head), self.encode(tail + reply)


def assemble(
    head: list[int],
    haystack: list[int],
    tail: list[int],
    answers: Sequence[str],
    new: int,
    judge: Judge = ALL_FOUND,
    later: tuple[Turn, ...] = (),
) -> Sample:
    """A sample, its document cut where `whole_pages` says; most samples of a task are cut alike and
    make a batch. What the document loses precedes the question.
    """
    prompt = head + haystack + tail
    cut = whole_pages(len(prompt) - len(tail))
    return Sample(prompt[:cut], prompt[cut:], tuple(answers), new, judge, later)


def whole_pages(tokens: int) -> int:
    """The longest prefix of at most `tokens` that the default preset stores in whole pages.

    Besides its sinks and recent tokens it keeps a page that is not full in full precision. Such a
    prefix has none, so that all methods keep as many tokens exactly.
    """
    default = SelfIndexConfig()
    exact, page = default.sinks + default.recent, default.page_size
    return exact + max(1, (tokens - exact) // page) * page


def space(length: int, head: list[int], tail: list[int], new: int) -> int:
    """Tokens left for the haystack.

    Raises:
        InputError: too few.
    """
    left = length - len(head) - len(tail) - new
    # The document has to hold a page at least.
    if left < 64 or len(head) + left < whole_pages(0):
        raise InputError(f"{length} tokens are too few for this task")
    return left
