"""RULER's variable tracking: a chain of assignments scattered over repeated sentences."""

from __future__ import annotations

import random
import string
from itertools import pairwise

from .sample import NOISE, Sample, Source, assemble, space

HOPS = 4
INSTRUCTION = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{text}"
QUESTION = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
REPLY = (
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables "
    "are assigned the value {value}, they are:"
)


def variable_tracking(source: Source, length: int, seed: int) -> Sample:
    """One chain of four hops, after a worked example with another chain."""
    rng = random.Random(f"vt {length} {seed}")
    value, names, lines = _chain(rng, HOPS, 5)
    example_value, example_names, example_lines = _chain(rng, HOPS, 3)
    example = (
        INSTRUCTION.format(text=NOISE.join(f"{line}\n" for line in example_lines))
        + QUESTION.format(value=example_value)
        + " "
        + REPLY.format(value=example_value, count=len(example_names))
        + f" {' '.join(example_names)}\n\n"
    )
    head, tail = source.frame(
        example + INSTRUCTION.format(text=""),
        QUESTION.format(value=value),
        REPLY.format(value=value, count=len(names)),
    )
    new = 48
    size = space(length, head, tail, new) - sum(len(source.encode(line + "\n")) for line in lines)
    depths = sorted(rng.random() for _ in lines)
    ids = source.insert(source.noise(size), lines, depths)
    return assemble(head, ids, tail, names, new)


def _chain(rng: random.Random, hops: int, letters: int) -> tuple[str, list[str], list[str]]:
    """(value, variables, assignments in order)."""
    names: dict[str, None] = {}
    while len(names) < hops + 1:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    order, value = list(names), str(rng.randint(10_000, 99_999))
    lines = [f"VAR {order[0]} = {value}"]
    lines += [f"VAR {b} = VAR {a}" for a, b in pairwise(order)]
    return value, order, lines
