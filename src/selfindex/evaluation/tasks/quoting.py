"""A long answer with one right wording: a marked passage of the document, word for word."""

from __future__ import annotations

import random

from ...errors import InputError
from .judges import FENCE, VERBATIM
from .sample import Sample, Source, assemble, space

TOKENS = 160
"""Of the passage, so that a wrong token early in the reply has time to matter."""
GIVEN = 8
"""Words of it that the reply starts with."""
TRIES = 100
BEFORE = "Read the following text. I will ask you to copy a part of it afterwards.\n"
NOTE = "[Begin of note {name}]\n{passage}\n[End of note {name}]"
AFTER = (
    "\nCopy note {name} of the text above word for word, from its first to its last word, and nothing else."
)


def quote(source: Source, length: int, seed: int) -> Sample:
    """One of four notes; the notes are stretches of the same text as everything around them."""
    rng = random.Random(f"quote {length} {seed}")
    names = [f"{letter}{rng.randint(10, 99)}" for letter in rng.sample("ABCDEFGHKLMNPRSTUVWXYZ", 4)]
    passages = [_passage(source, rng) for _ in names]
    # With its first words a small model finds the note, and what is measured is the copy.
    words = passages[0].split(" ")
    start, rest = " ".join(words[:GIVEN]), " ".join(words[GIVEN:])
    head, tail = source.frame(BEFORE, AFTER.format(name=names[0]), f"{FENCE}\n{start}")
    new = TOKENS + 24  # the tokens need not be those of the text, and the fence follows
    size = space(length, head, tail, new)
    notes = [NOTE.format(name=name, passage=text) for name, text in zip(names, passages, strict=True)]
    inside = size - sum(len(source.encode(note + "\n")) for note in notes)
    order = rng.sample(range(4), 4)
    depths = sorted(rng.random() for _ in notes)
    ids = source.insert(source.essay(rng, inside), [notes[i] for i in order], depths)
    return assemble(head, ids, tail, [rest], new, VERBATIM)


def _passage(source: Source, rng: random.Random) -> str:
    """Whole words of the text, in one line."""
    for _ in range(TRIES):
        text = source.tokenizer.decode(source.essay(rng, TOKENS)).replace(FENCE, "")
        words = text.split()[:-1]
        if len(words) >= 2 * GIVEN:  # tables and rulers have fewer
            return " ".join(words)
    raise InputError(f"the text has no passages of {2 * GIVEN} words in {TOKENS} tokens; give another one")
