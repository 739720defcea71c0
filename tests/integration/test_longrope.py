"""Models whose rotary factors change at a length: keys of the old ones are not used with the new ones."""

import copy

import pytest
import torch
from decoded_cache import small_cache
from tiny_models import generate, make_model, prompt

import selfindex

ROTARY = {
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.5,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 24,
        "long_factor": [4.0] * 24,
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 0.5,
    },
}


@pytest.fixture(scope="module")
def models():
    dense = make_model("phi3", **ROTARY)
    return dense, copy.deepcopy(dense)


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_are_those_of_the_dense_model_on_both_sides(models, batch, emulate):
    dense, ours = models
    ids = prompt(58, batch)
    mask = torch.ones_like(ids)
    mask[1:, :3] = 0
    wanted = generate(dense, ids, attention_mask=mask, max_new_tokens=20, use_cache=False)
    cache = small_cache(ours, recent=100)
    cache.replay.emulate = emulate
    got = generate(ours, ids, cache, attention_mask=mask, max_new_tokens=20)
    assert torch.equal(got, wanted)
    assert cache.get_seq_length() == got.shape[1] - 1


def test_a_cache_made_by_the_library(models):
    dense, ours = models
    ids = prompt(60)
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 12,
        "eos_token_id": 96,
        "pad_token_id": 0,
    }
    got = selfindex.generate(ours, ids, recent=100, **options)
    assert torch.equal(got, dense.generate(ids, do_sample=False, use_cache=False, **options))
    with selfindex.enable(ours, recent=100) as enabled:
        assert torch.equal(ours.generate(ids, do_sample=False, **options), got)
    assert enabled.cache.get_seq_length() == got.shape[1] - 1
