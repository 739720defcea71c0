"""prefill='sparse': prompts of a model, alone and in batches, and where they are read exactly."""

import pytest
import torch
from decoded_cache import decoded_cache, full_cache
from prompts import random_prompt
from tiny_models import cache_argument, forward, generate, make_model, pair, prompt

import selfindex
from selfindex.attention import prompt as prompt_module
from selfindex.attention.prompt import EXACT, attend_prompt
from selfindex.backends import ops
from selfindex.integrations.transformers.prompt import _say_exact

LONG = 1200
ALL = {"prefill": "sparse", "prefill_mass": 1.0, "dense_below": 0}
FEW = ALL | {"prefill_density": 0.1}


@pytest.fixture
def selections(monkeypatch):
    """Sizes of the prompts that were selected from."""
    seen, own = [], ops.select_blocks

    def select(query, *rest):
        seen.append(tuple(query.shape))
        return own(query, *rest)

    monkeypatch.setattr(prompt_module.ops, "select_blocks", select)
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_oss", "gemma3"])
def test_all_blocks_are_exact(family, selections):
    dense, ours = pair(family, max_position_embeddings=2048)
    ids = prompt(LONG)
    got = forward(ours, ids, full_cache(ours, **ALL))
    assert selections
    torch.testing.assert_close(got, forward(dense, ids), atol=1e-3, rtol=1e-3)


def test_few_blocks_are_read_and_decoding_goes_on(selections):
    dense, ours = pair("llama", max_position_embeddings=2048)
    ids = prompt(LONG)
    cache = full_cache(ours, **FEW)
    text = generate(ours, ids, cache)
    assert text.shape[1] == LONG + 12
    assert len(selections) == 2  # layers; steps select nothing of the kind
    assert cache.get_seq_length() == LONG + 11
    logits = forward(ours, ids, full_cache(ours, **FEW))
    assert not torch.allclose(logits, forward(dense, ids), atol=1e-3)
    # Blocks that are always kept are all there is at first.
    torch.testing.assert_close(logits[:, :384], forward(dense, ids)[:, :384], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma3"])
def test_all_blocks_of_a_later_chunk_are_exact(family, selections):
    dense, ours = pair(family, max_position_embeddings=4096)
    cache = full_cache(ours, **ALL)
    forward(ours, prompt(LONG), cache)
    before, other = len(selections), decoded_cache(cache, dense)
    ids = prompt(LONG, seed=1)
    got, wanted = forward(ours, ids, cache), forward(dense, ids, other)
    assert len(selections) == 2 * before
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)


def test_chunks_of_a_prompt_read_few_blocks_but_short_ones(selections):
    _, ours = pair("llama", max_position_embeddings=4096)
    cache, layers = full_cache(ours, **FEW), 2
    forward(ours, prompt(LONG), cache)
    for new, more in ((700, layers), (512, 0), (1, 0), (513, layers)):
        before = len(selections)
        forward(ours, prompt(new, seed=1), cache)
        assert len(selections) == before + more
    assert cache.get_seq_length() == LONG + 700 + 512 + 1 + 513


def test_generation_in_chunks(selections):
    _, ours = pair("llama", max_position_embeddings=4096)
    ids = prompt(2000)
    text = generate(ours, ids, full_cache(ours, **FEW), prefill_chunk_size=600)
    assert text.shape[1] == 2012
    assert len(selections) == 2 * 3  # 600 tokens, 600 more, and 600 more; 200 read everything


