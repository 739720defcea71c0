"""`selfindex.generate` gives the tokens of `model.generate`, from steps of fixed shape."""

import gc
from functools import partial

import pytest
import torch
from decoded_cache import check_tokens, small_cache
from tiny_models import VOCAB, forward, generate, pair, prompt
from torch._dynamo.backends.debugging import aot_eager

import selfindex
from selfindex.integrations.transformers.loop import DecodeLoop, _without_collection, ready, why_not

FAST = ("llama", "qwen3", "phi3", "smollm3", "qwen3_moe")


def fast(model, ids, cache, **options):
    return selfindex.generate(
        model,
        ids,
        cache=cache,
        **({"max_new_tokens": 30, "eos_token_id": VOCAB, "pad_token_id": 0} | options),
    )


@pytest.fixture
def steps(monkeypatch):
    """Counts the steps that a decode loop runs."""
    counted = []
    run = DecodeLoop.step
    monkeypatch.setattr(DecodeLoop, "step", lambda self, tokens: counted.append(1) or run(self, tokens))
    return counted


@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("length", [1, 9, 40])
def test_equals_generate_of_the_model(family, length, steps):
    dense, ours = pair(family)
    ids = prompt(length, batch=2)
    wanted = generate(ours, ids, small_cache(ours, budget=12), max_new_tokens=30)
    cache = small_cache(ours, budget=12)
    got = fast(ours, ids, cache)
    assert torch.equal(got, wanted)
    assert len(steps) >= (29 if length == 40 else 5)
    assert cache.get_seq_length() == length + 29
    check_tokens(cache, dense, got[0, :-1])


def test_compiled_steps_are_the_same_graph_for_any_prompt(monkeypatch):
    # Everything torch.compile does but generating code, which takes a minute.
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    _, ours = pair("llama")
    for length in (40, 67):  # the sizes of the second become symbols
        ids = prompt(length, batch=2)
        wanted = fast(ours, ids, small_cache(ours, budget=12))
        assert torch.equal(fast(ours, ids, small_cache(ours, budget=12), compile=True), wanted)
    calls = [[str(node.target) for node in graph.graph.nodes] for graph in graphs]
    assert len(calls) == 2
    layers = ours.config.num_hidden_layers
    assert all(sum("sparse_decode" in target for target in targets) == layers for targets in calls)


@pytest.mark.parametrize("options", [{"budget": 0.3, "min_tokens": 4}, {"budget": 9, "dense_below": 40}])
def test_budgets_of_the_loop_are_those_of_single_steps(options):
    _, ours = pair("llama")
    logits, reads = [], []
    for fixed in (False, True):
        cache = small_cache(ours, **options)
        forward(ours, prompt(41), cache)
        loop = DecodeLoop(ours, cache, 30) if fixed else None
        for token in prompt(30, seed=3)[0]:
            if loop is None:
                logits.append(forward(ours, token.view(1, 1), cache)[:, -1])
                reads.append(cache.compressed_layers[0].read)
            else:
                torch.testing.assert_close(loop.step(token.view(1)), logits.pop(0), atol=1e-4, rtol=1e-4)
                assert loop.budgets.tolist() == reads.pop(0)


def test_a_capture_keeps_the_collector_off_and_then_as_it_was():
    seen = []
    with pytest.raises(ZeroDivisionError), _without_collection():
        seen.append(1 / gc.isenabled())  # fails where the collector is off
    assert not seen
    assert gc.isenabled()
    gc.disable()
    try:
        with _without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 12, "top_p": 0.9}])
def test_sampling_draws_as_the_model_does(options):
    _, ours = pair("llama")
    ids = prompt(30, batch=3)
    torch.manual_seed(5)
    wanted = generate(
        ours, ids, small_cache(ours, budget=12), do_sample=True, max_new_tokens=20, **({"top_k": 0} | options)
    )
    torch.manual_seed(5)
    got = fast(ours, ids, small_cache(ours, budget=12), do_sample=True, max_new_tokens=20, **options)
    assert torch.equal(got, wanted)


