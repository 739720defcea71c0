"""Questions within the memory that there is: batches are halved, what does not fit at all is a row."""

import copy
from dataclasses import asdict, replace

import pytest
import torch
from tiny_models import generate, make_model
from tiny_tokenizer import make_tokenizer

from evals import quality
from selfindex import SelfIndexCache
from selfindex.config import BARE_SHARE, SelfIndexConfig, parse_prefill
from selfindex.errors import InputError
from selfindex.evaluation import quiz as quizzes
from selfindex.evaluation import run as runs
from selfindex.evaluation.baselines import Unavailable
from selfindex.evaluation.methods import STRESS, Candidate, answering, wanted
from selfindex.evaluation.quiz import Quiz
from selfindex.evaluation.records import Records
from selfindex.evaluation.report import batch_table, not_measured, task_tables
from selfindex.evaluation.run import Run
from selfindex.evaluation.stats import mean_of_means, wilson
from selfindex.evaluation.suites import SUITES
from selfindex.evaluation.summary import summary
from selfindex.evaluation.tasks import TASKS, Source
from selfindex.evaluation.texts import load_text

OURS = "selfindex balanced 5 %"
PAPER = "selfindex paper 5 %"
LENGTH, CHAT_LENGTH = 1500, 3500


@pytest.fixture(scope="module")
def model():
    tokenizer = make_tokenizer()
    options = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    return make_model("llama", eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **options), tokenizer


@pytest.fixture(scope="module")
def source(model):
    return Source(model[1], load_text("manual"))


def samples(source, task, count=4):
    found = {i: TASKS[task](source, CHAT_LENGTH if task == "chat" else LENGTH, i) for i in range(count)}
    assert len({len(sample.document) for sample in found.values()}) == 1
    return found


@pytest.mark.parametrize(
    ("task", "name"),
    [("chat", "dense"), ("chat", PAPER)]
    + [("niah_single_2", name) for name in ("dense", PAPER, PAPER + STRESS, "Quest 5 %", "KIVI-2")],
)
def test_batches_and_single_prompts_agree(model, source, task, name):
    quiz, given = Quiz(*model, answering(0.05, 64, ("default", "every"))), samples(source, task, 2)
    (recording, _), *_ = quiz.prefilled(given)
    together = quiz.ask(name, recording, list(given.values()))
    alone = []
    for i, sample in given.items():
        (single, _), *_ = quiz.prefilled({i: sample})
        alone += quiz.ask(name, single, [sample])
    assert [one.replies for one in together] == [one.replies for one in alone]
    assert all(len(one.replies) == len(given[0].turns) for one in together)
    assert together[0].sizes["bytes"] > 0


@pytest.mark.parametrize("task", ["niah_single_2", "chat"])
def test_to_the_dense_model_it_is_the_same_where_the_question_stands(model, source, task):
    quiz, given = Quiz(*model, answering(0.05, 64, ("default",))), samples(source, task, 2)
    replies = []
    for asked in (given, {i: sample.in_prompt() for i, sample in given.items()}):
        ((recording, group),) = quiz.prefilled(asked)
        replies.append([one.replies for one in quiz.ask("dense", recording, list(group.values()))])
    assert replies[0] == replies[1]
    assert not any(sample.question for sample in group.values())


@pytest.mark.parametrize("options", [{}, {"pinned_tokens": 128}], ids=str)
def test_a_question_in_the_prompt_is_answered_as_by_generate(model, source, options):
    quiz, given = Quiz(*model, answering(0.05, 64, ("default",))), samples(source, "niah_single_2", 2)
    ((recording, group),) = quiz.prefilled({i: sample.in_prompt() for i, sample in given.items()})
    name = "selfindex balanced, 128 pinned 5 %" if options else OURS
    said = quiz.ask(name, recording, list(group.values()))
    for one, sample in zip(said, group.values(), strict=True):
        cache = SelfIndexCache(model[0], **BARE_SHARE, **options)
        ids = torch.tensor([sample.document])
        out = generate(model[0], ids, cache, max_new_tokens=sample.new_tokens)
        # The quiz ends at the end token, which `generate` is told to ignore here.
        assert model[1].decode(out[0, ids.shape[1] :], skip_special_tokens=True).startswith(*one.replies)
        assert len(one.replies[0]) > 3
    token = 2 * 64 * 4
    pages = (len(sample.document) - 80 - (128 if options else 0)) // 128
    extra = 128 * token / (128 * pages) if options else 0.0
    assert said[0].sizes["bytes"] == pytest.approx(43.0 + extra, abs=0.5)


