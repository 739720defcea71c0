"""Steps of fixed shape, as a GPU replays them: the same tokens as from any other forward pass.

On a CPU they run without a graph, but with what a graph would keep: the number of tokens that the
model is told, the sizes of tables and windows.
"""

import copy
import gc
import warnings
from functools import partial

import pytest
import torch
from decoded_cache import check_tokens, small_cache
from tiny_models import VOCAB, cache_argument, forward, generate, make_model, pair, prompt
from torch._dynamo.backends.debugging import aot_eager

import selfindex
from selfindex.integrations.transformers import replay
from selfindex.integrations.transformers.graphs import RecordedModel, without_collection

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "qwen3_moe", "olmo", "olmo2")


@pytest.fixture(autouse=True)
def _every_announcement(monkeypatch):
    monkeypatch.setattr(replay, "announce", replay.announce.__wrapped__)


def replaying(model, **options):
    cache = small_cache(model, **options)
    cache.replay.emulate = True
    return cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 9, 40])
def test_the_same_tokens_as_without(family, length):
    dense, ours = pair(family)
    ids = prompt(length, batch=2)
    wanted = generate(ours, ids, small_cache(ours, budget=12), max_new_tokens=30)
    cache = replaying(ours, budget=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        got = generate(ours, ids, cache, max_new_tokens=30)
    assert torch.equal(got, wanted)
    assert cache.replay.steps == 29
    assert cache.get_seq_length() == length + 29
    if family != "mistral":  # of 80 channels from a single head: 3 bits are too coarse for this check
        check_tokens(cache, dense, got[0, :-1])


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "temperature": 0.7, "top_k": 12, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 4},
        {"eos_token_id": [13, 19], "max_new_tokens": 40},
        {"repetition_penalty": 1.5},
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_every_way_to_generate(options, padded):
    _, ours = pair("llama")
    drafts = "prompt_lookup_num_tokens" in options
    ids = prompt(20).repeat(1, 3) if drafts else prompt(60, 2)
    mask = torch.ones_like(ids)
    if padded and not drafts:
        mask[1, :23] = 0
    found = []
    for cache in (small_cache(ours, budget=12), replaying(ours, budget=12)):
        torch.manual_seed(5)
        found.append(generate(ours, ids, cache, **({"max_new_tokens": 30, "attention_mask": mask} | options)))
    assert torch.equal(*found)
    assert cache.replay.steps > 5


