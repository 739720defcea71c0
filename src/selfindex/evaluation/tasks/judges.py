"""How replies are judged, and from when on nothing that follows can change the verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from .sandbox import passes

FENCE = "```"
LOOKS_LIKE_TALK = ("`", "#", "//")
"""LongBench takes a line that holds one of these for talk about code, and looks at the next."""

Answers = Sequence[str]


@dataclass(frozen=True)
class Judge:
    """A rule for the replies of a task.

    Attributes:
        name: of the rule.
        scores: of (reply, answers), each from 0 to 1; "score" is the task's own, others come beside it.
        finished: of (reply so far, answers), whether the reply can end here.
    """

    name: str
    scores: Callable[[str, Answers], dict[str, float]]
    finished: Callable[[str, Answers], bool]


def share_found(reply: str, answers: Answers) -> float:
    """RULER's string match: the share of the answers that the reply contains, ignoring case."""
    reply = reply.lower()
    return sum(answer.lower() in reply for answer in answers) / len(answers)


def any_found(reply: str, answers: Answers) -> float:
    """RULER's string match for questions: whether the reply contains any of the answers, ignoring case."""
    return float(share_found(reply, answers) > 0)


def similarity(reply: str, wanted: str) -> float:
    """Edit similarity as fuzzywuzzy's `ratio`: twice the characters in common over all characters."""
    return SequenceMatcher(None, reply, wanted, autojunk=False).ratio()


def first_line(reply: str) -> str:
    """The first line of code in a reply, by LongBench's rule; of talk alone, all of it."""
    lines = reply.lstrip("\n").split("\n")
    return next((line for line in lines if not any(mark in line for mark in LOOKS_LIKE_TALK)), reply)


def _next_line(reply: str, answers: Answers) -> dict[str, float]:
    line = first_line(reply).strip()
    wanted = answers[0].strip()
    return {"score": similarity(line, wanted), "exact": float(line == wanted)}


def _line_ends(reply: str, answers: Answers) -> bool:
    ended, newline, _ = reply.lstrip("\n").rpartition("\n")
    return bool(newline) and not any(mark in first_line(ended) for mark in LOOKS_LIKE_TALK)


def program(reply: str, start: str) -> str:
    """The program of a reply that goes on from `start`: up to the fence, or to the first line that is
    neither indented nor empty and so no longer belongs to the function.
    """
    body: list[str] = []
    for line in reply.partition(FENCE)[0].split("\n"):
        if body and line and not line[0].isspace():
            break
        body.append(line)
    return start + "\n".join(body) + "\n"


def _tests_pass(reply: str, answers: Answers) -> dict[str, float]:
    start, tests = answers
    return {"score": float(passes(program(reply, start) + tests))}


def _program_ends(reply: str, answers: Answers) -> bool:
    return FENCE in reply or len(program(reply, "")) <= len(reply)


def _copy(reply: str, answers: Answers) -> dict[str, float]:
    copy = reply.partition(FENCE)[0].strip()
    return {"score": similarity(copy, answers[0].strip()), "exact": float(copy == answers[0].strip())}


ALL_FOUND = Judge("all", lambda r, a: {"score": share_found(r, a)}, lambda r, a: share_found(r, a) == 1)
ANY_FOUND = Judge("any", lambda r, a: {"score": any_found(r, a)}, lambda r, a: any_found(r, a) == 1)
NEXT_LINE = Judge("line", _next_line, _line_ends)
"""LCC's and RepoBench-P's: edit similarity of the next line; "exact" beside it."""
TESTS_PASS = Judge("tests", _tests_pass, _program_ends)
"""answers: the program's start, which the reply goes on from, and tests that raise if it is wrong."""
VERBATIM = Judge("copy", _copy, lambda reply, answers: FENCE in reply)
"""Edit similarity of a long copy up to the fence; "exact" beside it."""