@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_rows_of_a_padded_chunk_are_rows_alone(preset, selections):
    _, ours = pair("llama", max_position_embeddings=4096)
    lengths = [(LONG, 900), (1000, 700), (1100, 100)]
    ids, mask = (torch.zeros(3, LONG + 900, dtype=torch.long) for _ in range(2))
    for b, (first, second) in enumerate(lengths):
        for at in (slice(LONG - first, LONG), slice(LONG, LONG + second)):
            ids[b, at] = prompt(at.stop - at.start, seed=b + at.stop)[0]
            mask[b, at] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = full_cache(ours, **FEW, preset=preset)
    forward(ours, ids[:, :LONG], cache, mask[:, :LONG], position_ids=positions[:, :LONG])
    got = forward(ours, ids[:, LONG:], cache, mask, position_ids=positions[:, LONG:])
    for b, (first, second) in enumerate(lengths):
        alone = full_cache(ours, **FEW, preset=preset)
        forward(ours, ids[b : b + 1, LONG - first : LONG], alone)
        wanted = forward(ours, ids[b : b + 1, LONG : LONG + second], alone)
        torch.testing.assert_close(got[b : b + 1, :second], wanted, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_are_rows_alone(side):
    _, ours = pair("llama", max_position_embeddings=2048)
    lengths = [LONG, 950, 1100]
    ids, mask = (torch.zeros(3, LONG, dtype=torch.long) for _ in range(2))
    places = [slice(0, n) if side == "right" else slice(LONG - n, LONG) for n in lengths]
    for b, at in enumerate(places):
        ids[b, at], mask[b, at] = prompt(lengths[b], seed=b)[0], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = forward(ours, ids, full_cache(ours, **FEW), mask, position_ids=positions)
    for b, at in enumerate(places):
        alone = forward(ours, ids[b : b + 1, at], full_cache(ours, **FEW))
        torch.testing.assert_close(got[b : b + 1, at], alone, atol=2e-4, rtol=2e-4)


def test_padding_gets_zeros_and_short_rows_are_exact(selections):
    query, keys, values = random_prompt(LONG, batch=3)
    valid = torch.ones(3, LONG, dtype=torch.bool)
    valid[0, :100], valid[1, 200:], valid[2] = False, False, False
    config = selfindex.SelfIndexConfig(**(FEW | {"dense_below": 300}))
    output = attend_prompt(config, query, keys, values, valid, 0.125)
    # Without the last queries, and those of a block that is not full, which read everything.
    assert selections == [(1, 6, 768, 64)]
    assert not output.transpose(1, 2)[~valid].any()
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query[1:2, :, :200],
        keys[1:2, :, :200],
        values[1:2, :, :200],
        is_causal=True,
        scale=0.125,
        enable_gqa=True,
    )
    torch.testing.assert_close(output[1:2, :, :200], wanted, atol=1e-5, rtol=1e-5)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query[:1, :, 100:],
        keys[:1, :, 100:],
        values[:1, :, 100:],
        is_causal=True,
        scale=0.125,
        enable_gqa=True,
    )
    torch.testing.assert_close(output[:1, :, -EXACT:], wanted[:, :, -EXACT:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output[:1, :, 600:700], wanted[:, :, 500:600], atol=1e-3)


def test_short_prompts_are_exact(selections):
    _, ours = pair("llama", max_position_embeddings=2048)
    forward(ours, prompt(LONG), full_cache(ours, **(FEW | {"dense_below": LONG})))
    assert not selections


def test_an_unusual_mask_is_read_exactly_and_said_once(selections):
    dense, ours = pair("llama", max_position_embeddings=2048)
    ids, mask = prompt(LONG), torch.ones(1, 1, LONG, LONG, dtype=torch.bool).tril()
    _say_exact.cache_clear()
    with pytest.warns(RuntimeWarning, match="reads this prompt exactly"):
        got = forward(ours, ids, full_cache(ours, **FEW), mask)
    assert not selections
    torch.testing.assert_close(got, forward(dense, ids), atol=1e-4, rtol=1e-4)


def test_attention_weights_are_refused():
    _, ours = pair("llama", max_position_embeddings=2048)
    with pytest.raises(selfindex.InputError, match="output_attentions"):
        forward(ours, prompt(LONG), full_cache(ours, **FEW), output_attentions=True)


def test_the_option_is_saved(tmp_path):
    _, ours = pair("llama", max_position_embeddings=2048)
    cache = full_cache(ours, **FEW)
    forward(ours, prompt(LONG), cache)
    cache.save(ours, tmp_path / "cache")
    assert selfindex.SelfIndexCache.load(ours, tmp_path / "cache").config == cache.config


def test_autocast(selections):
    _, ours = pair("llama", max_position_embeddings=2048)
    with torch.autocast("cpu", torch.bfloat16):
        got = forward(ours, prompt(LONG), full_cache(ours, **ALL))
        wanted = forward(ours, prompt(LONG), full_cache(ours))
    assert selections
    torch.testing.assert_close(got, wanted, atol=0.3, rtol=0.1)


def test_a_compiled_model_reads_sparsely_too(selections):
    model = make_model("llama", max_position_embeddings=2048)
    wanted = forward(model, prompt(LONG), full_cache(model, **FEW))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        given = {cache_argument(model): full_cache(model, **FEW)}
        got = compiled(input_ids=prompt(LONG), use_cache=True, **given).logits
    assert len(selections) == 4
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
