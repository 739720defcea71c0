"""A chat of ten turns over one document, whose later turns are read and answered over what a cache has made
of the document, of the questions and of its own replies before.
"""

from __future__ import annotations

import random

from ..turns import Turns
from .needles import INSTRUCTION, NEEDLE, ONE_QUESTION, ONE_REPLY
from .sample import Sample, Source, Turn, assemble, space

TURNS = 10
KIND = "number"
MODEL_KEY = "silver-garden"
"""Every question is as long as the one for this key, so that a batch keeps in step."""


def ten_questions(source: Source, length: int, seed: int) -> Sample:
    """Ten needles with two-word keys, and a question for each; every reply is as long as a number."""
    rng = random.Random(f"chat {length} {seed}")
    turns = Turns(source.tokenizer)

    def first(key: str) -> tuple[list[int], list[int]]:
        question = ONE_QUESTION.format(kind=KIND, keys=key)
        return source.frame(
            INSTRUCTION.format(kind=f"{KIND}s"), question, ONE_REPLY.format(kind=KIND, keys=key)
        )

    def later(key: str) -> list[int]:
        reply = ONE_REPLY.format(kind=KIND, keys=key)
        text = turns.later(ONE_QUESTION.format(kind=KIND, keys=key).strip())
        # As `frame` joins them.
        return source.encode(text + (reply if turns.chat else f" {reply}"))

    sizes = len(first(MODEL_KEY)[1]), len(later(MODEL_KEY))
    numbers: dict[str, str] = {}
    while len(numbers) < TURNS:
        key = f"{rng.choice(source.words)}-{rng.choice(source.words)}"
        if (len(first(key)[1]), len(later(key))) == sizes:
            numbers[key] = str(rng.randint(1_000_000, 9_999_999))
    asked = list(numbers)
    head, tail = first(asked[0])
    questions = tuple(Turn(later(key), (numbers[key],)) for key in asked[1:])
    new = len(source.encode(" " + numbers[asked[0]]))
    more = [token for turn in questions for token in turn.question]
    size = space(length, head, tail + more, TURNS * new)
    lines = [NEEDLE.format(kind=f"{KIND}s", key=key, value=value) for key, value in numbers.items()]
    rng.shuffle(lines)
    inside = size - sum(len(source.encode(line + "\n")) for line in lines)
    ids = source.insert(source.essay(rng, inside), lines, sorted(rng.random() for _ in lines))
    return assemble(head, ids, tail, [numbers[asked[0]]], new, later=questions)
