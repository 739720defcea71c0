"""A dense transformers cache with the keys and values that a `SelfIndexCache` decodes to."""

import copy

import torch
from stores import held_tokens, small_options
from tiny_models import forward
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from selfindex import SelfIndexCache

_STATE = set(vars(LinearAttentionLayer())) - {"device", "dtype"}


def small_cache(model, **options):
    """A cache that encodes a page every 8 tokens (128 on a GPU) beyond 12 of them."""
    if options.get("preset") == "paper":
        options = {"sinks": 4, "recent": 0} | options
    return SelfIndexCache(model, **small_options(**options))


def full_cache(model, **options):
    """A cache that attends to all it holds."""
    return small_cache(model, budget=1.0, **options)


def decoded_cache(cache, model):
    """DynamicCache for the untouched `model` with the tokens of `cache`, in their positions."""
    dense = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        if layer not in cache.compressed_layers:
            dense.layers[i] = copy.deepcopy(layer)
            continue
        store, rows = layer.store, range(layer.store.batch)
        shape = (store.batch, store.format.kv_heads, layer.positions, store.format.head_dim)
        full = [torch.zeros(shape), torch.zeros(shape)]
        for b in rows:
            real = slice(None) if cache.positions is None else cache.positions[b].cpu()
            for target, tokens in zip(full, held_tokens(store, b), strict=True):
                target[b][:, real] = tokens
        # A block's linear-attention state, in models whose layers have both.
        dense.layers[i].__dict__.update(
            copy.deepcopy({x: layer.__dict__[x] for x in _STATE & set(layer.__dict__)})
        )
        dense.layers[i].update(*(x.to(model.device) for x in full))
    return dense


def check_tokens(cache, model, sequence, row=0):
    """The first layer holds what the untouched model computes there for these token ids [n].

    Only the first layer: there keys and values depend on nothing but the token and its position.
    """
    dense = DynamicCache(config=model.config)
    forward(model, sequence[None], dense)
    store = cache.layers[0].store
    wanted = dense.layers[0].keys[0].cpu(), dense.layers[0].values[0].cpu()
    held, sinks = store.window.lengths[row], store.config.front
    assert store.length(row) == len(sequence)
    places = [*range(min(sinks, held)), *range(min(sinks, held) + store.encoded(row), len(sequence))]
    for got, exact in zip(held_tokens(store, row), wanted, strict=True):
        torch.testing.assert_close(got[:, places], exact[:, places], atol=1e-5, rtol=1e-4)
        error = (got - exact).norm(dim=-1)
        assert (error < 0.75 * exact.norm(dim=-1).mean()).all()
