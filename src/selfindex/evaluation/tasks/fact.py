"""The demo's task: a fact hidden in a long text, and a question about it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ..turns import Turns

# Small models find some facts more reliably than others; a phone number is one of the easy ones.
FACT = "The phone number of the bakery is {}."
QUESTION = "What is the phone number of the bakery?"


@dataclass(frozen=True)
class Task:
    """Token ids are int64 [1, n].

    Attributes:
        document: what the model reads before the cache is compressed.
        question_ids: the question and the rest of the turn, read after it.
        continuation: how the text goes on after the document, for teacher forcing.
        fact, question, answer: in words; a reply that contains `answer` is right.
    """

    document: Tensor
    question_ids: Tensor
    continuation: Tensor
    fact: str
    question: str
    answer: str


def build_task(tokenizer: Any, text: str, tokens: int, depth: float, seed: int, more: int) -> Task:
    """Hide a fact at a depth (0 to 1) of a document of `tokens` tokens.

    Args:
        seed: picks the number and the part of the text.
        more: tokens of the text's continuation.

    Raises:
        InputError: the text is too short for that.
    """
    rng = random.Random(seed)
    answer = str(rng.randint(10_000, 99_999))
    fact = FACT.format(answer)
    head, tail = Turns(tokenizer).around(QUESTION)

    def encode(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False).input_ids

    before, hidden = encode(head), encode(f"\n{fact}\n")
    need = tokens - len(before) - len(hidden)
    start = text.find("\n", rng.randrange(max(1, len(text) // 2))) + 1
    # Four times as many characters as tokens is little for English, twenty times is plenty.
    ids = encode(text[start : start + 20 * (need + more)])
    if need < 1 or len(ids) < need + more:
        raise InputError(f"the text is too short for {tokens} tokens at this seed; ask for fewer")
    at = round(depth * need)
    while 0 < at < need and "\n" not in tokenizer.decode(ids[at - 1 : at]):
        at += 1
    document = before + ids[:at] + hidden + ids[at:need]
    return Task(
        document=torch.tensor([document]),
        question_ids=torch.tensor([encode(tail)]),
        continuation=torch.tensor([ids[need : need + more]]),
        fact=fact,
        question=QUESTION,
        answer=answer,
    )
