"""A long answer with one right wording: a marked passage of the document, word for word."""

from __future__ import annotations

import random

from .judges import FENCE, VERBATIM
from .sample import Sample, Source, assemble, space

TOKENS = 160
"""Of the passage, so that a wrong token early in the reply has time to matter."""
BEFORE = "Read the following text. I will ask you to copy a part of it afterwards.\n"
NOTE = "[Begin of note {name}]\n{passage}\n[End of note {name}]"
AFTER = (
    "\nCopy note {name} of the text above word for word, from its first to its last word, and nothing else."
)


def quote(source: Source, length: int, seed: int) -> Sample:
    """One of four notes; the notes are stretches of the same text as everything around them."""
    rng = random.Random(f"quote {length} {seed}")
    names = [f"{letter}{rng.randint(10, 99)}" for letter in rng.sample("ABCDEFGHKLMNPRSTUVWXYZ", 4)]
    head, tail = source.frame(BEFORE, AFTER.format(name=names[0]), f"{FENCE}\n")
    new = TOKENS + 24  # the tokens need not be those of the text, and the fence follows
    size = space(length, head, tail, new)
    passages = [_passage(source, rng) for _ in names]
    notes = [NOTE.format(name=name, passage=text) for name, text in zip(names, passages, strict=True)]
    inside = size - sum(len(source.encode(note + "\n")) for note in notes)
    order = rng.sample(range(4), 4)
    depths = sorted(rng.random() for _ in notes)
    ids = source.insert(source.essay(rng, inside), [notes[i] for i in order], depths)
    return assemble(head, ids, tail, [passages[0]], new, VERBATIM)


def _passage(source: Source, rng: random.Random) -> str:
    """Whole words of the text, in one line."""
    words = " ".join(source.tokenizer.decode(source.essay(rng, TOKENS)).split()).replace(FENCE, "")
    return words.rpartition(" ")[0]