@pytest.mark.parametrize("asked", ["later", "prompt"])
def test_a_suite_says_where_questions_stand(model, tmp_path, monkeypatch, asked):
    suite = replace(SUITES["quick"], methods=(OURS,), tasks=("niah_single_2",), task_lengths=(LENGTH,))
    suite = replace(suite, samples=1, policies=("default",), asked=asked)
    run = Run(*model, suite, {"manual": load_text("manual")}, 0.05, Records(tmp_path / "records.jsonl", {}))
    read, real = [], run.quiz.prefilled
    monkeypatch.setattr(run.quiz, "prefilled", lambda given: real(read.append(given[0]) or given))
    run.run("tasks")
    (sample,) = read
    assert bool(sample.question) == (asked == "later")
    assert len(sample.document) + len(sample.question) + sample.new_tokens == LENGTH


def test_every_reply_of_a_chat_has_the_length_of_a_number(model, source):
    quiz, given = Quiz(*model, answering(0.05, 64, ("default",))), samples(source, "chat", 2)
    (recording, _), *_ = quiz.prefilled(given)
    for one in quiz.ask("dense", recording, list(given.values())):
        assert len(one.replies) == 10
    assert given[0].new_tokens == len(" 1234567")


def scarce(limit, make):
    """A candidate that has memory for `limit` rows."""

    def limited(model, recording):
        if recording.queries[0].shape[0] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(model, recording)

    return limited


def test_a_method_without_memory_for_the_batch_takes_less_of_it(model, source):
    candidates = answering(0.05, 64, ("default",))
    make = candidates[PAPER].make
    limited = {"some": Candidate(scarce(1, make), 1.0, 1.0), "none": Candidate(scarce(0, make), 1.0, 1.0)}
    quiz, given = Quiz(*model, candidates | limited), samples(source, "niah_single_2", 3)
    (recording, _), *_ = quiz.prefilled(given)
    expected = quiz.ask(PAPER, recording, list(given.values()))
    found = quiz.ask("some", recording, list(given.values()))
    assert [one.replies for one in found] == [one.replies for one in expected]
    assert [one.replies for one in quiz.ask("none", recording, list(given.values()))] == [None] * 3


def test_documents_without_memory_for_the_batch_are_read_in_parts(model, source, monkeypatch):
    quiz, given = Quiz(*model, {}), samples(source, "niah_single_2", 5)
    real = quizzes.read

    def read(model, some, most=2):
        if len(some) > most:
            raise RuntimeError("not enough memory: you tried to allocate")
        return real(model, some)

    monkeypatch.setattr(quizzes, "read", read)
    parts = list(quiz.prefilled(given))
    assert [list(group) for _, group in parts] == [[0, 1], [2], [3, 4]]
    assert all(recording.queries[0].shape[0] == len(group) for recording, group in parts)
    monkeypatch.setattr(quizzes, "read", lambda *a: read(*a, most=0))
    assert [(recording, list(group)) for recording, group in quiz.prefilled(given)] == [
        (None, [i]) for i in range(5)
    ]


def test_other_errors_are_not_taken_for_a_lack_of_memory(model, source):
    def broken(model, recording):
        raise RuntimeError("shapes do not match")

    quiz, given = Quiz(*model, {"x": Candidate(broken, 1.0, 1.0)}), samples(source, "niah_single_2", 1)
    (recording, _), *_ = quiz.prefilled(given)
    with pytest.raises(RuntimeError, match="shapes"):
        quiz.ask("x", recording, list(given.values()))


def test_rows_follow_from_the_free_memory(model, monkeypatch):
    quiz = Quiz(*model, {})
    monkeypatch.setattr(quizzes, "free_memory", lambda device: 10**12)
    assert quiz.rows(1000) == quizzes.MOST_ROWS["cpu"]
    need = quiz._prompt_bytes(1000)
    monkeypatch.setattr(quizzes, "free_memory", lambda device: quiz._pass_bytes(1000) + 4.2 * need)
    assert quiz.rows(1000) == 3
    monkeypatch.setattr(quizzes, "free_memory", lambda device: 0)
    assert quiz.rows(1000) == 1
    assert Quiz(*model, {}, batch=5).rows(1000) == 5


