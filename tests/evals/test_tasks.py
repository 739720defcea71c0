"""The tasks are what their publications define: answers are there, sizes are right, seeds decide."""

import collections
import re

import pytest
from tiny_tokenizer import make_tokenizer

from selfindex.errors import InputError
from selfindex.evaluation.tasks import GROUPS, TASKS, Source, needle
from selfindex.evaluation.tasks.judges import any_found, share_found
from selfindex.evaluation.texts import load_text

LENGTH = 6000  # bytes are tokens here


@pytest.fixture(scope="module")
def source():
    return Source(make_tokenizer(), load_text("manual"))


def words(source, sample):
    """(document, question) as text."""
    prompt = source.tokenizer.decode(sample.document + sample.question)
    head, _, tail = prompt.rpartition("\n<turn>assistant")
    return head, tail


@pytest.mark.parametrize("task", [*GROUPS["ruler"], "passkey"])
@pytest.mark.parametrize("seed", [0, 1])
def test_sizes_answers_and_seeds(source, task, seed):
    sample = TASKS[task](source, LENGTH, seed)
    assert len(sample.document) + len(sample.question) + sample.new_tokens == sample.length == LENGTH
    assert (len(sample.document) - 80) % 128 == 0  # sinks, recent tokens, and whole pages
    text, reply = words(source, sample)
    assert all(answer in text for answer in sample.answers)
    assert len(set(sample.answers)) == len(sample.answers)
    assert not any(answer in reply for answer in sample.answers)
    assert max(len(source.encode(" ".join(sample.answers))) // 4, 5) <= sample.new_tokens
    assert sample == TASKS[task](source, LENGTH, seed)
    assert sample.answers != TASKS[task](source, LENGTH, seed + 2).answers


@pytest.mark.parametrize(
    ("task", "needles", "answers", "uuids"),
    [
        ("niah_single_1", 1, 1, False),
        ("niah_single_2", 1, 1, False),
        ("niah_single_3", 1, 1, True),
        ("niah_multikey_1", 4, 1, False),
        ("niah_multikey_2", None, 1, False),
        ("niah_multikey_3", None, 1, True),
        ("niah_multivalue", 4, 4, False),
        ("niah_multiquery", 4, 4, False),
    ],
)
def test_needles(source, task, needles, answers, uuids):
    sample = TASKS[task](source, LENGTH, 3)
    text, reply = words(source, sample)
    found = re.findall(r"One of the special magic (?:number|uuid)s for (\S+) is: (\S+)\.\n", text)
    assert len(found) == needles if needles else len(found) > 30
    asked = re.search(r"special magic \w+ for (.*) mentioned", reply)[1].replace(" and ", " ")
    keys = {key.strip() for key in asked.split(",")}
    assert sorted(sample.answers) == sorted(value for key, value in found if key in keys)
    assert len(sample.answers) == answers
    shape = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" if uuids else r"\d{7}"
    assert all(re.fullmatch(shape, answer) for answer in sample.answers)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_depth(source, depth):
    sample = needle(source, LENGTH, 0, depth=depth)
    text, _ = words(source, sample)
    assert text.index(sample.answers[0]) / LENGTH == pytest.approx(depth, abs=0.1)


def test_variable_tracking_is_one_chain_of_four_hops(source):
    sample = TASKS["vt"](source, LENGTH, 0)
    text, reply = words(source, sample)
    assigned = dict(re.findall(r"VAR (\w{5}) = (?:VAR )?(\w+)\n", text))
    value = re.search(r"5 variables are assigned the value (\d+)", reply)[1]
    assert set(assigned) == set(sample.answers)
    for name in assigned:
        while name in assigned:
            name = assigned[name]
        assert name == value


def test_common_words(source):
    sample = TASKS["cwe"](source, LENGTH, 0)
    text, _ = words(source, sample)
    listed = text.rpartition("Memorize the ones that appear most often.\n")[2]
    counts = collections.Counter(re.findall(r"\d+\. ([a-z]+) ", listed))
    assert {word for word, _ in counts.most_common(10)} == set(sample.answers)
    assert [counts[word] for word in sample.answers] == [30] * 10
    assert counts.most_common(11)[10][1] == 3


def test_frequent_words(source):
    sample = TASKS["fwe"](source, LENGTH, 0)
    text, _ = words(source, sample)
    counts = collections.Counter(re.findall(r"\b[a-z]{6}\b", text.partition("coded words. ")[2])[:-1])
    top = counts.most_common(4)
    assert tuple(word for word, _ in top[:3]) == sample.answers
    assert top[2][1] > top[3][1]
    # In proportion to k ** -2, k = 2, 3, 4.
    assert top[0][1] / top[2][1] == pytest.approx(4, rel=0.1)


def test_score_is_the_share_of_answers_in_the_reply():
    assert share_found("they are 12 and 34.", ["12", "34"]) == 1
    assert share_found("VAR abcde", ["ABCDE", "FGHIJ"]) == 0.5
    assert share_found("", ["1"]) == 0
    assert any_found("in Abc", ["abc", "def"]) == 1
    assert any_found("", ["abc"]) == 0


def test_ruler_has_its_thirteen_tasks():
    assert len(GROUPS["ruler"]) == 13


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
@pytest.mark.parametrize("seed", range(6))
def test_questions_have_one_answer_in_the_documents(source, task, seed):
    sample = TASKS[task](source, LENGTH, seed)
    text, _ = words(source, sample)
    documents = re.findall(r"Document (\d+):\n(.*)\n", text)
    assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
    assert len(documents) > 15
    said = [passage for _, passage in documents if sample.answers[0] in passage]
    assert len(said) == 1
    if task == "qa_1":
        asked = re.search(r"Question: (?:In which town|Who) was (.*?)(?: born)?\?", text)[1]
        assert asked.removeprefix("the teacher of ") in said[0]
    else:
        title = re.search(r"Question: Who made the \w+ (\w+), and", text)[1]
        made = [passage for _, passage in documents if title in passage]
        assert len(made) == 1
        maker = re.search(r"([A-Z]\w+ [A-Z]\w+)(?:, who needed| made it)", made[0])[1]
        assert maker in said[0]


def test_what_cannot_be_made(source):
    with pytest.raises(InputError, match="too few for this task"):
        TASKS["niah_single_2"](source, 300, 0)
    short = Source(source.tokenizer, "only a few words\n" * 10)
    with pytest.raises(InputError, match="give a longer one"):
        TASKS["niah_single_2"](short, LENGTH, 0)
