"""What the evaluation sees inside a model is what the model does."""

import pytest
import torch
from decoded_cache import small_cache
from stores import small_options
from tiny_models import forward, pair, prompt
from transformers import DynamicCache

from evals import capture
from evals.endtoend import compare
from evals.missed import compare as shares_missed
from evals.reuse import record_selections
from evals.sparse import Variant, encode
from selfindex.evaluation.cache_layers import full_attention_layers, observe_dense
from selfindex.evaluation.recording import record


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_observed_dense_pass_is_the_models_own(family):
    dense, ours = pair(family)
    ids, wanted, seen = prompt(60), DynamicCache(config=dense.config), []
    first, second = forward(dense, ids[:, :50], wanted), forward(dense, ids[:, 50:], wanted)
    cache = DynamicCache(config=ours.config)
    with torch.no_grad():
        logits = [observe_dense(ours, cache, part, seen.append).logits for part in (ids[:, :50], ids[:, 50:])]
    for got, expected in zip(logits, (first, second), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    full = full_attention_layers(ours)
    assert [x.layer.layer_idx for x in seen] == 2 * full
    for layer, expected in zip(cache.layers, wanted.layers, strict=True):
        assert type(layer) is type(expected)
        torch.testing.assert_close(layer.keys, expected.keys)
    for i, x in zip(full, seen[len(full) :], strict=True):
        assert torch.equal(x.keys, cache.layers[i].keys[:, :, 50:])
        grouped = torch.nn.functional.scaled_dot_product_attention(
            x.query, cache.layers[i].keys, cache.layers[i].values, torch.ones(10, 60, dtype=bool).tril(50),
            scale=x.scaling, enable_gqa=True,
        )  # fmt: skip
        torch.testing.assert_close(x.output, grouped.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_a_recording_fills_a_cache_as_the_model_does():
    _, ours = pair("gemma3")
    ids = prompt(70)
    filled, direct = record(ours, ids[:, :60]).fill(small_cache(ours)), small_cache(ours)
    forward(ours, ids[:, :60], direct)
    assert torch.equal(forward(ours, ids[:, 60:], filled), forward(ours, ids[:, 60:], direct))


def test_a_simulated_cache_that_reads_everything_exactly_is_the_dense_one():
    _, ours = pair("llama")
    found = capture.record(ours, prompt(700)[0], 650, "random")
    exact = Variant(aggregate="oracle", budget=1.0)
    prefixes = {i: encode(layer, exact, torch.ones(2, 64)) for i, layer in found.layers.items()}
    assert compare(ours, found, exact, prefixes)["kl"].mean() > 1e-5  # keys and values are quantised
    for prefix in prefixes.values():
        prefix.k_hat, prefix.v_hat = prefix.k_true, prefix.v_true
    metrics = compare(ours, found, exact, prefixes)
    assert metrics["kl"].max() < 1e-5
    assert (metrics["read"] == 1).all()


def test_selections_are_those_of_every_sparse_step():
    _, ours = pair("llama")
    cache, found = small_cache(ours, budget=10), []
    forward(ours, prompt(60), cache)
    record_selections(cache, found)
    for i in range(3):
        forward(ours, prompt(1, seed=i), cache)
    assert [x.shape for x in found] == 6 * [(2, 10)]
    assert all((x[:, 1:] > x[:, :-1]).all() for x in found)
    assert max(x.max() for x in found) < cache.compressed_layers[0].store.encoded(0)


def test_the_true_share_missed_is_close_to_the_reported_one():
    _, ours = pair("llama")
    ids = prompt(75)
    true, reported = shares_missed(ours, ids, 60, **small_options(budget=10))
    assert true.shape == reported.shape == (15, 2)  # pages are encoded on the way
    assert abs(true - reported).mean() < 0.15 * true.mean()
    full, none = shares_missed(ours, ids[:, :63], 60, **small_options(budget=1.0))
    assert not full.any()
    assert not none.any()
