"""The model type `selfindex` of lm-evaluation-harness."""

import json

import pytest
import torch
from stores import SMALL
from tiny_models import VOCAB, forward, pair

import selfindex

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from selfindex.integrations.lm_eval import SelfIndexLM


def words(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(3, VOCAB, (n,), generator=generator).tolist())


@pytest.fixture
def tokenizer():
    """One token a word: w3, w4, ..."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


@pytest.fixture
def lm(tokenizer):
    def make(**options):
        return SelfIndexLM(
            pretrained=pair("llama")[1], tokenizer=tokenizer, device="cpu", max_length=80, **(SMALL | options)
        )

    return make


def log_likelihood(model, ids, continuation):
    scores = forward(model, torch.tensor([ids + continuation])).log_softmax(-1)[0, len(ids) - 1 : -1]
    target = torch.tensor(continuation)[:, None]
    return float(scores.gather(1, target).sum()), bool((scores.argmax(-1) == target[:, 0]).all())


def request(tokenizer, context, continuation):
    return (context, continuation), tokenizer(context).input_ids, tokenizer(continuation).input_ids


def test_while_nothing_is_encoded_the_scores_are_the_models(lm, tokenizer):
    requests = [
        request(tokenizer, context, words(n, seed=n))
        for context in (words(30, 1), words(12, 2))
        for n in (1, 4)
    ]
    got = lm(recent=200)._loglikelihood_tokens(requests, disable_tqdm=True)
    for (_, context, continuation), (score, greedy) in zip(requests, got, strict=True):
        wanted = log_likelihood(pair("llama")[0], context, continuation)
        assert score == pytest.approx(wanted[0], abs=1e-3)
        assert greedy == wanted[1]


def test_the_continuation_attends_through_the_cache(lm, tokenizer):
    model = lm(budget=6)
    context, continuation = tokenizer(words(60, 1)).input_ids, tokenizer(words(5, 2)).input_ids
    ((score, _),) = model._loglikelihood_tokens([(("", ""), context, continuation)], disable_tqdm=True)
    cache = selfindex.SelfIndexCache(model.model, model.cache_config)
    forward(model.model, torch.tensor([context[:-1]]), cache)
    ids = torch.tensor([context[-1:] + continuation])
    scores = forward(model.model, ids[:, :-1], cache)[0].log_softmax(-1)
    assert cache.compressed_layers[0].read == [6]
    assert score == pytest.approx(float(scores.gather(1, ids[0, 1:, None]).sum()), abs=1e-4)
    dense = log_likelihood(pair("llama")[0], context, continuation)[0]
    assert abs(score - dense) > 1e-3


def test_a_share_is_read_as_it_is(tokenizer):
    """No least number of tokens, and nothing dense, unless it is asked for."""
    made = [
        SelfIndexLM(pretrained=pair("llama")[1], tokenizer=tokenizer, device="cpu", budget=0.05, **options)
        for options in ({}, {"min_tokens": 300})
    ]
    assert [model.cache_config.budget_tokens(1000, 900) for model in made] == [50, 300]


def test_a_context_that_is_too_long_is_cut_from_the_left(lm, tokenizer):
    context, continuation = tokenizer(words(120, 1)).input_ids, tokenizer(words(5, 2)).input_ids
    model = lm(recent=200)
    ((score, _),) = model._loglikelihood_tokens([(("", ""), context, continuation)], disable_tqdm=True)
    wanted = log_likelihood(pair("llama")[0], (context + continuation)[-81:-5], continuation)[0]
    assert score == pytest.approx(wanted, abs=1e-3)


@pytest.mark.slow
def test_a_task_runs(lm, tmp_path):
    rows = [
        {"text": words(50, i), "answer": i % 2, "choices": [words(2, i), words(2, i + 9)]} for i in range(4)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    found = simple_evaluate(
        lm(budget=6), tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    assert found["n-samples"]["local"]["effective"] == 4
    assert 0 <= found["results"]["local"]["acc,none"] <= 1


def test_generation_uses_the_cache(lm, tokenizer):
    model = lm(budget=6)
    context = torch.tensor([tokenizer(words(50, 1)).input_ids])
    got = model._model_generate(context, 60, stop=[])
    cache = selfindex.SelfIndexCache(model.model, model.cache_config)
    logits = forward(model.model, context, cache)[:, -1]
    for token in got[0, 50:]:
        assert int(logits.argmax()) == int(token)
        logits = forward(model.model, token.view(1, 1), cache)[:, -1]


def test_options_are_checked(lm):
    with pytest.raises(selfindex.ConfigError, match="budget"):
        lm(budget=2.5)
