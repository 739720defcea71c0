"""Tensors as nobody should pass them, threads, and forward passes that break off."""

import copy
import threading

import backends
import pytest
import torch
from decoded_cache import check_tokens, full_cache, small_cache
from stores import held_tokens
from threads import at_once
from tiny_models import cache_argument, forward, generate, pair, prompt

from selfindex import InputError, StateError

pytestmark = backends.on_cpu

KEYS = torch.zeros(1, 2, 3, 64)


@pytest.mark.parametrize(
    ("keys", "values", "match"),
    [
        (KEYS.to("meta"), KEYS, "keys are on meta, values on cpu"),
        (KEYS, KEYS.to("meta"), "keys are on cpu, values on meta"),
        (KEYS.to("meta"), KEYS.to("meta"), "meta device"),
        (KEYS[:0], KEYS[:0], "without a batch row"),
        (KEYS[:, :0], KEYS[:, :0], "without a batch row or a head"),
        (KEYS.clone().requires_grad_(), KEYS, "no_grad"),
    ],
)
def test_a_first_step_that_is_refused_leaves_an_empty_cache(keys, values, match):
    dense, ours = pair("llama")
    cache = small_cache(ours)
    with pytest.raises(InputError, match=match):
        cache.update(keys, values, 0)
    assert cache.get_seq_length() == 0
    # Another batch, another dtype: nothing of the refused call is left.
    assert torch.equal(forward(ours, prompt(30, 2), cache), forward(dense, prompt(30, 2)))


@pytest.mark.parametrize(
    "query", [torch.zeros(1, 4, 1, 64), torch.zeros(1, 3, 2, 64), torch.zeros(1, 4, 2, 64).half()]
)
def test_queries_that_do_not_fit_their_keys(used, refuses, query):
    _, ours, cache = used
    keys = torch.zeros(1, 2, 2, 64)

    def call():
        new, _ = cache.update(keys, keys, 0)
        cache.layers[0].attend(ours.model.layers[0].self_attn, query, new, None, 0.125, None, None)

    refuses(call, InputError, "quer")


def test_views_of_any_layout_are_copied():
    _, ours = pair("llama")
    plain, views = small_cache(ours, budget=9), small_cache(ours, budget=9)
    for cache in (plain, views):
        forward(ours, prompt(60), cache)
    for new in (1, 30, 1):
        for i, layer in enumerate(plain.compressed_layers):
            module = ours.model.layers[i].self_attn
            big = torch.randn(1, 2 * new, 64, 8)
            key, value, query = big[:, ::2, :, :2], big[:, 1::2, :, 2:4], big[:, ::2, :, 4:]
            key, value, query = (x.permute(0, 3, 1, 2) for x in (key, value, query))
            assert not key.is_contiguous()
            outputs = []
            for cache, tensors in (
                (plain, [x.contiguous() for x in (key, value, query)]),
                (views, [key, value, query]),
            ):
                given, _ = cache.update(*tensors[:2], i)
                outputs.append(cache.layers[i].attend(module, tensors[2], given, None, 0.125, None, None))
            torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
            # The caller's memory is the caller's: what is stored does not change with it.
            before = held_tokens(views.compressed_layers[i].store, 0)
            big.fill_(7.0)
            for now, held in zip(held_tokens(views.compressed_layers[i].store, 0), before, strict=True):
                assert torch.equal(now, held)
            for mine, other in zip(
                held_tokens(layer.store, 0), held_tokens(views.compressed_layers[i].store, 0), strict=True
            ):
                assert torch.equal(mine, other)


def test_no_new_tokens_change_nothing(used):
    dense, ours, cache = used
    empty = torch.zeros(1, 2, 0, 64)
    for i in range(2):
        new, _ = cache.update(empty, empty, i)
        module = ours.model.layers[i].self_attn
        output = cache.layers[i].attend(module, torch.zeros(1, 4, 0, 64), new, None, 0.125, None, None)
        assert output.shape == (1, 0, 4, 64)
    check_tokens(cache, dense, prompt(60)[0])
    assert torch.isfinite(forward(ours, prompt(1), cache)).all()


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([0, 1], "not all among the 1"),
        ([-1], "not all among the 1"),
        ([], "list of integers"),
        ([0.0], "list of integers"),
        ([[0]], "list of integers"),
        ([True, False], "mask of rows"),
        ([False], "list of integers"),
    ],
)
@pytest.mark.parametrize("method", ["reorder_cache", "batch_select_indices"])
def test_rows_that_do_not_exist(used, refuses, method, rows, match):
    refuses(lambda: getattr(used[2], method)(torch.tensor(rows)), InputError, match)


