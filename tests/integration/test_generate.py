"""`generate`: with nothing encoded it equals the dense model; with pages it equals step by step."""

import backends
import pytest
import torch
from backends import scaled
from decoded_cache import check_tokens, decoded_cache, full_cache, small_cache
from tiny_models import HYBRIDS, forward, generate, pair, prompt
from transformers import DynamicCache

pytestmark = backends.every

FEW = ("llama", "phi3", *HYBRIDS)


@pytest.fixture(params=FEW)
def models(request):
    return pair(request.param)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 3},
        {"max_new_tokens": 1},
        {"eos_token_id": list(range(2, 30)), "num_beams": 2},
        {"repetition_penalty": 1.3, "min_new_tokens": 3},
    ],
    ids=str,
)
def test_equals_the_dense_model_while_nothing_is_encoded(models, options):
    dense, ours = models
    ids = prompt(20)
    torch.manual_seed(1)
    wanted = generate(dense, ids, **options)
    torch.manual_seed(1)
    assert torch.equal(generate(ours, ids, small_cache(ours, recent=100), **options), wanted)


def left_padded(*lengths):
    """(ids, mask, rows without padding)."""
    width = max(lengths)
    rows = [prompt(n, seed=n)[0] for n in lengths]
    ids, mask = (
        torch.zeros(len(rows), width, dtype=torch.long),
        torch.zeros(len(rows), width, dtype=torch.long),
    )
    for b, row in enumerate(rows):
        ids[b, width - len(row) :], mask[b, width - len(row) :] = row, 1
    return ids, mask, rows


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("recent", [8, 100])
def test_each_row_of_a_left_padded_batch_equals_the_row_alone(family, options, recent, tmp_path):
    _, ours = pair(family)
    # A shared balance: without a profile, rows that start together share their statistics.
    first = small_cache(ours)
    forward(ours, prompt(scaled(30)), first)
    first.profile().save(tmp_path / "profile")
    config = {"recent": recent, "profile": tmp_path / "profile", "budget": 1.0}
    ids, mask, rows = left_padded(*map(scaled, (45, 20, 33)))
    together = generate(ours, ids, small_cache(ours, **config), attention_mask=mask, **options)
    for b, row in enumerate(rows):
        alone = generate(ours, row[None], small_cache(ours, **config), **options)
        assert together[b, ids.shape[1] :].tolist() == alone[0, len(row) :].tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_greedy_is_the_argmax_of_every_step(backend, family):
    _, ours = pair(family)
    ids, budget = prompt(scaled(60)), {"budget": 12}
    cache = small_cache(ours, **budget)
    got = generate(ours, ids, cache, max_new_tokens=14)
    assert cache.get_seq_length() == scaled(60) + 13
    manual, sequence = small_cache(ours, **budget), ids
    new = ids
    for _ in range(14):
        new = forward(ours, new, manual)[:, -1:].argmax(-1)
        sequence = torch.cat((sequence, new), 1)
    assert torch.equal(got, sequence)
    backend.check_ran("encode_into", "sparse_decode", "window_attend")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_generated_tokens_are_in_the_cache(family):
    dense, ours = pair(family)
    cache = small_cache(ours, budget=12)
    got = generate(ours, prompt(scaled(30)), cache, max_new_tokens=25)
    check_tokens(cache, dense, got[0, :-1])


