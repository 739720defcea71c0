"""The wide grid: what test_generate and test_cache_methods run for a few families, for all of them."""

import copy
import warnings

import families
import pytest
import tiny_models
import torch
from decoded_cache import decoded_cache, full_cache, small_cache
from steps import LEFT, grow, positions
from tiny_models import forward, generate, prompt
from transformers import DynamicCache, set_seed

from selfindex import StateError
from selfindex.integrations.transformers import replay

pytestmark = pytest.mark.wide
TOLERANCE = {"atol": 5e-4, "rtol": 5e-4}


@pytest.fixture(params=sorted({*families.MORE, *tiny_models.FAMILIES}))
def family(request):
    if request.param in families.MORE and not families.available(request.param):
        pytest.skip("this transformers does not have the family")
    return request.param


@pytest.fixture
def models(family):
    return families.pair(family) if family in families.MORE else tiny_models.pair(family)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3, "do_sample": True},
        {"prefill_chunk_size": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
def test_generate_is_the_dense_model_while_nothing_is_encoded(models, options, padded):
    dense, ours = models
    ids, mask = prompt(40, 2), LEFT if padded else torch.ones_like(LEFT)
    set_seed(1)
    wanted = generate(dense, ids, attention_mask=mask, **options)
    set_seed(1)
    got = generate(ours, ids, small_cache(ours, recent=100), attention_mask=mask, **options)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("preset", ["balanced", "paper"])
@pytest.mark.parametrize("padded", [False, True])
def test_chunks_of_a_prompt_over_decoded_keys_and_values(models, preset, padded):
    dense, ours = models
    cache, mask = full_cache(ours, preset=preset), LEFT if padded else torch.ones_like(LEFT)
    ids, options = prompt(40, 2), {"mask": mask, "position_ids": positions(mask, 40)}
    forward(ours, ids, cache, **options)
    for new in (20, 1, 9):
        ids, mask = prompt(new, 2, seed=new), grow(mask, new)
        options = {"mask": mask, "position_ids": positions(mask, new)}
        wanted = forward(dense, ids, decoded_cache(cache, dense), **options)
        torch.testing.assert_close(forward(ours, ids, cache, **options), wanted, **TOLERANCE)


def test_rows_change_place(models):
    dense, ours = models
    cache = full_cache(ours)
    forward(ours, prompt(40, 3), cache)
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.batch_repeat_interleave(2)
    ids = prompt(1, 4, seed=1)
    wanted = forward(dense, ids, decoded_cache(cache, dense))
    torch.testing.assert_close(forward(ours, ids, cache), wanted, **TOLERANCE)


def test_crop(family, models):
    dense, ours = models
    cache, reference = small_cache(ours, recent=100), DynamicCache(config=dense.config)
    for one, model in ((cache, ours), (reference, dense)):
        one.activate_past_recording()
        forward(model, prompt(14), one)
    if family in families.STATES and "lfm2" not in family:
        with pytest.raises(StateError, match="cannot go back"):
            cache.crop(-3)
        return
    for one in (cache, reference):
        one.crop(-3)
    for new in (2, 1):
        ids = prompt(new, seed=new)
        assert torch.equal(forward(ours, ids, cache), forward(dense, ids, reference))


def test_a_fork_and_a_copy_go_on_by_themselves(models):
    dense, ours = models
    cache = full_cache(ours)
    forward(ours, prompt(40), cache)
    others = cache.fork(), copy.deepcopy(cache)
    forward(ours, prompt(12, seed=2), cache)
    for one in (cache, *others):
        wanted = forward(dense, prompt(1), decoded_cache(one, dense))
        torch.testing.assert_close(forward(ours, prompt(1), one), wanted, **TOLERANCE)


def test_steps_of_fixed_shape(family, models, monkeypatch):
    """What a GPU replays: the same tokens, where the model allows it."""
    monkeypatch.setattr(replay, "announce", replay.announce.__wrapped__)
    _, ours = models
    ids = prompt(40)
    wanted = generate(ours, ids, small_cache(ours))
    cache = small_cache(ours)
    cache.replay.emulate = True
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert torch.equal(generate(ours, ids, cache), wanted)
    reasons = [x for x in said if "decode steps one by one" in str(x.message)]
    assert cache.replay.steps == (0 if reasons else 11)
    assert not reasons or family in families.STATES or family == "llama4_text"


def test_it_is_the_model_it_was_with_another_cache_and_without(models):
    dense, ours = models
    small_cache(ours)
    ids = prompt(40, 2)
    got = generate(ours, ids, attention_mask=LEFT)
    assert torch.equal(got, generate(dense, ids, attention_mask=LEFT))
    with torch.no_grad():
        got, wanted = (m(ids, attention_mask=LEFT, use_cache=False).logits for m in (ours, dense))
    assert torch.equal(got[LEFT.bool()], wanted[LEFT.bool()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(models, dtype):
    dense = copy.deepcopy(models[0]).to(dtype)
    ours, ids = copy.deepcopy(dense), prompt(40)
    cache = full_cache(ours)
    wanted = forward(dense, ids)
    if not torch.isfinite(wanted).all():
        pytest.skip("the dense model overflows")
    assert torch.equal(forward(ours, ids, cache), wanted)
    reference = decoded_cache(cache, dense)
    for i in (layer.layer_idx for layer in cache.compressed_layers):
        layer = reference.layers[i]
        layer.keys, layer.values, layer.dtype = layer.keys.to(dtype), layer.values.to(dtype), dtype
    got, wanted = forward(ours, prompt(1), cache), forward(dense, prompt(1), reference)
    assert got.dtype == wanted.dtype
    # Rounding grows through the layers; what matters is that no layer is off by more than that.
    assert (got.float() - wanted.float()).abs().max() < 0.15 * wanted.float().std()


def test_eager_attention(models):
    dense = copy.deepcopy(models[0])
    dense.set_attn_implementation("eager")
    ours, mask = copy.deepcopy(dense), LEFT
    cache = full_cache(ours)
    ids, options = prompt(40, 2), {"mask": mask, "position_ids": positions(mask, 40)}
    got = forward(ours, ids, cache, **options)
    assert torch.equal(got[LEFT.bool()], forward(dense, ids, **options)[LEFT.bool()])
    ids, mask = prompt(3, 2, seed=3), grow(mask, 3)
    options = {"mask": mask, "position_ids": positions(mask, 3)}
    wanted = forward(dense, ids, decoded_cache(cache, dense), **options)
    torch.testing.assert_close(forward(ours, ids, cache, **options), wanted, **TOLERANCE)
