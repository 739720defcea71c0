"""Every model family: exact prefill, exact decoding until something is encoded, right decoding after."""

import pytest
import torch
from decoded_cache import decoded_cache, full_cache, small_cache
from steps import LEFT, grow, positions
from tiny_models import FAMILIES, HYBRIDS, forward, pair, prompt
from transformers import DynamicCache

from selfindex.integrations.transformers.families import TESTED

pytestmark = pytest.mark.parametrize("family", FAMILIES)


def test_the_family_is_on_the_list(family):
    assert pair(family)[0].config.model_type in TESTED


@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_prefill_is_the_dense_model_bit_for_bit(family, preset):
    dense, ours = pair(family)
    ids = prompt(40)
    cache = small_cache(ours, preset=preset)
    assert torch.equal(forward(ours, ids, cache), forward(dense, ids))
    assert all(layer.store.encoded(0) > 0 for layer in cache.compressed_layers)


def test_prefill_with_padding_is_the_dense_model_bit_for_bit(family):
    dense, ours = pair(family)
    ids = prompt(40, batch=2)
    options = {"mask": LEFT, "position_ids": positions(LEFT, 40)}
    got = forward(ours, ids, small_cache(ours), **options)
    assert torch.equal(got[LEFT.bool()], forward(dense, ids, **options)[LEFT.bool()])


def test_decoding_is_the_dense_model_bit_for_bit_while_nothing_is_encoded(family):
    dense, ours = pair(family)
    cache, reference = small_cache(ours, recent=100), DynamicCache(config=dense.config)
    for new in (20, 1, 1, 5, 1):
        ids = prompt(new, seed=new)
        assert torch.equal(forward(ours, ids, cache), forward(dense, ids, reference))


def test_decoding_with_padding_is_the_dense_model_while_nothing_is_encoded(family):
    dense, ours = pair(family)
    cache, reference, mask = small_cache(ours, recent=100), DynamicCache(config=dense.config), LEFT
    forward(ours, prompt(40, 2), cache, mask, position_ids=positions(mask, 40))
    forward(dense, prompt(40, 2), reference, mask, position_ids=positions(mask, 40))
    for new in (1, 1, 4, 1):
        ids, mask = prompt(new, 2, seed=new), grow(mask, new)
        options = {"mask": mask, "position_ids": positions(mask, new)}
        got, wanted = forward(ours, ids, cache, **options), forward(dense, ids, reference, **options)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("preset", ["balanced", "paper"])
@pytest.mark.parametrize("padded", [False, True])
def test_full_budget_is_the_dense_model_over_decoded_keys_and_values(family, preset, padded):
    dense, ours = pair(family)
    cache, mask = full_cache(ours, preset=preset), LEFT if padded else torch.ones_like(LEFT)
    forward(ours, prompt(40, 2), cache, mask, position_ids=positions(mask, 40))
    for new in (1, 3, 12, 1):
        ids, mask = prompt(new, 2, seed=new), grow(mask, new)
        options = {"mask": mask, "position_ids": positions(mask, new)}
        wanted = forward(dense, ids, decoded_cache(cache, dense), **options)
        got = forward(ours, ids, cache, **options)
        torch.testing.assert_close(got, wanted, atol=2e-4, rtol=2e-4)


def test_only_full_attention_layers_are_compressed(family):
    _, ours = pair(family)
    cache = small_cache(ours)
    kinds = [layer in cache.compressed_layers for layer in cache.layers]
    assert kinds == ([False, True, True] if family in HYBRIDS else [True, True])


def test_sparse_decoding_reads_its_budget(family):
    dense, ours = pair(family)
    cache = small_cache(ours, budget=10)
    forward(ours, prompt(80), cache)
    logits = forward(ours, prompt(1), cache)
    assert torch.isfinite(logits).all()
    for layer in cache.compressed_layers:
        assert layer.read == [10]
    # Attending to less changes the result, but not beyond recognition.
    wanted = forward(dense, torch.cat((prompt(80), prompt(1)), 1))[:, -1:]
    assert not torch.allclose(logits, wanted, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(family, dtype):
    import copy

    dense = copy.deepcopy(pair(family)[0]).to(dtype)
    ours, ids = copy.deepcopy(dense), prompt(40)
    cache = full_cache(ours)
    assert torch.equal(forward(ours, ids, cache), forward(dense, ids))
    reference = DynamicCache(config=dense.config)
    for i, layer in enumerate(decoded_cache(cache, dense).layers):
        reference.layers[i] = layer
        layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
        layer.dtype = dtype
    got, wanted = forward(ours, prompt(1), cache), forward(dense, prompt(1), reference)
    assert got.dtype == dtype
    # Rounding grows through the layers; what matters is that no layer is off by more than that.
    spread = wanted.float().std()
    assert (got.float() - wanted.float()).abs().max() < 0.15 * spread