def test_no_repeats(used, refuses):
    refuses(lambda: used[2].batch_repeat_interleave(0), InputError, "once or more")


def test_layers_do_not_reorder_on_their_own(used, refuses):
    refuses(lambda: used[2].layers[0].reorder_cache(torch.tensor([0])), StateError, "all layers at once")


@pytest.mark.parametrize("family", ["gemma3", "olmo3"])
def test_a_sliding_layer_that_ran_ahead_is_noticed(family):
    _, ours = pair(family)
    cache = full_cache(ours)
    forward(ours, prompt(40), cache)

    def stop(*_):
        raise KeyboardInterrupt

    # The first layer has a window and is transformers' own; it takes the token, then the step ends.
    hook = ours.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        forward(ours, prompt(1), cache)
    hook.remove()
    with pytest.raises(StateError, match="interrupted"):
        forward(ours, prompt(1), cache)
    with pytest.raises(StateError, match="activate_past_recording"):
        cache.crop(40)
    cache.reset()
    assert torch.isfinite(forward(ours, prompt(40), cache)).all()


@pytest.mark.parametrize("at", [0, 3, 20])
def test_generate_interrupted_and_taken_up_again(at):
    dense, ours = pair("llama")
    ids, calls = prompt(40), []
    wanted = generate(ours, ids, small_cache(ours, budget=12), max_new_tokens=30)

    def stop(*_):
        calls.append(1)
        if len(calls) == at + 1:
            raise KeyboardInterrupt

    cache = small_cache(ours, budget=12)
    hook = ours.model.layers[1].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        generate(ours, ids, cache, max_new_tokens=30)
    hook.remove()
    # Both layers have the last token; generate was not told. It goes on from what it had returned.
    held = cache.get_seq_length()
    assert held == 40 + at
    got = generate(ours, wanted[:, : held + 1], cache, max_new_tokens=30 - at - 1)
    assert torch.equal(got, wanted)
    check_tokens(cache, dense, got[0, :-1])


def test_two_threads_with_a_cache_each():
    _, ours = pair("llama")
    ids = [prompt(50, seed=i) for i in range(2)]
    alone = [generate(ours, x, small_cache(ours, budget=12), max_new_tokens=20) for x in ids]
    together = at_once(2, lambda i: generate(ours, ids[i], small_cache(ours, budget=12), max_new_tokens=20))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_second_thread_is_refused_while_the_first_is_inside(used):
    dense, ours, cache = used
    inside, go_on, caught = threading.Event(), threading.Event(), []
    plan = cache.layers[0].store.plan_step

    def slow(*args):
        inside.set()
        go_on.wait(30)
        return plan(*args)

    cache.layers[0].store.plan_step = slow
    thread = threading.Thread(target=lambda: forward(ours, prompt(1), cache))
    thread.start()
    assert inside.wait(30)
    for call in (
        lambda: forward(ours, prompt(1, seed=2), cache),
        lambda: cache.crop(-1),
        lambda: cache.reset(),
        lambda: cache.reorder_cache(torch.tensor([0])),
        lambda: copy.deepcopy(cache),
    ):
        with pytest.raises(StateError, match="another thread") as error:
            call()
        caught.append(error)
    go_on.set()
    thread.join()
    del cache.layers[0].store.plan_step
    # The first one was not disturbed, and now the cache is free for any thread.
    check_tokens(cache, dense, torch.cat((prompt(60), prompt(1)), 1)[0])
    forward(ours, prompt(1, seed=2), cache)
    assert len(caught) == 5


def test_gradients_are_refused_whoever_asks(used, refuses):
    _, ours, cache = used
    embedded = ours.get_input_embeddings()(prompt(1)).detach().requires_grad_()
    frozen = [p for p in ours.parameters() if p.requires_grad]
    call = {cache_argument(ours): cache, "use_cache": True}
    try:
        for p in frozen:
            p.requires_grad_(False)
        refuses(lambda: ours(inputs_embeds=embedded, **call), InputError, "no_grad")
        # Grad mode alone is no reason to refuse: nothing here needs a gradient.
        assert torch.isfinite(ours(prompt(1), **call).logits).all()
    finally:
        for p in frozen:
            p.requires_grad_(True)
