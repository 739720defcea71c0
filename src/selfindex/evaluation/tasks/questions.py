"""RULER's question answering, over invented passages instead of SQuAD's (qa_1) and HotpotQA's (qa_2).

A passage is about a person or about something that the person made; all of them have the same form, so
that every one is a distractor of every other. qa_1 asks for what one passage says, qa_2 for what the
passage on the maker of a thing says, whose name only the passage on the thing gives.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from ...errors import InputError
from .judges import ANY_FOUND
from .sample import Sample, Source, assemble, space

ASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other "
    "words."
)
BEFORE = ASK + "\n\nThe following are given documents.\n\n"
AFTER = "\n\n" + ASK + "\n\nQuestion: {question}"
REPLY = "Answer:"
NEW = 32

CONSONANTS = (
    "b",
    "br",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
)
VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
ENDINGS = ("l", "m", "n", "r", "s", "t", "nd", "rk")
WORKS = (
    "bridge",
    "opera",
    "novel",
    "clock",
    "garden",
    "ship",
    "lighthouse",
    "alphabet",
    "library",
    "telescope",
)
LIVES = (
    "{name} was born in {town} and grew up there as the youngest of {count} children. At the age of {age}, "
    "{name} became a pupil of {teacher} and stayed for {years} years. Letters from that time are lost.",
    "Little is known about the family of {name}, who was born in {town}. The only teacher was {teacher}, "
    "whom {name} met at the age of {age}. The two worked together for {years} years and had {count} pupils.",
    "As a pupil of {teacher}, {name} learned the craft in {years} years, from the age of {age} on. The house "
    "in {town} where {name} was born has been a museum since; it has {count} rooms.",
)
THINGS = (
    "The {work} {title} is the best known one of its country. It is the work of {name}, who needed {years} "
    "years for it and had {count} helpers. It was shown in public for the first time in spring.",
    "{title} is a {work} that was long held to be older than it is. According to a letter, {name} made it in "
    "{years} years, with {count} interruptions. Copies of it are rare today.",
)  # fmt: skip


@dataclass(frozen=True)
class Person:
    """Somebody invented, and what the passages say."""

    name: str
    town: str
    teacher: str
    title: str
    work: str


def one_hop(source: Source, length: int, seed: int) -> Sample:
    """qa_1: what one passage says about a person."""
    rng = random.Random(f"qa_1 {length} {seed}")
    people = _people(rng)
    asked = next(people)
    question, answer = rng.choice(
        (
            (f"In which town was {asked.name} born?", asked.town),
            (f"Who was the teacher of {asked.name}?", asked.teacher),
        )
    )
    return _make(source, length, rng, people, [_life(rng, asked)], question, answer)


def two_hops(source: Source, length: int, seed: int) -> Sample:
    """qa_2: what one passage says about the maker of a thing, whom another one names."""
    rng = random.Random(f"qa_2 {length} {seed}")
    people = _people(rng)
    asked = next(people)
    # Small models get from one passage to the other by way of the name, which they may say.
    question = f"Who made the {asked.work} {asked.title}, and in which town was that person born?"
    golden = [_life(rng, asked), _thing(rng, asked)]
    return _make(source, length, rng, people, golden, question, asked.town)


def _make(
    source: Source,
    length: int,
    rng: random.Random,
    people: Iterator[Person],
    golden: list[str],
    question: str,
    answer: str,
) -> Sample:
    head, tail = source.frame(BEFORE, AFTER.format(question=question), REPLY)
    size = space(length, head, tail, NEW)
    rng.shuffle(golden)
    # Wherever they go, there is room for them and for a passage that begins before.
    longest = 2 * max(len(source.encode(passage)) for passage in golden)
    room = size - (len(golden) + 1) * longest
    places = [depth * max(0, room) for depth in sorted(rng.random() for _ in golden)]
    ids: list[int] = []
    others: list[str] = []
    number = 1
    while len(ids) < size:
        if places and len(ids) >= places[0]:
            places.pop(0)
            passage = golden.pop(0)
        else:
            if not others:
                person = next(people)
                others = [_life(rng, person), _thing(rng, person)]
            passage = others.pop(0)
        ids += source.encode(f"Document {number}:\n{passage}\n\n")
        number += 1
    if golden:
        raise InputError(f"{length} tokens are too few for this task")
    return assemble(head, ids[:size], tail, [answer], NEW, ANY_FOUND)


def _people(rng: random.Random) -> Iterator[Person]:
    """Invented people, no two of whom share a name of anything."""
    taken: set[str] = set()

    def name(syllables: int) -> str:
        while True:
            parts = (rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables))
            found = ("".join(parts) + rng.choice(ENDINGS)).capitalize()
            if found not in taken:
                taken.add(found)
                return found

    while True:
        full = f"{name(1)} {name(2)}"
        yield Person(full, name(2), f"{name(1)} {name(2)}", name(2), rng.choice(WORKS))


def _numbers(rng: random.Random) -> dict[str, int]:
    return {"count": rng.randint(3, 19), "age": rng.randint(9, 29), "years": rng.randint(2, 17)}


def _life(rng: random.Random, person: Person) -> str:
    given = {"name": person.name, "town": person.town, "teacher": person.teacher}
    return rng.choice(LIVES).format(**given, **_numbers(rng))


def _thing(rng: random.Random, person: Person) -> str:
    given = {"name": person.name, "title": person.title, "work": person.work}
    return rng.choice(THINGS).format(**given, **_numbers(rng))
