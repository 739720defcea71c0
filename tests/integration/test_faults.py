"""Out of memory or Ctrl-C anywhere in a call: the cache goes on rightly, or says that it does not."""

import copy
import os

import backends
import pytest
import torch
from decoded_cache import check_tokens, small_cache
from faults import AtLine, AtOperation, fault
from tiny_models import forward, pair, prompt

from selfindex import StateError

pytestmark = backends.every

STRIDE = int(os.environ.get("SELFINDEX_FAULT_STRIDE", "53"))
"""Every how many places a fault is put; 1 takes minutes."""


def held():
    """Tokens before the call: one more token fills a page."""
    return backends.WINDOW + 7 * backends.current.page_size - 1


def start(family, preset):
    dense, ours = pair(family)
    cache = small_cache(ours, preset=preset)
    ids = prompt(held(), batch=2)
    for part in (ids[:, :-7], *ids[:, -7:].split(1, 1)):
        forward(ours, part, cache)
    return dense, ours, cache, ids


def step(ours, cache, ids):
    forward(ours, prompt(1, batch=2, seed=7), cache)
    return torch.cat((ids, prompt(1, batch=2, seed=7)), 1)


def chunk(ours, cache, ids):
    forward(ours, prompt(21, batch=2, seed=8), cache)
    return torch.cat((ids, prompt(21, batch=2, seed=8)), 1)


def padded(ours, cache, ids):
    mask = torch.ones(2, ids.shape[1] + 3, dtype=torch.long)
    mask[1, -3:-1] = 0
    positions = (mask.cumsum(1) - 1)[:, -3:]
    forward(ours, prompt(3, batch=2, seed=9), cache, mask, position_ids=positions)
    return torch.cat((ids, prompt(3, batch=2, seed=9)), 1)


def crop(ours, cache, ids):
    cache.crop(-30)
    return ids[:, :-30]


def reorder(ours, cache, ids):
    cache.reorder_cache(torch.tensor([1, 1]))
    return ids[[1, 1]]


def repeat(ours, cache, ids):
    cache.batch_repeat_interleave(2)
    return ids.repeat_interleave(2, 0)


def loop(ours, cache, ids):
    cache.replay.emulate = True
    tokens = prompt(3, batch=2, seed=5)
    for token in tokens.split(1, 1):
        forward(ours, token, cache)
    return torch.cat((ids, tokens), 1)


def rows_of(cache, ids):
    """Token ids of every row of a whole cache, without padding."""
    positions = cache.positions
    return [row if positions is None else row[positions[b].cpu()] for b, row in enumerate(ids)]


def check_whole(cache, dense, ids):
    """All layers hold these ids, their pages are those of the tables, and nothing is left over."""
    assert cache.get_seq_length() == ids.shape[1]
    for layer in cache.compressed_layers:
        store = layer.store
        assert layer.positions == ids.shape[1]
        assert [store.length(b) for b in range(store.batch)] == [len(row) for row in rows_of(cache, ids)]
        assert store.window.keys.shape == store.window.values.shape
        held = [block for row in store.table.rows for block in row.blocks]
        assert store.pool.used == len(set(held))
        assert all(store.pool._references[block] == held.count(block) for block in set(held))
    for b, row in enumerate(rows_of(cache, ids)):
        if cache.config.preset == "balanced":
            check_tokens(cache, dense, row, b)


def check_one_of(cache, dense, outcomes, new=None):
    """The cache holds what some of these ids say, up to its length, followed by `new`."""
    length, errors = cache.get_seq_length() - (0 if new is None else 1), []
    for ids in outcomes:
        if len(ids) == cache.compressed_layers[0].store.batch and ids.shape[1] >= length:
            sequence = ids[:, :length] if new is None else torch.cat((ids[:, :length], new), 1)
            try:
                return check_whole(cache, dense, sequence)
            except AssertionError as error:
                errors.append(error)
    raise AssertionError(f"the cache holds something else: {errors}")


def going_on_is_right_or_refused(ours, dense, cache, outcomes):
    cache = copy.deepcopy(cache)
    new, options = prompt(1, batch=cache.compressed_layers[0].store.batch, seed=3), {}
    if cache.positions is not None:
        mask = torch.cat((cache.positions.cpu().long(), torch.ones_like(new)), 1)
        options = {"mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
    try:
        forward(ours, new, cache, **options)
    except StateError:
        return
    check_one_of(cache, dense, outcomes, new)


@pytest.mark.parametrize("kind", [AtOperation, AtLine])
@pytest.mark.parametrize(
    ("action", "preset"),
    [
        (step, "balanced"),
        (step, "paper"),
        (chunk, "balanced"),
        (padded, "balanced"),
        (crop, "balanced"),
        (reorder, "balanced"),
        (repeat, "paper"),
        (loop, "balanced"),
    ],
)
def test_a_fault_anywhere(backend, kind, action, preset):
    if action is loop and backend.device == "cuda":
        pytest.skip("a capture that is cut short is for tests/gpu")
    dense, ours, base, ids = start("llama", preset)
    outcome, number = action(ours, copy.deepcopy(base), ids), 0
    while True:
        cache = copy.deepcopy(base)
        with fault(kind, number) as injected:
            action(ours, cache, ids)
        if not injected.happened:
            check_whole(cache, dense, outcome)
            break
        if cache.guard.interrupted:
            for call in (lambda c: c.crop(-1), lambda c: c.batch_repeat_interleave(2), copy.deepcopy):
                with pytest.raises(StateError, match=r"cut short.*reset"):
                    call(cache)
            cache.reset()
            forward(ours, ids, cache)
            check_whole(cache, dense, ids)
        else:
            going_on_is_right_or_refused(ours, dense, cache, [ids, outcome])
            cache.crop(min(x.positions for x in cache.compressed_layers))
            check_one_of(cache, dense, [ids, outcome])
        number += STRIDE
    assert number > 0
    if preset == "balanced":
        backend.check_ran("encode_into", "dense_attend" if action is chunk else "sparse_decode")
