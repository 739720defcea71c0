import json
from dataclasses import replace

import pytest
import torch
from decoded_cache import small_cache
from tiny_models import forward, make_model, pair, prompt
from transformers import DynamicCache


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
        # And the query that says what the step missed.
        last = used.layers[layer.layer].last
        assert layer.memory == replace(store.memory(), statistics=store.memory().statistics + last.nbytes)
        assert last.nbytes == last.asked.query.nbytes > 0
        assert layer.dense_bytes == 2 * 61 * store.format.kv_heads * store.format.head_dim * 4
    queries = sum(layer.last.nbytes for layer in used.compressed_layers)
    assert report.memory.total == sum(store.memory().total for store in stores) + queries
    assert report.ratio == pytest.approx(report.dense_bytes / report.memory.total)
    assert report.read_fraction == pytest.approx((9 + 13) / 61)


def test_report_is_readable_and_serialisable(used):
    text = str(used.report())
    assert "122 tokens in 2 layers" in text
    assert "96 encoded" in text
    assert "(2 rows of 61 to 61)" in text
    assert "22 to 22 tokens per row and head in the last step (36.1 %)" in text
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


def padded(cache, model):
    """Two rows of 60 and 40 tokens, then one more each."""
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :20] = 0
    forward(model, prompt(60, 2), cache, mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
    forward(model, prompt(1, 2), cache, mask, position_ids=(mask.cumsum(1) - 1)[:, -1:])


@pytest.fixture
def rows(llama):
    """A cache with rows of 61 and 41 tokens, of which the last step read 22 and 26."""
    cache = small_cache(llama[1], budget=9)
    padded(cache, llama[1])
    # The budget, 4 sinks, 9 and 13 recent tokens.
    assert cache.report().layers[1].row_tokens == [61, 41]
    assert cache.report().layers[1].row_read == [9 + 13, 9 + 17]
    return cache


@pytest.mark.parametrize(
    ("change", "read"),
    [
        (lambda c: c.reorder_cache(torch.tensor([1, 0])), [26, 22]),
        (lambda c: c.reorder_cache(torch.tensor([1, 1])), [26, 26]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [26]),
        (lambda c: c.batch_select_indices(torch.tensor([True, False])), [22]),
        (lambda c: c.batch_repeat_interleave(2), [22, 22, 26, 26]),
        (lambda c: c.set_budget(1.0), [22, 26]),
        (lambda c: c.crop(0), [22, 26]),
        (lambda c: c.crop(61), [22, 26]),
        # Who knows what the step would have selected without these.
        (lambda c: c.crop(-1), [0, 0]),
        (lambda c: c.crop(-55), [0, 0]),
    ],
)
def test_what_the_last_step_read_follows_the_rows(rows, change, read):
    change(rows)
    report = rows.report()
    assert [layer.row_read for layer in report.layers] == [read, read]
    assert [layer.read for layer in report.layers] == [sum(read)] * 2
    assert all(n <= held for layer in report.layers for n, held in zip(read, layer.row_tokens, strict=True))
    assert ("nothing yet" in str(report)) == (not any(read))


def test_a_step_that_fills_a_page_has_read_its_tokens_too(llama):
    cache = small_cache(llama[1], budget=9)
    forward(llama[1], prompt(67), cache)
    held = cache.compressed_layers[0].store
    assert (held.encoded(0), held.window.lengths[0]) == (48, 19)
    forward(llama[1], prompt(1), cache)
    # Eight of the tokens it attended to in full precision are encoded now.
    assert (held.encoded(0), held.window.lengths[0]) == (56, 12)
    assert cache.report().layers[0].read == 9 + 20


def test_read_of_a_chunk_and_after_going_back_to_the_window(llama):
    cache = small_cache(llama[1], budget=9)
    forward(llama[1], prompt(60, 2), cache)
    forward(llama[1], prompt(5, 2), cache)
    assert cache.report().layers[0].row_read == [9 + 17, 9 + 17]
    # More queries than `sparse_queries` attend to everything.
    forward(llama[1], prompt(9, 2), cache)
    assert cache.report().read_fraction == 1.0
    cache.crop(6)
    forward(llama[1], prompt(1, 2), cache)
    assert cache.report().layers[0].row_read == cache.report().layers[0].row_tokens == [7, 7]
    cache.reset()
    assert "empty" in str(cache.report())


@pytest.mark.parametrize("fixed", [False, True])
def test_steps_of_fixed_shape_read_what_others_read(llama, fixed):
    cache = small_cache(llama[1], budget=9)
    cache.replay.emulate = fixed
    forward(llama[1], prompt(60), cache)
    for _ in range(9):
        forward(llama[1], prompt(1), cache)
    assert cache.replay.steps == 9 * fixed
    assert cache.report().layers[0].row_read == [9 + 13]


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_sixteen_bits_are_sixteen_bits_whatever_the_model_has(dtype, size):
    model = make_model("llama", dtype=dtype)
    cache, dense = small_cache(model), DynamicCache(config=model.config)
    for held in (cache, dense):
        forward(model, prompt(60, 2), held)
    report = cache.report()
    wanted = sum(x.nbytes for layer in dense.layers for x in (layer.keys, layer.values))
    assert sum(layer.own_dtype_bytes for layer in report.layers) == wanted
    assert report.dense_bytes == wanted * 2 // size
    assert {layer.dtype for layer in report.layers} == {str(dtype).removeprefix("torch.")}
    assert ("as float32" in str(report)) == (dtype == torch.float32)


def test_layers_with_a_window_are_said_to_be_left_out():
    _, ours = pair("gemma3")
    cache = small_cache(ours, budget=9)
    forward(ours, prompt(15), cache)
    window = cache.layers[0]
    report = cache.report()
    assert (report.other_layers, report.other_bytes) == (1, window.keys.nbytes + window.values.nbytes + 8)
    assert "in 1 layers that are not compressed" in str(report)
    assert report.memory.total == sum(layer.store.memory().total for layer in cache.compressed_layers)


def test_pages_that_forks_share_are_said_to_count_twice(llama):
    cache = small_cache(llama[1])
    forward(llama[1], prompt(60, 2), cache)
    cache.reorder_cache(torch.tensor([0, 0]))
    # Rows of one cache share pages as well; these count once.
    assert cache.report().layers[0].shared_bytes == 0
    fork = cache.fork()
    for report in (cache.report(), fork.report()):
        memory = report.layers[0].memory
        assert report.layers[0].shared_bytes == memory.index + memory.payload > 0
        assert "shared with forks" in str(report)
    fork.reset()
    assert cache.report().layers[0].shared_bytes == 0


def test_an_offloaded_cache_is_reported_as_json(llama):
    cache = small_cache(llama[1], offloading=True)
    forward(llama[1], prompt(60, 2), cache)
    found = json.loads(json.dumps(cache.report().to_dict()))
    assert found["layers"][0]["memory"]["host"] > 0
    assert found["layers"][0]["row_tokens"] == [60, 60]
