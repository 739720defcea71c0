"""A document in the second turn: many new tokens behind held ones, through a model."""

import pytest
import torch
from allocations import LargestTensor
from decoded_cache import decoded_cache, full_cache, small_cache
from tiny_models import forward, make_model, pair, prompt
from transformers import DynamicCache

from selfindex import SelfIndexCache
from selfindex.attention import exact
from selfindex.integrations.transformers import layer as layer_module

LONG = layer_module.MASKED_CHUNK + 100


@pytest.fixture
def few(monkeypatch):
    """Chunks of a few dozen tokens count as long."""
    monkeypatch.setattr(exact, "FEW_QUERIES", 20)
    monkeypatch.setattr(layer_module, "MASKED_CHUNK", 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_behind_tokens_of_which_none_is_encoded_it_is_a_dense_cache(dtype):
    dense, ours = pair("llama", dtype=dtype, max_position_embeddings=4096)
    ids = prompt(40 + LONG + 3)
    cache, other = SelfIndexCache(ours), DynamicCache(config=dense.config)
    for chunk in ids.split([40, LONG, 3], 1):
        encoded = cache.compressed_layers[0].store is not None and cache.compressed_layers[0].store.encoded(0)
        got, wanted = forward(ours, chunk, cache), forward(dense, chunk, other)
        if not encoded:
            tolerance = 1e-3 if dtype == torch.float32 else 0.15
            torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)
    assert cache.compressed_layers[0].store.encoded(0) > LONG - 200


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize("padded", [False, True])
def test_behind_encoded_tokens_it_attends_to_the_decoded_cache(family, padded, few):
    dense, ours = pair(family)
    cache, ids = full_cache(ours), prompt(100, 2)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :25] = 0
        mask[1, 50:53] = mask[0, 95:] = 0  # in the second chunk
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    forward(ours, ids[:, :40], cache, mask[:, :40], position_ids=positions[:, :40])
    assert cache.compressed_layers[0].store.encoded(1)
    other = decoded_cache(cache, dense)
    options = {"mask": mask, "position_ids": positions[:, 40:]}
    got, wanted = forward(ours, ids[:, 40:], cache, **options), forward(dense, ids[:, 40:], other, **options)
    real = mask[:, 40:].bool()
    torch.testing.assert_close(got[real], wanted[real], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("before", [40, 400])
@pytest.mark.parametrize("padded", [False, True])
def test_memory_is_linear(before, padded):
    ours = make_model("llama", max_position_embeddings=4096)
    cache, ids = SelfIndexCache(ours), prompt(before + LONG, 2)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :30] = 0
    forward(ours, ids[:, :before], cache, mask[:, :before])
    with LargestTensor() as largest:
        forward(ours, ids[:, before:], cache, mask)
    # What the model itself makes are activations and logits, 4 heads of 64 and 96 of these; of pairs
    # there are more than a thousand for each new token.
    assert largest.bytes <= 2 * (before + LONG) * 4 * 256


@pytest.mark.parametrize("new", [9, 20])
def test_layers_share_the_mask_of_a_few_new_tokens(new, monkeypatch):
    _, ours = pair("llama")
    cache, made, bias = small_cache(ours, budget=9), [], exact._bias
    ids = prompt(50 + 3 * new, 2)
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[0, 50 + new] = 0
    forward(ours, ids[:, :50], cache, mask[:, :50])
    monkeypatch.setattr(exact, "_bias", lambda *a: made.append(1) or bias(*a))
    for i in range(3):
        last = 50 + (i + 1) * new
        forward(ours, ids[:, last - new : last], cache, mask[:, :last])
        assert len(made) == i + 1
