"""Keys and values that are not numbers are refused, also where a pass looks at them only at its end."""

import pytest
import torch
from decoded_cache import check_tokens, small_cache
from tiny_models import forward, generate, make_model, pair, prompt

from selfindex import InputError


@pytest.fixture(params=[False, True], ids=["at once", "at the end"])
def models(request):
    dense, ours = pair("llama")
    broken = make_model("llama")

    def cache(model, **options):
        made = small_cache(model, **options)
        made.finite.deferred = request.param
        return made

    return dense, ours, broken, cache


def spoil(model, layer, value=float("nan")):
    weight = model.model.layers[layer].self_attn.v_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[3, 5] = value

    def mend():
        with torch.no_grad():
            weight.copy_(before)

    return mend


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_a_bad_prompt_leaves_the_cache_empty(models, layer, preset):
    _, _, model, make = models
    cache, mend = make(model, preset=preset), spoil(model, layer)
    with pytest.raises(InputError, match=rf"layer {layer}: .*NaN or infinity"):
        forward(model, prompt(60, 2), cache)
    mend()
    cache.crop(0)
    assert cache.get_seq_length() == 0 or cache.get_seq_length() == 60 * (layer == 1)
    cache.reset()
    wanted = generate(model, prompt(60, 2), make(model, preset=preset))
    assert torch.equal(generate(model, prompt(60, 2), cache), wanted)


def test_a_bad_chunk_is_taken_back(models):
    dense, ours, _, make = models
    cache = make(ours)
    forward(ours, prompt(60), cache)
    before = cache.compressed_layers[0].store.statistics
    values = ours.model.layers[1].self_attn.v_proj
    handle = values.register_forward_hook(lambda *call: call[-1] * float("nan"))
    with pytest.raises(InputError, match=r"layer 1: .*NaN or infinity"):
        forward(ours, prompt(50), cache)
    handle.remove()
    cache.crop(60)
    assert cache.get_seq_length() == 60
    assert cache.compressed_layers[0].store.statistics is before
    check_tokens(cache, dense, prompt(60)[0])


def test_a_bad_step_is_refused_when_its_page_is_encoded(models):
    _, ours, _, make = models
    for emulate in (False, True):
        cache = make(ours)
        cache.replay.emulate = emulate
        forward(ours, prompt(60), cache)
        mend = spoil(ours, 1, float("inf"))
        try:
            with pytest.raises(InputError, match=r"layer 1: .*NaN or infinity"):
                steps(ours, cache)
        finally:
            mend()
        assert cache.get_seq_length() > 60


def steps(model, cache):
    for _ in range(30):
        forward(model, prompt(1), cache)
