"""Attention weights that were asked for: there is an error, not a reply without them."""

import pytest
import torch
from decoded_cache import full_cache, small_cache
from tiny_models import forward, generate, make_model, pair, prompt
from transformers import DynamicCache, GenerationConfig

from selfindex import InputError, SelfIndexCache

ASK = {"output_attentions": True, "return_dict_in_generate": True}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_pass_that_asks_for_weights_is_refused_and_changes_nothing(family):
    _, ours = pair(family, attention="eager")
    cache, same = full_cache(ours), full_cache(ours)
    for tokens in (40, 1):
        step = {"cache": cache, "output_attentions": True}
        with pytest.raises(InputError, match="output_attentions"):
            forward(ours, prompt(tokens), **step)
        wanted = forward(ours, prompt(tokens), same)
        assert torch.equal(forward(ours, prompt(tokens), cache, output_attentions=False), wanted)


@pytest.mark.parametrize("how", ["argument", "generation_config", "model.generation_config", "config"])
def test_whoever_asks(how):
    model, given = make_model("llama", attention="eager"), {}
    cache = small_cache(model)
    if how == "argument":
        given = ASK
    elif how == "generation_config":
        given = {"generation_config": GenerationConfig(**ASK, max_new_tokens=3)}
    elif how == "model.generation_config":
        model.generation_config.update(**ASK)
    else:
        model.config._output_attentions = True
    with pytest.raises(InputError, match="output_attentions"):
        generate(model, prompt(40), cache, **given)
    assert cache.get_seq_length() == 0


def test_a_config_that_asks_from_the_start():
    model = make_model("llama", attention="eager", output_attentions=True)
    cache = SelfIndexCache(model)
    with pytest.raises(InputError, match="output_attentions"):
        forward(model, prompt(40), cache)


def test_with_another_cache_the_weights_are_there():
    dense, ours = pair("llama", attention="eager")
    SelfIndexCache(ours)
    outputs = [generate(m, prompt(40), DynamicCache(config=m.config), **ASK) for m in (dense, ours)]
    for a, b in zip(outputs[0].attentions[3], outputs[1].attentions[3], strict=True):
        assert torch.equal(a, b)
