import json

import pytest
import torch
from decoded_cache import small_cache
from tiny_models import forward, pair, prompt


@pytest.fixture(params=["llama", "gemma3"])
def used(request):
    _, ours = pair(request.param)
    cache = small_cache(ours, budget=9)
    forward(ours, prompt(60, 2), cache)
    forward(ours, prompt(1, 2), cache)
    return cache


def test_report_counts_tokens_and_bytes(used):
    report = used.report()
    stores = [layer.store for layer in used.compressed_layers]
    assert [layer.layer for layer in report.layers] == [x.layer_idx for x in used.compressed_layers]
    for layer, store in zip(report.layers, stores, strict=True):
        assert (layer.tokens, layer.encoded) == (2 * 61, 2 * 48)
        # The budget, and all full-precision tokens.
        assert layer.read == 2 * (9 + 13)
        assert layer.memory == store.memory()
        assert layer.dense_bytes == 2 * 61 * store.format.kv_heads * store.format.head_dim * 4
    assert report.memory.total == sum(store.memory().total for store in stores)
    assert report.ratio == pytest.approx(report.dense_bytes / report.memory.total)
    assert report.read_fraction == pytest.approx((9 + 13) / 61)


def test_report_is_readable_and_serialisable(used):
    text = str(used.report())
    assert "122 tokens in 2 layers" in text
    assert "96 encoded" in text
    assert "22 to 22" in text or "44 to 44" in text
    again = json.loads(json.dumps(used.report().to_dict()))
    assert again["preset"] == "balanced"
    assert again["layers"][0]["memory"]["index"] == used.report().layers[0].memory.index


def test_report_of_an_empty_cache():
    _, ours = pair("llama")
    report = small_cache(ours).report()
    assert "empty" in str(report)
    assert (report.memory.total, report.ratio, report.read_fraction) == (0, 1.0, 1.0)


@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_report_right_after_the_prompt(preset):
    _, ours = pair("llama")
    cache = small_cache(ours, preset=preset)
    forward(ours, prompt(60), cache)
    # Prefill attends to everything.
    assert cache.report().read_fraction == 1.0
    assert "tokens" in str(cache.report())


def test_read_is_that_of_the_last_step_after_rows_are_dropped(used):
    used.batch_select_indices(torch.tensor([0]))
    report = used.report()
    assert report.layers[0].tokens == 61
    assert report.read_fraction <= 1.0