def test_a_left_padded_batch():
    dense, ours = pair("llama")
    ids, mask = torch.zeros(2, 50, dtype=torch.long), torch.zeros(2, 50, dtype=torch.long)
    for b, n in enumerate((50, 23)):
        ids[b, 50 - n :], mask[b, 50 - n :] = prompt(n, seed=n)[0], 1
    wanted = generate(ours, ids, small_cache(ours, budget=12), attention_mask=mask, max_new_tokens=30)
    cache = small_cache(ours, budget=12)
    got = fast(ours, ids, cache, attention_mask=mask)
    assert torch.equal(got, wanted)
    check_tokens(cache, dense, got[1, 27:-1], row=1)
    # The next turn goes on from there.
    more = torch.cat((got, prompt(5, batch=2)), 1)
    longer = torch.cat((mask, mask.new_ones(2, more.shape[1] - 50)), 1)
    assert fast(ours, more, cache, attention_mask=longer, max_new_tokens=3).shape == (2, more.shape[1] + 3)


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_end_at_an_end_token(batch):
    dense, ours = pair("llama")
    ids, ends = prompt(30, batch=batch), list(range(2, 12))
    options = {"eos_token_id": ends, "max_new_tokens": 40}
    wanted = generate(ours, ids, small_cache(ours, budget=12), **options)
    cache = small_cache(ours, budget=12)
    got = fast(ours, ids, cache, **options)
    assert torch.equal(got, wanted)
    assert cache.get_seq_length() == got.shape[1] - 1
    last = int(got.ne(0).sum(1).argmax())  # the row without padding at its end
    check_tokens(cache, dense, got[last, :-1], row=last)


def test_a_conversation():
    dense, ours = pair("llama")
    cache, sequence = small_cache(ours, budget=1.0), prompt(30)
    for turn in range(3):
        sequence = fast(ours, sequence, cache, max_new_tokens=11)
        check_tokens(cache, dense, sequence[0, :-1])
        sequence = torch.cat((sequence, prompt(9, seed=turn)), 1)


@pytest.mark.parametrize(("family", "options"), [("gemma3", {}), ("llama", {"preset": "paper"})])
def test_what_has_no_fixed_shape_runs_step_by_step(family, options, steps):
    _, ours = pair(family)
    ids = prompt(40)
    wanted = generate(ours, ids, small_cache(ours, budget=12, **options), max_new_tokens=20)
    cache = small_cache(ours, budget=12, **options)
    assert torch.equal(fast(ours, ids, cache, max_new_tokens=20), wanted)
    assert not steps
    assert why_not(cache)
    with pytest.raises(selfindex.StateError, match="no decode loop"):
        DecodeLoop(ours, cache, 3)


def test_makes_its_own_cache():
    _, ours = pair("llama")
    got = selfindex.generate(ours, prompt(20), max_new_tokens=4, budget=7)
    assert got.shape[1] <= 24


def test_errors():
    _, ours = pair("llama")
    ids = prompt(20)
    with pytest.raises(selfindex.InputError, match="integers"):
        selfindex.generate(ours, ids.float())
    with pytest.raises(selfindex.InputError, match="do not fit"):
        selfindex.generate(ours, ids, cache=small_cache(ours), budget=3)
    with pytest.raises(selfindex.InputError, match="max_new_tokens"):
        selfindex.generate(ours, ids, max_new_tokens=0)
    with pytest.raises(selfindex.InputError, match="on the left"):
        selfindex.generate(ours, ids, attention_mask=(torch.arange(20) < 15).long()[None])
    with pytest.raises(selfindex.InputError, match="attention_mask has shape"):
        selfindex.generate(ours, ids, attention_mask=torch.ones(1, 5))
    cache = small_cache(ours)
    forward(ours, ids, cache)
    with pytest.raises(selfindex.InputError, match="whole sequence"):
        selfindex.generate(ours, ids[:, :3], cache=cache)
    assert ready(cache)
    loop = DecodeLoop(ours, cache, 1)
    loop.step(ids[:, 0])
    with pytest.raises(selfindex.StateError, match="made for 1 steps"):
        loop.step(ids[:, 0])
