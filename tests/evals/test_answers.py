"""Code completion, programs, quotes and chats: what is asked, and what counts as right."""

import random

import pytest
from tiny_tokenizer import make_tokenizer

from selfindex.errors import InputError
from selfindex.evaluation.tasks import TASKS, Source, code, programs
from selfindex.evaluation.tasks.judges import NEXT_LINE, TESTS_PASS, VERBATIM, first_line, program
from selfindex.evaluation.tasks.sandbox import passes
from selfindex.evaluation.texts import load_text, recent_code

LENGTH = 9000  # bytes are tokens here
OTHERS = ("lcc", "repobench_p", "program", "quote", "chat")


@pytest.fixture(scope="module")
def source():
    return Source(make_tokenizer(), load_text("manual"))


def prompt(source, sample):
    return source.tokenizer.decode(sample.document + sample.question)


@pytest.mark.parametrize("task", OTHERS)
def test_sizes_and_seeds(source, task):
    sample = TASKS[task](source, LENGTH, 1)
    assert sample.length == LENGTH
    assert (len(sample.document) - 80) % 128 == 0  # sinks, recent tokens, and whole pages
    assert sample == TASKS[task](source, LENGTH, 1)
    assert sample != TASKS[task](source, LENGTH, 2)
    with pytest.raises(InputError):
        TASKS[task](source, 150, 0)


@pytest.mark.parametrize("task", ["lcc", "repobench_p"])
@pytest.mark.parametrize("seed", range(3))
def test_the_line_follows_the_prompt_in_its_file(source, task, seed):
    sample = TASKS[task](source, LENGTH, seed)
    end = prompt(source, sample)[-300:] + sample.answers[0] + "\n"
    # Some files have parts in common.
    lines = {
        path: text.split(end)[0].count("\n") + end.count("\n") - 1
        for path, text in recent_code().items()
        if end in text
    }
    places = [(path, line) for path, line in lines.items() if line in code.statements(path)]
    assert places
    if task == "repobench_p":
        path, _ = next(place for place in places if (code.first_use(place[0]) or [None])[0] == place[1])
        _, name, origin = code.first_use(path)
        assert f"# {origin}\n" in prompt(source, sample)
        assert f" {name}" in prompt(source, sample).split(f"# {origin}\n")[1]


def test_files_are_recent_ones():
    assert len(recent_code()) > 100
    assert all("transformers/" in path for path in recent_code())
    old = "transformers/models/bert/modeling_bert.py"  # 2018
    assert old not in recent_code()


def test_next_line_is_judged_as_longbench_does():
    assert first_line("\n\n  x = 1\ny = 2") == "  x = 1"
    assert first_line("Here is `code`:\n# comment\nx = 1\n") == "x = 1"
    assert NEXT_LINE.scores("\n  x = 1\nmore", ["    x = 1"]) == {"score": 1.0, "exact": 1.0}
    found = NEXT_LINE.scores("abcd", ["abxy"])
    assert found == {"score": 0.5, "exact": 0.0}
    assert NEXT_LINE.scores("", ["x = 1"]) == {"score": 0.0, "exact": 0.0}
    assert not NEXT_LINE.finished("\n\n  x = 1", ["x"])
    assert not NEXT_LINE.finished("# why\n", ["x"])
    assert NEXT_LINE.finished("# why\nx = 1\n", ["x"])


@pytest.mark.parametrize("seed", range(len(programs.RULES)))
def test_a_right_program_passes_and_others_do_not(source, seed):
    sample = TASKS["program"](source, LENGTH, seed)
    start, tests = sample.answers
    name, text = start[4:].partition("(")[0], prompt(source, sample)
    assert text.count(f"Specification of the function {name}(") == 1
    assert text.count("Specification of the function") == programs.SPECIFIED
    assert text.endswith(f"```python\n{start}")
    assert tests.count("assert") >= 4
    # What the specification's own rule answers to the arguments that are tried.
    table = {line[7:].partition(") == ")[0]: line.partition(") == ")[2] for line in tests.splitlines()}
    body = f"    return {{k: eval(v) for k, v in {table!r}.items()}}[f'{name}({{given!r}}']\n"
    given = start.partition("(")[2].rstrip("):")
    right = "\n" + body.replace("given", given)
    assert sample.judge is TESTS_PASS
    assert sample.scores([right + "```\nThat is it."]) == {"score": 1.0}
    assert sample.scores(["\n    return None\n"]) == {"score": 0.0}
    assert sample.scores(["\n    return ("]) == {"score": 0.0}


def test_rules_differ_by_their_constants():
    for make in programs.RULES:
        assert make(random.Random(0)).words != make(random.Random(1)).words


def test_a_program_ends_with_its_function():
    assert program("\n    return x\n\nprint(f(1))\n", "def f(x):") == "def f(x):\n    return x\n\n"
    assert program("\n    return x\n```\nmore", "def f(x):") == "def f(x):\n    return x\n\n"
    assert not TESTS_PASS.finished("\n    if x:\n        return x\n\n    ", ("", ""))
    assert TESTS_PASS.finished("\n    return x\n\nprint", ("", ""))
    assert TESTS_PASS.finished("\n    return x\n```", ("", ""))


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "x = [0] * 10**9",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "open('file', 'w')",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "assert 1 == 2",
        "def f(:",
        "print('x' * 100); raise ValueError",
    ],
)
def test_programs_that_do_not_pass(program):
    assert not passes(program, seconds=1)


def test_programs_that_pass():
    assert passes("print('x' * 10**6)\nimport math, re, collections\nassert math.gcd(4, 6) == 2")


def test_a_quote_is_in_the_document(source):
    sample = TASKS["quote"](source, LENGTH, 0)
    text, wanted = prompt(source, sample), sample.answers[0]
    name = text.rpartition("Copy note ")[2].partition(" ")[0]
    start = text.rpartition("```\n")[2]
    assert len(start.split()) == 8
    assert text.count(f"[Begin of note {name}]\n{start} {wanted}\n[End of note {name}]") == 1
    assert text.count("[Begin of note ") == 4
    assert sample.judge is VERBATIM
    assert sample.scores([wanted + "\n```"]) == {"score": 1.0, "exact": 1.0}
    half = sample.scores([wanted[: len(wanted) // 2].strip()])
    assert half["score"] == pytest.approx(2 / 3, abs=0.05)
    assert half["exact"] == 0


def test_a_chat_asks_for_ten_needles_in_questions_of_one_length(source):
    samples = [TASKS["chat"](source, LENGTH, seed) for seed in (0, 1)]
    assert len({len(turn.question) for sample in samples for turn in sample.later}) == 1
    sample = samples[0]
    text = prompt(source, sample)
    assert len(sample.turns) == 10
    assert len({turn.answers for turn in sample.turns}) == 10
    for turn in sample.turns:
        asked = source.tokenizer.decode(turn.question)
        key = asked.rpartition("The special magic number for ")[2].partition(" ")[0]
        assert f"One of the special magic numbers for {key} is: {turn.answers[0]}.\n" in text
    replies = [turn.answers[0] for turn in sample.turns]
    assert sample.scores(replies) == {"score": 1.0}
    assert sample.scores([*replies[:5], *[""] * 5]) == {"score": 0.5}
