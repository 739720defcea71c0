"""RULER's aggregation tasks: the most common words of a list, the most frequent coded words."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Callable

from ...errors import InputError
from .sample import Sample, Source, assemble, space

COMMON = 10
COMMON_TIMES, UNCOMMON_TIMES = 30, 3
SHORT_TIMES = 10  # below 4,096 tokens the published 30 would leave no room for other words
FILLERS = 12
LIST = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
LIST_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
LIST_REPLY = "Answer: The top 10 words that appear most often in the list are:"

ALPHA = 2.0
CODES = 2000
NOISE_WORD = "..."
CODED = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. "
)
CODED_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?"
)
CODED_REPLY = "Answer: According to the coded text above, the three most frequently appeared words are:"


def common_words(source: Source, length: int, seed: int) -> Sample:
    """Ten words that appear thirty times among words that appear three times."""
    rng = random.Random(f"cwe {length} {seed}")
    # The question must not give an answer away.
    usable = [word for word in source.words if word not in (LIST + LIST_QUESTION + LIST_REPLY).lower()]
    words = rng.sample(usable, len(usable))
    times = COMMON_TIMES if length >= 4096 else SHORT_TIMES
    example = words[-FILLERS - 8 : -FILLERS]
    shown = rng.sample(example[:2] * 4 + example[2:], 14)
    before = (
        f"{LIST}{_numbered(shown)}{LIST_QUESTION.replace('10', '2')} "
        f"{LIST_REPLY.replace('10', '2')} 1. {example[0]} 2. {example[1]}\n\n{LIST}"
    )
    head, tail = source.frame(before, LIST_QUESTION, LIST_REPLY)
    new = 96
    size = space(length, head, tail, new)

    def listed(uncommon: int) -> list[str]:
        chosen = words[:COMMON] * times + words[COMMON : COMMON + uncommon] * UNCOMMON_TIMES
        random.Random(seed).shuffle(chosen)
        return chosen

    most = len(words) - COMMON - FILLERS - 8
    uncommon = _largest(lambda n: len(source.encode(_numbered(listed(n)))), size, most)
    # Words seen once fill the rest, the last of them cut.
    ids = source.encode(_numbered(listed(uncommon) + words[-FILLERS:]))[:size]
    if len(ids) < size:
        raise InputError(f"the text has too few different words for a list of {length} tokens")
    return assemble(head, ids, tail, words[:COMMON], new)


def frequent_words(source: Source, length: int, seed: int) -> Sample:
    """Coded words whose k-th most frequent appears in proportion to k^-2; the first is only dots."""
    rng = random.Random(f"fwe {length} {seed}")
    codes: dict[str, None] = {}
    while len(codes) < CODES:
        codes["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    ranked = [NOISE_WORD, *codes]
    head, tail = source.frame(CODED, CODED_QUESTION, CODED_REPLY)
    new = 48
    size = space(length, head, tail, new)
    zeta = math.pi**2 / 6  # of ALPHA

    def text(words: int) -> list[int]:
        chosen = [w for k, w in enumerate(ranked, 1) for _ in range(int(words * k**-ALPHA / zeta))]
        random.Random(seed).shuffle(chosen)
        return source.encode(" ".join(chosen))

    ids = text(_largest(lambda n: len(text(n)), size, 2 * size))
    dots = source.encode(f" {NOISE_WORD}")
    ids += (dots * (size - len(ids)))[: size - len(ids)]
    return assemble(head, ids, tail, ranked[1:4], new)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _largest(tokens: Callable[[int], int], size: int, most: int) -> int:
    """The largest n up to `most` with tokens(n) <= size."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens(middle) <= size else (low, middle - 1)
    return low