@pytest.mark.parametrize("options", [{}, {"preset": "paper"}, {"pinned_tokens": 5}], ids=str)
def test_beam_scores_are_those_of_the_sequence_run_alone(options):
    # Pages are encoded while beams are reordered: the winner's score shows whether its own
    # tokens were in its rows all along.
    _, ours = pair("llama")
    # On a GPU few of many tokens are not the same few: scores are compared in 11 bits, and a batch of another
    # size is rounded otherwise. There all are read.
    budget = 10 if backends.current.device == "cpu" else 1.0
    ids, config = prompt(scaled(40)), options | {"budget": budget}
    out = generate(
        ours,
        ids,
        small_cache(ours, **config),
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=16,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert len({tuple(s.tolist()) for s in out.sequences}) == 3
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        cache, total = small_cache(ours, **config), 0.0
        logits = forward(ours, ids, cache)[:, -1]
        for token in sequence[ids.shape[1] :]:
            total += logits.log_softmax(-1)[0, token]
            logits = forward(ours, token.view(1, 1), cache)[:, -1]
        assert float(score) == pytest.approx(float(total), abs=0.02)


def test_beams_share_the_prompt_pages():
    _, ours = pair("llama")
    cache = small_cache(ours)
    generate(ours, prompt(scaled(60)), cache, num_beams=4, max_new_tokens=3)
    store = cache.compressed_layers[0].store
    assert store.batch == 4
    assert store.pool.used == 6


@pytest.mark.parametrize("chunk", [7, 16, 64])
def test_chunked_prefill(models, chunk):
    dense, ours = models
    ids = prompt(50)
    wanted = generate(dense, ids)
    got = generate(ours, ids, small_cache(ours, recent=100), prefill_chunk_size=chunk)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("chunk", [7, 16])
def test_chunked_prefill_over_pages_keeps_all_tokens(chunk):
    dense, ours = pair("llama")
    cache = full_cache(ours)
    got = generate(ours, prompt(scaled(50)), cache, prefill_chunk_size=scaled(chunk))
    check_tokens(cache, dense, got[0, :-1])


@pytest.mark.parametrize("recent", [8, 200])
def test_a_conversation_reuses_its_cache(recent):
    dense, ours = pair("llama")
    cache = small_cache(ours, recent=recent, budget=1.0)
    sequence = wanted = prompt(30)
    for turn in range(3):
        sequence = generate(ours, sequence, cache)
        if recent == 200:
            wanted = generate(dense, wanted)
            assert torch.equal(sequence, wanted)
        assert cache.get_seq_length() == sequence.shape[1] - 1
        check_tokens(cache, dense, sequence[0, :-1])
        sequence = torch.cat((sequence, prompt(9, seed=turn)), 1)
        wanted = torch.cat((wanted, prompt(9, seed=turn)), 1)


def repetitive(tokens):
    return prompt(10).repeat(1, tokens // 10)


def test_assisted_generation_equals_plain_generation(models):
    dense, ours = models
    ids = repetitive(40)
    wanted = generate(dense, ids, max_new_tokens=20)
    cache = small_cache(ours, recent=100)
    got = generate(ours, ids, cache, max_new_tokens=20, prompt_lookup_num_tokens=4)
    assert torch.equal(got, wanted)


def test_assisted_generation_over_pages_keeps_the_accepted_tokens_only():
    dense, ours = pair("llama")
    cache = full_cache(ours)
    ids = repetitive(scaled(60))
    got = generate(ours, ids, cache, max_new_tokens=30, prompt_lookup_num_tokens=4)
    assert got.shape == (1, ids.shape[1] + 30)
    check_tokens(cache, dense, got[0, : cache.get_seq_length()])


def test_a_draft_model_may_assist():
    dense, ours = pair("llama")
    ids, draft = prompt(30), pair("llama", num_hidden_layers=1)[0]
    wanted = generate(dense, ids)
    got = generate(ours, ids, small_cache(ours, recent=100), assistant_model=draft)
    assert torch.equal(got, wanted)


def test_inputs_as_embeddings():
    dense, ours = pair("llama")
    embedded = dense.get_input_embeddings()(prompt(30).to(dense.device)).detach()
    wanted = generate(dense, None, inputs_embeds=embedded)
    got = generate(ours, None, small_cache(ours, recent=100), inputs_embeds=embedded)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("options", [{"preset": "paper"}, {"pinned_tokens": 5}], ids=str)
@pytest.mark.parametrize("tokens", [30, 60, 320])
def test_drafts_after_a_prompt_that_pins_tokens(tokens, options):
    dense, ours = pair("llama")
    cache = full_cache(ours, **options)
    got = generate(ours, repetitive(tokens), cache, max_new_tokens=60, prompt_lookup_num_tokens=8)
    store, sequence = cache.layers[0].store, got[:, :-1]
    assert cache.get_seq_length() == store.length(0) == sequence.shape[1]
    if "preset" in options:
        # What is kept in full precision behind the pinned tokens is the end of what was accepted.
        exact, held = DynamicCache(config=dense.config), store.window.lengths[0]
        forward(dense, sequence, exact)
        recent = exact.layers[0].keys[:, :, 4 + store.encoded(0) :]
        torch.testing.assert_close(store.window.keys[:, :, 4:held], recent, atol=1e-4, rtol=1e-4)
    step = prompt(1, seed=3)
    wanted = forward(dense, step, decoded_cache(cache, dense))
    torch.testing.assert_close(forward(ours, step, cache), wanted, atol=2e-4, rtol=2e-4)
