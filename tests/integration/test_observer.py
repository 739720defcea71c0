"""An observer of a layer sees what the layer computed, however the step is run."""

import copy
from functools import partial

import backends
import pytest
import torch
from decoded_cache import full_cache, small_cache
from stores import held_tokens
from tiny_models import forward, pair, prompt
from torch._dynamo.backends.debugging import aot_eager

pytestmark = backends.every

BUDGET = 10


def attention(seen, held):
    """Output [T, Hq, d] of row 0 over what was held, keys and values [H, n, d], and the new tokens."""
    keys, values = (
        torch.cat((old, new[0].float().cpu()), 1) for old, new in zip(held, new_of(seen), strict=True)
    )
    t, n = seen.query.shape[2], keys.shape[1]
    causal = torch.ones(t, n, dtype=torch.bool).tril(n - t)
    query = seen.query[0].float().cpu()
    output = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, causal, scale=seen.scaling, enable_gqa=True
    )
    return output.transpose(0, 1)


def new_of(seen):
    return seen.keys, seen.values


def test_it_sees_what_the_layer_attends_to_and_returns(backend):
    _, ours = pair("llama")
    cache, found, projected = full_cache(ours), [], []
    layer = cache.compressed_layers[1]

    def observe(seen):
        assert seen.layer is layer
        held = (
            held_tokens(layer.store, 0)
            if layer.positions
            else [x[0, :, :0].float().cpu() for x in new_of(seen)]
        )
        found.append((seen, attention(seen, held), layer.positions))

    layer.observer = observe
    projection = ours.model.layers[1].self_attn.o_proj
    hook = projection.register_forward_pre_hook(lambda _, args: projected.append(args[0]))
    lengths = [backends.scaled(60), 3, 1, 20, 1]
    for i, new in enumerate(lengths):
        forward(ours, prompt(new, seed=i), cache)
    hook.remove()
    assert [positions for *_, positions in found] == [sum(lengths[:i]) for i in range(len(lengths))]
    for (seen, wanted, _), given in zip(found, projected, strict=True):
        assert torch.equal(seen.output.flatten(2), given)
        torch.testing.assert_close(seen.output[0].float().cpu(), wanted, atol=2e-3, rtol=2e-3)
    assert found[0][0].read == [0]
    assert found[2][0].read == found[3][0].read == [6 * backends.current.page_size]
    assert layer.positions == sum(lengths)
    backend.check_ran("encode_into", "window_attend", "dense_attend")


def filled(model, **options):
    cache = small_cache(model, budget=BUDGET, **options)
    forward(model, prompt(backends.scaled(60)), cache)
    return cache


def watched(cache):
    found = []
    for layer in cache.compressed_layers:
        layer.observer = lambda seen: found.append((seen.layer.layer_idx, seen.query.shape[2], seen.read))
    return found


def test_no_step_is_replayed_while_it_looks():
    _, ours = pair("llama")
    cache = filled(ours)
    cache.replay.emulate = True
    other = copy.deepcopy(cache)
    forward(ours, prompt(1), cache)
    steps = cache.replay.steps
    assert steps == (1 if cache.config.cuda_graphs else 0)
    found = watched(cache)
    logits = [forward(ours, prompt(1, seed=i), cache) for i in range(3)]
    assert cache.replay.steps == steps
    assert found == 3 * [(0, 1, [BUDGET]), (1, 1, [BUDGET])]
    for layer in cache.compressed_layers:
        layer.observer = None
    forward(ours, prompt(1), cache)
    assert cache.replay.steps == steps + 1
    assert len(found) == 6
    forward(ours, prompt(1), other)
    for i, wanted in enumerate(logits):  # all of them replayed
        torch.testing.assert_close(forward(ours, prompt(1, seed=i), other), wanted, atol=1e-4, rtol=1e-4)


def test_a_step_in_a_compiled_model_is_seen(monkeypatch):
    _, ours = pair("llama")
    cache = filled(ours)
    found = watched(cache)
    compiled = torch.compile(ours, backend=aot_eager)
    with torch.no_grad():
        forward(compiled, prompt(1), cache)
    assert found == [(0, 1, [BUDGET]), (1, 1, [BUDGET])]
    # With the option that compiles steps, which otherwise replays them.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=aot_eager))
    cache = filled(ours, compile=True)
    found = watched(cache)
    forward(ours, prompt(1), cache)
    assert len(found) == 2
    assert cache.replay.steps == 0


def test_copies_are_not_observed():
    _, ours = pair("llama")
    cache = filled(ours)
    found = watched(cache)
    for other in (copy.deepcopy(cache), cache.fork()):
        forward(ours, prompt(1), other)
    assert not found
    forward(ours, prompt(1), cache)
    assert len(found) == 2


def test_what_it_raises_ends_the_pass_and_the_next_goes_on():
    _, ours = pair("llama")
    cache = filled(ours)
    wanted = forward(ours, prompt(1), copy.deepcopy(cache))

    def stop(seen):
        raise ValueError("seen enough")

    cache.compressed_layers[0].observer = stop
    with pytest.raises(ValueError, match="seen enough"):
        forward(ours, prompt(1), cache)
    cache.compressed_layers[0].observer = None
    torch.testing.assert_close(forward(ours, prompt(1), cache), wanted)