def test_steps_of_several_tokens_between_other_passes():
    dense, ours = pair("llama")
    caches = [small_cache(ours, budget=1.0), replaying(ours, budget=1.0)]
    seen = [[], []]
    for cache, logits in zip(caches, seen, strict=True):
        ids = prompt(40, 2)
        forward(ours, ids, cache)
        for new in (1, 3, 8, 1, 9, 1, 20, 8):
            more = prompt(new, 2, seed=new)
            logits.append(forward(ours, more, cache))
            ids = torch.cat((ids, more), 1)
        cache.crop(-5)
        cache.reorder_cache(torch.tensor([1, 0]))
        logits.append(forward(ours, prompt(1, 2), cache))
        ids = torch.cat((ids[[1, 0], :-5], prompt(1, 2)), 1)
        cache.batch_repeat_interleave(2)
        logits.append(forward(ours, prompt(2, 4), cache))
        check_tokens(cache, dense, torch.cat((ids[1], prompt(2, 4)[2])), row=2)
    for wanted, got in zip(*seen, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert caches[1].replay.steps == 8


@pytest.mark.parametrize("options", [{"budget": 0.3, "min_tokens": 4}, {"budget": 9, "dense_below": 40}])
def test_reads_what_other_steps_read(options):
    _, ours = pair("llama")
    caches = [small_cache(ours, **options), replaying(ours, **options)]
    for cache in caches:
        forward(ours, prompt(41), cache)
    for token in prompt(30, seed=3).split(1, 1):
        wanted, got = (forward(ours, token, cache) for cache in caches)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        reads = [[layer.read for layer in cache.compressed_layers] for cache in caches]
        assert reads[0] == reads[1]
        assert str(caches[0].report()).splitlines()[-1] == str(caches[1].report()).splitlines()[-1]
    assert caches[1].replay.steps == 30


def test_a_new_budget_and_new_weights_are_recorded_anew():
    ours = make_model("llama")
    cache = replaying(ours, budget=12)
    forward(ours, prompt(60), cache)
    forward(ours, prompt(1), cache)
    cache.set_budget(3)
    forward(ours, prompt(1), cache)
    assert cache.compressed_layers[0].read == [3]
    assert len(cache.replay._recordings) == 2
    state = RecordedModel(ours)
    assert state.unchanged()
    ours.lm_head.weight = torch.nn.Parameter(torch.zeros_like(ours.lm_head.weight))
    assert not state.unchanged()
    assert not forward(ours, prompt(1), cache).any()


def test_a_recording_is_of_one_place_and_one_model():
    ours = make_model("llama")
    cache = replaying(ours)
    forward(ours, prompt(60), cache)

    def recording():
        forward(ours, prompt(1), cache)
        [found] = cache.replay._recordings.values()
        return found

    first = recording()
    assert recording() is first
    cache.compressed_layers[1].store.pool.reserve(1000)  # moves its planes
    second = recording()
    assert second is not first
    ours.lm_head.weight = torch.nn.Parameter(ours.lm_head.weight.detach().clone())
    assert recording() is not second


def test_a_mask_is_read_in_steps_too():
    dense, ours = pair("llama")
    found = []
    for cache in (small_cache(ours, budget=1.0), replaying(ours, budget=1.0)):
        forward(ours, prompt(60, 2), cache)
        mask = torch.ones(2, 61, dtype=torch.long)
        mask[1, 55:60] = 0  # filler of a row that had finished
        positions = mask.cumsum(1)[:, -1:] - 1
        logits = [forward(ours, prompt(1, 2), cache, mask, position_ids=positions)]
        mask = torch.cat((mask, torch.tensor([[1], [0]])), 1)  # a new token that is none
        logits.append(forward(ours, prompt(1, 2), cache, mask, position_ids=positions + 1)[:1])
        assert cache.compressed_layers[0].store.length(1) == 56
        found.append(torch.cat(logits))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    check_tokens(cache, dense, torch.cat((prompt(60, 2)[1, :55], prompt(1, 2)[1])), row=1)
    assert cache.replay.steps == 0


def test_what_steps_of_a_fork_measure_is_its_own():
    _, ours = pair("llama")
    cache = replaying(ours)
    forward(ours, prompt(3), cache)
    fork = cache.fork()
    fork.replay.emulate = True
    before = cache.compressed_layers[0].store.statistics.query_square.clone()
    forward(ours, prompt(1), fork)
    assert fork.replay.steps == 1
    assert torch.equal(cache.compressed_layers[0].store.statistics.query_square, before)
    assert not torch.equal(fork.compressed_layers[0].store.statistics.query_square, before)


def test_compiled_steps_are_the_same_graph_for_any_prompt(monkeypatch):
    # Everything torch.compile does but generating code, which takes a minute.
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    ours, seen = make_model("llama"), []
    for length in (40, 67, 90):
        ids = prompt(length, batch=2)
        wanted = generate(ours, ids, small_cache(ours, budget=12), max_new_tokens=10)
        cache = small_cache(ours, budget=12, compile=True)
        assert torch.equal(generate(ours, ids, cache, max_new_tokens=10), wanted)
        assert cache.replay.steps == 9
        seen.append(len(graphs))
    assert seen[1] == seen[2] <= 4


def test_what_cannot_be_recorded_says_so_and_runs():
    _, ours = pair("llama")
    ids, step = prompt(40), prompt(1)
    wanted = forward(ours, step, filled(small_cache(ours), ours, ids))
    for what, options in (
        ("output_hidden_states", {"output_hidden_states": True}),
        ("asked for a tuple", {"return_dict": False}),
    ):
        cache = filled(replaying(ours), ours, ids)
        with pytest.warns(RuntimeWarning, match=what):
            output = call(ours, step, cache, **options)
        torch.testing.assert_close(output[0] if isinstance(output, tuple) else output.logits, wanted)
        assert cache.replay.steps == 0
    cache = filled(replaying(ours), ours, ids)
    handle = ours.model.layers[1].register_forward_hook(lambda *_: None)
    with pytest.warns(RuntimeWarning, match="LlamaDecoderLayer of the model has hooks"):
        torch.testing.assert_close(forward(ours, step, cache), wanted)
    handle.remove()
    assert cache.replay.steps == 0
    forward(ours, step, cache)
    assert cache.replay.steps == 1


def filled(cache, model, ids):
    forward(model, ids, cache)
    return cache


@torch.no_grad()
def call(model, ids, cache, **options):
    return model(input_ids=ids, **{cache_argument(model): cache}, **options)


def test_a_model_that_fails_in_a_step_of_fixed_shape_goes_on_without(monkeypatch):
    ours = make_model("llama")
    wanted = generate(ours, prompt(40), small_cache(ours))
    run = type(ours.model).forward

    def failing(self, *args, **options):
        if options[cache_argument(ours)].plans.fixed is not None:
            raise ValueError("not in a graph")
        return run(self, *args, **options)

    monkeypatch.setattr(type(ours.model), "forward", failing)
    cache = replaying(ours)
    with pytest.warns(RuntimeWarning, match="recording a step of LlamaForCausalLM failed: not in a graph"):
        assert torch.equal(generate(ours, prompt(40), cache), wanted)
    assert cache.replay.steps == 0


def test_a_model_that_computes_with_the_number_of_tokens_is_not_replayed(monkeypatch):
    ours = make_model("llama")
    run = type(ours.model.embed_tokens).forward
    seen = []

    def by_length(self, ids):
        return run(self, ids) * (1 + seen[-1] / 100)

    model_forward = type(ours.model).forward

    def noting(self, *args, **options):
        seen.append(options[cache_argument(ours)].get_seq_length())
        return model_forward(self, *args, **options)

    monkeypatch.setattr(type(ours.model), "forward", noting)
    monkeypatch.setattr(type(ours.model.embed_tokens), "forward", by_length)
    wanted = generate(ours, prompt(40), small_cache(ours))
    cache = replaying(ours)
    with pytest.warns(RuntimeWarning, match="numbers that a graph would not update"):
        assert torch.equal(generate(ours, prompt(40), cache), wanted)
    assert cache.replay.steps == 0


def test_it_can_be_turned_off():
    _, ours = pair("llama")
    cache = replaying(ours, cuda_graphs=False)
    generate(ours, prompt(40), cache)
    assert cache.replay.steps == 0


def test_a_copy_of_a_prepared_model_runs_its_own_weights():
    _, ours = pair("llama")
    other = copy.deepcopy(ours)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    cache = replaying(other)
    forward(other, prompt(40), cache)
    assert not forward(other, prompt(1), cache).any()
    assert forward(ours, prompt(40)).any()


def test_recording_keeps_the_collector_off_and_then_as_it_was():
    seen = []
    with pytest.raises(ZeroDivisionError), without_collection():
        seen.append(1 / gc.isenabled())  # fails where the collector is off
    assert not seen
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_generate_takes_options_of_the_cache_and_of_generation():
    _, ours = pair("llama")
    ids = prompt(40)
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 9,
        "eos_token_id": VOCAB,
        "pad_token_id": 0,
    }
    wanted = generate(ours, ids, small_cache(ours), **options, repetition_penalty=1.5)
    got = selfindex.generate(
        ours, ids, cache=small_cache(ours), **options, repetition_penalty=1.5, do_sample=False
    )
    assert torch.equal(got, wanted)
    out = selfindex.generate(ours, ids, **options, budget=7, return_dict_in_generate=True)
    assert out[cache_argument(ours) if cache_argument(ours) in out else "past_key_values"].config.budget == 7
    with pytest.raises(selfindex.InputError, match="do not fit a given one"):
        selfindex.generate(ours, ids, cache=small_cache(ours), budget=3)
    with pytest.raises(ValueError, match="no_such_option"):
        selfindex.generate(ours, ids, no_such_option=3)
