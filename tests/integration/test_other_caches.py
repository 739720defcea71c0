"""A prepared model used without the cache, or with another one, is the model it was."""

import copy

import pytest
import torch
from decoded_cache import small_cache
from tiny_models import FAMILIES, cache_argument, forward, generate, make_model, pair, prompt
from transformers import DynamicCache, StaticCache

from selfindex import StateError


@pytest.fixture(params=FAMILIES)
def models(request):
    dense, ours = pair(request.param)
    small_cache(ours)  # prepares the model
    return dense, ours


def masks(kind, positions):
    mask = torch.ones(2, 30, dtype=torch.long)
    if kind == "left":
        mask[1, :11] = 0
    if kind == "right":
        mask[1, 20:] = 0
    return torch.cat((mask, torch.ones(2, positions - 30, dtype=torch.long)), 1)


@pytest.mark.parametrize("kind", ["none", "full", "left", "right"])
def test_without_a_cache(models, kind):
    dense, ours = models
    mask = None if kind == "none" else masks(kind, 30)
    real = torch.ones(2, 30).bool() if mask is None else mask.bool()
    with torch.no_grad():
        got, wanted = (m(prompt(30, 2), attention_mask=mask, use_cache=False).logits for m in (ours, dense))
    assert torch.equal(got[real], wanted[real])


@pytest.mark.parametrize("kind", ["none", "left", "right"])
@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_with_another_cache(models, kind, cache):
    dense, ours = models
    options = {"max_cache_len": 64} if cache is StaticCache else {}
    one, other = (cache(config=dense.config, **options) for _ in range(2))
    positions = 0
    for new in (30, 1, 5, 1):
        positions += new
        mask = None if kind == "none" else masks(kind, positions)
        ids = prompt(new, 2, seed=new)
        got, wanted = forward(ours, ids, one, mask), forward(dense, ids, other, mask)
        real = torch.ones(2, new).bool() if mask is None else mask[:, -new:].bool()
        torch.testing.assert_close(got[real], wanted[real], atol=1e-6, rtol=1e-5)


def test_generate_with_the_models_own_cache(models):
    dense, ours = models
    mask = masks("left", 30)
    got, wanted = (generate(m, prompt(30, 2), attention_mask=mask, max_new_tokens=6) for m in (ours, dense))
    assert torch.equal(got, wanted)


def test_training_still_works():
    dense, ours = (copy.deepcopy(m) for m in pair("llama"))
    small_cache(ours)
    grads = []
    for model in (dense, ours):
        model(prompt(20, 2), labels=prompt(20, 2), attention_mask=masks("right", 30)[:, 10:]).loss.backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert grads[0].abs().sum() > 0
    assert torch.equal(*grads)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_attention_implementation_the_cpu_has(attention):
    dense = make_model("llama", attention=attention)
    ours = copy.deepcopy(dense)
    cache, reference = small_cache(ours, recent=100), DynamicCache(config=dense.config)
    for new in (30, 1, 4):
        ids = prompt(new, 2, seed=new)
        assert torch.equal(forward(ours, ids, cache), forward(dense, ids, reference))
    ids, mask = prompt(30, 2), masks("left", 30)
    got, wanted = forward(ours, ids, small_cache(ours), mask), forward(dense, ids, mask=mask)
    assert torch.equal(got[mask.bool()], wanted[mask.bool()])


def test_a_cache_given_to_a_model_that_is_not_prepared_is_refused():
    dense, ours = pair("llama")
    with pytest.raises(StateError, match="not prepared"):
        forward(dense, prompt(5), small_cache(ours))


def test_two_caches_of_one_model_do_not_mix():
    _, ours = pair("llama")
    caches = [small_cache(ours, budget=9) for _ in range(2)]
    alone = small_cache(ours, budget=9)
    for new in (40, 1, 1):
        got = [forward(ours, prompt(new, seed=new + 10 * i), c) for i, c in enumerate(caches)]
        wanted = forward(ours, prompt(new, seed=new + 10), alone)
        assert torch.equal(got[1], wanted)


def test_the_argument_name_of_either_version_works():
    _, ours = pair("llama")
    cache = small_cache(ours)
    with torch.no_grad():
        ours(prompt(20), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 20
    forward(ours, prompt(1), cache)
    assert cache_argument(ours) in ("cache", "past_key_values")
    assert cache.get_seq_length() == 21
