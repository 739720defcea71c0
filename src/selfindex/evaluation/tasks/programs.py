"""A program by a specification that stands in a long document, judged by running its tests."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .judges import FENCE, TESTS_PASS
from .sample import Sample, Source, assemble, space

NEW = 160
SPECIFIED = 4
"""Functions in the document; one of them is asked for."""
BEFORE = (
    "The following text has the specifications of some Python functions in it. Memorize them. I will ask "
    "you to write one of these functions afterwards.\n"
)
AFTER = (
    "\nWrite the Python function `{name}` exactly as its specification in the text above says. "
    "Reply with the code of the function only."
)
SPECIFICATION = "Specification of the function {name}({given}): {rule}\nExamples:{examples}"
FIRST = (
    "amber",
    "brisk",
    "calm",
    "dusty",
    "early",
    "faint",
    "grand",
    "hollow",
    "ivory",
    "lunar",
    "mellow",
    "noble",
)
SECOND = (
    "anchor",
    "basket",
    "candle",
    "dancer",
    "engine",
    "falcon",
    "glacier",
    "harbor",
    "island",
    "jacket",
    "kettle",
)


@dataclass(frozen=True)
class Rule:
    """What a function does: in words, as a program, and arguments to try it with.

    Attributes:
        given: names of its parameters.
    """

    given: str
    words: str
    right: Callable[..., Any]
    tries: list[tuple[Any, ...]]


def _ints(rng: random.Random, count: int, low: int = 0, high: int = 60) -> list[int]:
    return [rng.randint(low, high) for _ in range(count)]


def _words(rng: random.Random, count: int) -> list[str]:
    return [rng.choice(FIRST + SECOND)[: rng.randint(2, 7)] for _ in range(count)]


def _affine(rng: random.Random) -> Rule:
    a, b, c = rng.randint(3, 19), rng.randint(5, 99), rng.randint(3, 9)
    words = f"computes y = {a} * x + {b} and returns -y if y is divisible by {c}, else y."

    def right(x: int) -> int:
        value = a * x + b
        return -value if value % c == 0 else value

    return Rule("x", words, right, [(x,) for x in range(-3, 25)])


def _counted(rng: random.Random) -> Rule:
    a, b = rng.randint(10, 30), rng.randint(2, 7)
    words = f"returns how many of the numbers are greater than {a} and divisible by {b}."
    return Rule(
        "numbers", words, lambda numbers: sum(x > a and x % b == 0 for x in numbers),
        [(_ints(rng, n),) for n in (0, 1, 5, 9, 14, 20)],
    )  # fmt: skip


def _joined(rng: random.Random) -> Rule:
    n, mark = rng.randint(3, 6), rng.choice("+*/~=&%")
    words = f"returns the words that have at least {n} letters, in upper case, joined by '{mark}'."
    return Rule(
        "words", words, lambda words: mark.join(w.upper() for w in words if len(w) >= n),
        [(_words(rng, count),) for count in (0, 1, 4, 7, 10)],
    )  # fmt: skip


def _fee(rng: random.Random) -> Rule:
    low, middle, high = rng.sample(range(11, 99), 3)
    first = rng.randint(2, 9)
    second = first + rng.randint(3, 30)
    words = (
        f"returns the fee for a parcel: {low} if the weight is at most {first}, {middle} if it is more than "
        f"that but at most {second}, else {high}."
    )

    def right(weight: int) -> int:
        return low if weight <= first else middle if weight <= second else high

    return Rule("weight", words, right, [(x,) for x in range(0, second + 6)])


def _sequence(rng: random.Random) -> Rule:
    start, times, less = rng.randint(2, 9), rng.randint(2, 5), rng.randint(1, 9)
    words = (
        f"returns a list of n numbers: the first one is {start}, and every following one is {times} times "
        f"the one before it minus {less}."
    )

    def right(n: int) -> list[int]:
        found = [start]
        while len(found) < n:
            found.append(times * found[-1] - less)
        return found[:n]

    return Rule("n", words, right, [(n,) for n in (1, 2, 3, 5, 8)])


def _checksum(rng: random.Random) -> Rule:
    start, times, most = rng.randint(3, 99), rng.randint(3, 37), rng.randint(101, 997)
    words = (
        f"returns a checksum: it starts as {start}, and for every character of the text it is multiplied by "
        f"{times}, the character's ord is added, and the remainder by {most} is kept."
    )

    def right(text: str) -> int:
        value = start
        for letter in text:
            value = (value * times + ord(letter)) % most
        return value

    return Rule("text", words, right, [(word,) for word in ("", "a", *_words(rng, 6))])


def _digits(rng: random.Random) -> Rule:
    times, most = rng.randint(3, 19), rng.randint(11, 47)
    words = f"returns the sum of the decimal digits of n, multiplied by {times}, modulo {most}."
    return Rule(
        "n", words, lambda n: sum(map(int, str(n))) * times % most, [(x,) for x in _ints(rng, 12, 0, 99_999)]
    )


def _limited(rng: random.Random) -> Rule:
    low, high = rng.randint(5, 15), rng.randint(30, 50)
    left = rng.randint(16, 29)
    words = (
        f"returns a list of the numbers without those equal to {left}; numbers below {low} become {low}, and "
        f"numbers above {high} become {high}."
    )
    return Rule(
        "numbers", words, lambda numbers: [min(max(x, low), high) for x in numbers if x != left],
        [([*_ints(rng, n), left],) for n in (0, 3, 8, 15)],
    )  # fmt: skip


def _remainders(rng: random.Random) -> Rule:
    k, a = rng.randint(3, 8), rng.randint(2, 9)
    words = f"returns a dict that says for each remainder by {k} how many of the numbers plus {a} have it."

    def right(numbers: list[int]) -> dict[int, int]:
        found: dict[int, int] = {}
        for x in numbers:
            found[(x + a) % k] = found.get((x + a) % k, 0) + 1
        return found

    return Rule("numbers", words, right, [(_ints(rng, n),) for n in (0, 1, 6, 12)])


def _neighbours(rng: random.Random) -> Rule:
    k, least = rng.randint(2, 4), rng.randint(40, 90)
    words = f"returns a list of the sums of every {k} neighbouring numbers, without sums below {least}."

    def right(numbers: list[int]) -> list[int]:
        sums = (sum(numbers[i : i + k]) for i in range(len(numbers) - k + 1))
        return [x for x in sums if x >= least]

    return Rule("numbers", words, right, [(_ints(rng, n),) for n in (1, 4, 8, 12)])


RULES: tuple[Callable[[random.Random], Rule], ...] = (
    _affine, _counted, _joined, _fee, _sequence, _checksum, _digits, _limited, _remainders, _neighbours,
)  # fmt: skip


def specification(name: str, rule: Rule) -> str:
    """The text that the document has, with two examples."""
    shown = rule.tries[1:4:2] or rule.tries[:1]
    examples = "".join(f" {_call(name, given)} == {rule.right(*given)!r}." for given in shown)
    return SPECIFICATION.format(name=name, given=rule.given, rule=rule.words, examples=examples)


def tests(name: str, rule: Rule) -> str:
    """A program that raises unless the function is right for all the arguments that are tried."""
    return "".join(f"assert {_call(name, given)} == {rule.right(*given)!r}\n" for given in rule.tries)


def _call(name: str, given: tuple[Any, ...]) -> str:
    return f"{name}({', '.join(map(repr, given))})"


def write_program(source: Source, length: int, seed: int) -> Sample:
    """One of four functions whose specifications are hidden in the text."""
    rng = random.Random(f"program {length} {seed}")
    names = [f"{a}_{b}" for a, b in zip(rng.sample(FIRST, 4), rng.sample(SECOND, 4), strict=True)]
    rules = [make(rng) for make in rng.sample(RULES, SPECIFIED)]
    # All kinds of functions are asked for equally often.
    rules[0] = RULES[seed % len(RULES)](rng)
    start = f"def {names[0]}({rules[0].given}):\n"
    head, tail = source.frame(BEFORE, AFTER.format(name=names[0]), f"{FENCE}python\n{start.rstrip()}")
    size = space(length, head, tail, NEW)
    lines = [specification(name, rule) for name, rule in zip(names, rules, strict=True)]
    rng.shuffle(lines)
    inside = size - sum(len(source.encode(line + "\n")) for line in lines)
    ids = source.insert(source.essay(rng, inside), lines, sorted(rng.random() for _ in lines))
    answers = [start.rstrip(), tests(names[0], rules[0])]
    return assemble(head, ids, tail, answers, NEW, TESTS_PASS)