def test_policies_name_the_rows():
    both = list(answering(0.05, 64, ("default", "every")))
    assert {OURS, OURS + STRESS, "Quest 5 %", "Quest 5 %, every query", "KIVI-2"} <= set(both)
    assert "KIVI-2, every query" not in both
    assert "selfindex balanced, all tokens, every query" not in both
    every = list(answering(0.05, 64, ("every",)))
    assert OURS not in every
    assert {OURS + STRESS, "dense", "SnapKV 5 %"} <= set(every)
    assert wanted(both, ("selfindex balanced 5",)) == ["dense", OURS, OURS + STRESS]
    with pytest.raises(InputError, match="no policy some"):
        answering(0.05, 64, ("some",))


def test_ways_to_read_name_the_rows():
    found = list(answering(0.05, 64, ("default",), ("exact", "sparse", "sparse=10%")))
    assert {"dense", "dense, prefill sparse", f"{OURS}, prefill sparse=10%"} <= set(found)
    assert not [name for name in found if name.endswith("exact") or name.startswith("KIVI-2, prefill")]
    few = wanted(found, (OURS,))
    assert few[:2] == ["dense", OURS]
    assert {"dense, prefill sparse", f"{OURS}, prefill sparse=10%"} < set(few)
    assert len(few) == 6


