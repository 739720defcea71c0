"""RULER's needle tasks and passkey: sentences hidden in a long text, asked for afterwards."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from functools import partial

from .sample import Maker, Sample, Source, assemble, space

INSTRUCTION = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
ONE_INSTRUCTION = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
QUESTION = "\nWhat are all the special magic {kind} for {keys} mentioned in the provided text?"
ONE_QUESTION = "\nWhat is the special magic {kind} for {keys} mentioned in the provided text?"
REPLY = "The special magic {kind} for {keys} mentioned in the provided text are"
ONE_REPLY = "The special magic {kind} for {keys} mentioned in the provided text is"
DEPTHS = [i / 39 for i in range(40)]


def needle(
    source: Source,
    length: int,
    seed: int,
    *,
    haystack: str = "essay",
    uuids: bool = False,
    uuid_keys: bool = False,
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
    depth: float | None = None,
) -> Sample:
    """A needle task.

    Args:
        haystack: "essay" (the source's text), "noise" (repeated sentences) or "needles" (others).
        uuids, uuid_keys: values, and keys, are UUIDs instead of 7 digits and two words.
        keys: needles with different keys; `values` each has; `queries` of them asked for.
        depth: where the needles go, 0 start to 1 end; None draws from RULER's 40 depths.
    """
    rng = random.Random(f"{haystack} {uuids} {keys} {values} {queries} {length} {seed}")
    kind = "uuid" if uuids else "number"
    value = _uuid if uuids else _number
    key = _uuid if uuid_keys else partial(_words, source.words)
    names = _distinct(rng, key, max(keys, queries))
    found = {name: _distinct(rng, value, values) for name in names}
    asked = names[:queries]
    several = queries * values > 1
    listed = asked[0] if queries == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    words = {"kind": f"{kind}s" if several else kind, "keys": listed}
    head, tail = source.frame(
        (INSTRUCTION if several else ONE_INSTRUCTION).format(**words),
        (QUESTION if several else ONE_QUESTION).format(**words),
        (REPLY if several else ONE_REPLY).format(**words),
    )
    lines = [NEEDLE.format(kind=f"{kind}s", key=k, value=v) for k in names for v in found[k]]
    rng.shuffle(lines)
    new = 16 * values * queries * (3 if uuids else 1) + 8
    size = space(length, head, tail, new)
    if haystack == "needles":
        ids = _other_needles(source, rng, size, kind, key, value, set(names))
    elif haystack == "noise":
        ids = source.noise(size)
    else:
        ids = source.essay(rng, size)
    ids = ids[: size - sum(len(source.encode(line + "\n")) for line in lines)]
    depths = sorted(rng.sample(DEPTHS, len(lines))) if depth is None else [depth] * len(lines)
    ids = source.insert(ids, lines, depths)
    answers = [v for name in asked for v in found[name]]
    return assemble(head, ids, tail, answers, new)


def _number(rng: random.Random) -> str:
    return str(rng.randint(1_000_000, 9_999_999))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _words(words: Sequence[str], rng: random.Random) -> str:
    return f"{rng.choice(words)}-{rng.choice(words)}"


def _distinct(rng: random.Random, draw: Callable[[random.Random], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(rng)] = None
    return list(found)


def _other_needles(
    source: Source,
    rng: random.Random,
    tokens: int,
    kind: str,
    key: Callable[[random.Random], str],
    value: Callable[[random.Random], str],
    taken: set[str],
) -> list[int]:
    """A haystack of needles with other keys."""
    ids: list[int] = []
    while len(ids) < tokens:
        name = key(rng)
        if name not in taken:
            ids += source.encode(NEEDLE.format(kind=f"{kind}s", key=name, value=value(rng)) + "\n")
    return ids[:tokens]


NEEDLES: dict[str, Maker] = {
    "niah_single_1": partial(needle, haystack="noise"),
    "niah_single_2": needle,
    "niah_single_3": partial(needle, uuids=True),
    "niah_multikey_1": partial(needle, keys=4),
    "niah_multikey_2": partial(needle, haystack="needles"),
    "niah_multikey_3": partial(needle, haystack="needles", uuids=True, uuid_keys=True),
    "niah_multivalue": partial(needle, values=4),
    "niah_multiquery": partial(needle, queries=4),
}


def passkey(source: Source, length: int, seed: int) -> Sample:
    """A five-digit pass key in repeated sentences, at a random depth."""
    rng = random.Random(f"passkey {length} {seed}")
    key = str(rng.randint(10_000, 99_999))
    head, tail = source.frame(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information there.\n",
        "\nWhat is the pass key?",
        "The pass key is",
    )
    line = f"The pass key is {key}. Remember it. {key} is the pass key."
    new = 16
    size = space(length, head, tail, new) - len(source.encode(line + "\n"))
    ids = source.insert(source.noise(size), [line], [rng.random()])
    return assemble(head, ids, tail, [key], new)
