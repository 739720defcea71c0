"""`enable`: pipelines and code that makes its own cache."""

import copy

import pytest
import torch
from decoded_cache import small_cache
from stores import SMALL
from tiny_models import VOCAB, cache_argument, forward, generate, pair, prompt
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import DynamicCache, PreTrainedTokenizerFast, pipeline

import selfindex


@pytest.fixture
def models():
    dense, _ = pair("llama")
    return dense, copy.deepcopy(dense)


def test_generate_uses_the_cache_inside_the_context_only(models):
    dense, model = models
    wanted = generate(dense, prompt(60))
    with selfindex.enable(model, **SMALL, budget=7) as enabled:
        got = generate(model, prompt(60))
        assert enabled.cache.get_seq_length() == 71
        assert enabled.cache.compressed_layers[0].read == [7]
        assert torch.equal(got, generate(model, prompt(60), small_cache(model, budget=7)))
        first = enabled.cache
        generate(model, prompt(10))
        assert enabled.cache is not first
    assert model.config._attn_implementation == dense.config._attn_implementation
    assert torch.equal(generate(model, prompt(60)), wanted)
    assert "generate" not in vars(model)


def test_disable_undoes_enable_even_after_an_error(models):
    dense, model = models
    with pytest.raises(ZeroDivisionError), selfindex.enable(model, **SMALL):
        raise ZeroDivisionError
    assert model.config._attn_implementation == dense.config._attn_implementation
    enabled = selfindex.enable(model, **SMALL)
    enabled.disable()
    assert torch.equal(forward(model, prompt(40)), forward(dense, prompt(40)))
    assert not model._forward_pre_hooks


def test_plain_forward_calls_get_a_cache(models):
    _, model = models
    with selfindex.enable(model, **SMALL) as enabled, torch.no_grad():
        out = model(prompt(40), use_cache=True)
        returned = getattr(out, cache_argument(model), None) or out.past_key_values
        assert returned is enabled.cache
        assert enabled.cache.compressed_layers[0].store.encoded(0) == 24
        model(prompt(1), use_cache=True, **{cache_argument(model): returned})
        assert enabled.cache.get_seq_length() == 41


def test_what_the_caller_asks_for_is_left_alone(models):
    dense, model = models
    with selfindex.enable(model, **SMALL) as enabled, torch.no_grad():
        cache = DynamicCache(config=model.config)
        got = generate(model, prompt(30), cache)
        assert cache.get_seq_length() == 41
        assert torch.equal(got, generate(dense, prompt(30)))
        assert torch.equal(generate(model, prompt(30), use_cache=False), got)
        model(prompt(5), use_cache=False)
        assert enabled.cache is None


def test_beams_and_batches(models):
    _, model = models
    ids, mask = prompt(40, 2), torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    with selfindex.enable(model, **SMALL) as enabled:
        got = generate(model, ids, attention_mask=mask, num_beams=3, num_return_sequences=2)
        assert enabled.cache.compressed_layers[0].store.batch == 6
    cache = small_cache(model)
    wanted = generate(model, ids, cache, attention_mask=mask, num_beams=3, num_return_sequences=2)
    assert torch.equal(got, wanted)


def test_bad_options_are_refused_before_the_model_is_touched(models):
    _, model = models
    with pytest.raises(selfindex.ConfigError, match="budget"):
        selfindex.enable(model, budget=2.0)
    with pytest.raises(selfindex.UnsupportedModelError):
        selfindex.enable(torch.nn.Linear(2, 2))
    assert model.config._attn_implementation == "sdpa"


@pytest.fixture
def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def words(ids):
    return " ".join(f"w{i}" for i in ids.tolist())


def test_pipeline(models, tokenizer):
    dense, model = models
    texts = [words(prompt(50)[0]), words(prompt(33, seed=1)[0])]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": VOCAB, "return_full_text": False}

    def run(model, **more):
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, **more)
        return [out[0]["generated_text"] for out in pipe(texts, **options)]

    wanted = run(dense)
    with selfindex.enable(model, **(SMALL | {"recent": 100})) as enabled:
        assert run(model) == wanted
        assert run(model, batch_size=2) == run(dense, batch_size=2)
        assert enabled.cache.compressed_layers[0].store.batch == 2
    with selfindex.enable(model, **SMALL, budget=5) as enabled:
        run(model)
        assert enabled.cache.compressed_layers[0].read == [5]