@pytest.mark.parametrize("name", ["dense", OURS])
def test_documents_are_read_sparsely(model, source, name):
    candidates = answering(0.05, 64, ("default",), ("sparse=100%", "sparse=10%"))
    quiz, given = Quiz(*model, candidates), samples(source, "niah_single_2", 2)
    (recording, _), *_ = quiz.prefilled(given)
    values = [
        recording.again(model[0], SelfIndexConfig(**parse_prefill(text)))
        for text in ("sparse=100%", "sparse=10%")
    ]
    exact, all_blocks, few = (x.tensors[-1][2] for x in (recording, *values))
    torch.testing.assert_close(all_blocks, exact, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(few, exact, atol=1e-3)
    said = [
        quiz.ask(other, recording, list(given.values())) for other in (name, f"{name}, prefill sparse=100%")
    ]
    assert [one.replies for one in said[0]] == [one.replies for one in said[1]]
    assert quiz.ask(f"{name}, prefill sparse=10%", recording, list(given.values()))[0].replies


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """Tasks of a run in which one method runs out of memory and one is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "FLOOR", 0.0)
        patch.setattr("selfindex.evaluation.summary.FLOOR", 0.0)
        yield _finished(model, tmp_path_factory.mktemp("quiz"))


def _finished(model, tmp_path):
    suite = replace(
        SUITES["quick"],
        methods=(OURS, "KIVI-2"),
        tasks=("niah_single_1", "qa_1", "lcc"),
        task_lengths=(LENGTH,),
        samples=3,
        policies=("default", "every"),
        batch_tasks=("niah_single_1",),
    )
    records = Records(tmp_path / "records.jsonl", {})
    run = Run(*model, suite, {"manual": load_text("manual")}, 0.05, records)
    candidates = run.quiz.candidates
    candidates["KIVI-2"] = candidates["KIVI-2"]._replace(make=scarce(0, candidates["KIVI-2"].make))

    def missing(model, recording):
        raise Unavailable("needs a package")

    candidates["KIVI-2, equal bytes"] = Candidate(missing, 1.0, 1.0)
    seen = []
    run.tick = seen.append
    run.run("tasks")
    run.run("batches")
    assert sum(seen) == run.total("tasks") + run.total("batches")
    return run, records


def test_what_did_not_fit_and_what_is_missing_are_rows(finished):
    run, records = finished
    assert run.unavailable == {"KIVI-2, equal bytes": "needs a package"}
    found = summary(records, list(run.quiz.candidates))
    table = found["tasks"][str(LENGTH)]
    assert list(table) == ["niah_single_1", "qa_1", "lcc"]
    assert set(table["lcc"]) == {"dense", OURS, OURS + STRESS, "KIVI-2"}
    assert table["lcc"]["KIVI-2"] == {"samples": 0, "failed": "out of memory"}
    assert table["lcc"][OURS]["samples"] == 3
    assert table["lcc"][OURS]["read"] < table["lcc"][OURS]["bytes"]
    assert 0 <= table["lcc"][OURS]["exact"][0] <= 1
    means = found["means"][str(LENGTH)]
    assert set(means) == {"ruler", "code"}
    assert means["ruler"]["dense"]["less"] == [0, 0, 0]
    page = "\n".join(task_tables(table, means))
    assert "| KIVI-2 |" in page
    assert "out of memory" in page
    assert "less than dense" in page
    batches = found["batches"]["niah_single_1"]
    assert batches["dense"] == {"samples": 8, "length": LENGTH, "score": 0, "together": 0, "same": 1}
    # The rows of a batch share the balance that their first pages fix.
    assert 0 < batches[OURS]["same"] <= 1
    assert "| niah_single_1 |" in "\n".join(batch_table(found["batches"]))


def test_the_page_of_results_takes_the_new_ones(finished):
    run, records = finished
    result = summary(records, list(run.quiz.candidates))
    result |= {"suite": asdict(run.suite), "unavailable": run.unavailable}
    environment = {"command": "selfindex eval", "date": "2026-11-28", "gpu": None, "cpus": 2}
    result["environment"] = environment | {"torch": "2", "transformers": "5"}
    named = [
        result | {"settings": {"model": name, "head_dim": 64, "parameters": size, "texts": ["manual"]}}
        for name, size in (("small", 1), ("large", 2))
    ]
    page = "\n".join(quality.tasks(quality.by_size(named)))
    assert page.index("### large (d = 64), 1,500 tokens") < page.index("### small (d = 64), 1,500 tokens")
    assert f"| {OURS}{STRESS} |" in page
    assert "Exactly right in lcc: dense" in page
    assert "every query selecting" not in page
    assert "Not measured: KIVI-2, equal bytes: needs a package." in page
    assert "| niah_single_1 | dense | 8 |" in "\n".join(quality.batches(named))


def test_a_run_goes_on_with_what_is_missing(finished):
    run, records = finished
    before = len(records.rows)
    run.run("tasks")
    run.run("batches")
    assert len(records.rows) == before


def test_samples_that_not_all_have_answered_do_not_count(finished):
    run, records = finished
    fewer = copy.copy(records)
    fewer.rows = [
        row
        for row in records.rows
        if not (row["method"] == OURS and row["sample"] == 2 and row["name"] == "lcc")
    ]
    table = summary(fewer, list(run.quiz.candidates))["tasks"][str(LENGTH)]
    assert {own["samples"] for own in table["lcc"].values()} == {0, 2}
    assert {own["samples"] for own in table["qa_1"].values()} == {0, 3}


def test_a_task_of_which_only_the_dense_model_was_asked_is_left_out(finished):
    run, records = finished
    fewer = copy.copy(records)
    fewer.rows = [row for row in records.rows if row["method"] == "dense" or row["name"] != "lcc"]
    methods = list(run.quiz.candidates)
    assert set(summary(fewer, methods)["tasks"][str(LENGTH)]) == {"niah_single_1", "qa_1"}
    assert "lcc" in summary(fewer, ["dense"])["tasks"][str(LENGTH)]


def test_no_memory_for_a_teacher_forced_row(model, tmp_path):
    suite = replace(SUITES["quick"], methods=("KIVI-2", "transformers HQQ"), fidelity=(900,), layers=(900,))
    records = Records(tmp_path / "records.jsonl", {})
    run = Run(*model, suite, {"manual": load_text("manual")}, 0.05, records)
    candidates = run.candidates
    candidates["KIVI-2"] = candidates["KIVI-2"]._replace(make=scarce(0, candidates["KIVI-2"].make))
    run.run("fidelity")
    run.run("layers")
    found = summary(records, list(candidates))
    assert "KIVI-2" not in found["fidelity"]["900"]["methods"]
    assert {"dense", "KIVI-2, equal bytes"} <= set(found["fidelity"]["900"]["methods"])
    assert found["failed"] == [
        "KIVI-2, fidelity at 900 tokens: out of memory",
        "KIVI-2, layers at 900 tokens: out of memory",
    ]
    assert "transformers HQQ 4" in run.unavailable
    page = "\n".join(not_measured(found | {"unavailable": run.unavailable}))
    assert "KIVI-2, fidelity at 900 tokens" in page
    assert "transformers HQQ 4: " in page


def test_intervals():
    numpy = pytest.importorskip("numpy")
    # Wilson (1927), for 10 of 10 and 0 of 10: z^2 / (n + z^2).
    assert wilson(numpy.ones(10)) == [1.0, pytest.approx(0.72247, abs=1e-4), 1.0]
    assert wilson(numpy.zeros(10)) == [0.0, 0.0, pytest.approx(0.27753, abs=1e-4)]
    middle = wilson(numpy.array([0.0, 1.0] * 50))
    assert middle == [0.5, pytest.approx(0.4038, abs=1e-3), pytest.approx(0.5962, abs=1e-3)]
    windows = [numpy.array([0.0, 1.0] * 50), numpy.ones(20)]
    estimate, low, high = mean_of_means(windows)
    assert estimate == 0.75
    assert (low, high) == (pytest.approx(0.70, abs=0.015), pytest.approx(0.80, abs=0.015))
