"""What every supported family is run for, each on a tiny model; `-m wide` runs the rest for all of them."""

import families
import pytest
import torch
from decoded_cache import decoded_cache, full_cache, small_cache
from steps import LEFT, grow, positions
from tiny_models import forward, generate, prompt
from transformers import DynamicCache

from selfindex.integrations.transformers.families import TESTED


@pytest.fixture(params=sorted(families.MORE))
def family(request):
    if not families.available(request.param):
        pytest.skip("this transformers does not have the family")
    return request.param


def test_it_is_the_dense_model_while_nothing_is_encoded(family):
    dense, ours = families.pair(family)
    assert dense.config.model_type in TESTED
    cache, reference = small_cache(ours, recent=100), DynamicCache(config=dense.config)
    assert len(cache.compressed_layers) == families.compressed(family)
    for new in (20, 1, 5):
        ids = prompt(new, seed=new)
        assert torch.equal(forward(ours, ids, cache), forward(dense, ids, reference))
    cache.reset()
    ids = prompt(20, 2)
    assert torch.equal(generate(ours, ids, cache), generate(dense, ids))


def test_it_is_the_dense_model_over_decoded_keys_and_values(family):
    dense, ours = families.pair(family)
    cache, mask = full_cache(ours), LEFT
    ids, options = prompt(40, 2), {"mask": mask, "position_ids": positions(mask, 40)}
    got = forward(ours, ids, cache, **options)
    assert torch.equal(got[LEFT.bool()], forward(dense, ids, **options)[LEFT.bool()])
    for new in (1, 12, 3):
        ids, mask = prompt(new, 2, seed=new), grow(mask, new)
        options = {"mask": mask, "position_ids": positions(mask, new)}
        wanted = forward(dense, ids, decoded_cache(cache, dense), **options)
        got = forward(ours, ids, cache, **options)
        torch.testing.assert_close(got, wanted, atol=2e-4, rtol=2e-4)
    assert {x.store.format.head_dim for x in cache.compressed_layers} == {families.head_dim(family)}
    # Attending to less changes the result, so attention matters in this model.
    cache.set_budget(10)
    wanted = forward(dense, ids, decoded_cache(cache, dense), mask=grow(mask, 3))
    assert not torch.allclose(forward(ours, ids, cache, mask=grow(mask, 3)), wanted, atol=1e-3)
    assert all(max(layer.read) == 10 for layer in cache.compressed_layers)
