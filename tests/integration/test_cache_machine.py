"""Random sequences of what a user may do with a cache; its first layer must hold the right tokens."""

import copy
import tempfile
from collections import Counter
from pathlib import Path

import backends
import torch
from decoded_cache import check_tokens, full_cache
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tiny_models import forward, pair, prompt

from selfindex import SelfIndexCache

pytestmark = backends.every


def grown(tokens):
    """A few tokens, or with larger pages correspondingly more."""
    return tokens if tokens < 5 else tokens * backends.current.page_size // 8


class CacheMachine(RuleBasedStateMachine):
    """The model of a row is its token ids and which of its positions hold tokens."""

    @initialize(batch=st.integers(1, 3))
    def start(self, batch):
        self.dense, self.ours = pair("llama", num_hidden_layers=1)
        self.cache, self.others = full_cache(self.ours), []
        self.folder = tempfile.TemporaryDirectory()
        self.begin(batch)

    def teardown(self):
        self.folder.cleanup()

    others = ()

    def begin(self, batch):
        self.ids = torch.zeros(batch, 0, dtype=torch.long)
        self.mask = torch.zeros(batch, 0, dtype=torch.long)

    @rule(new=st.integers(1, 25), padded=st.booleans(), seed=st.integers(0, 1000))
    def say(self, new, padded, seed):
        self._say(grown(new), padded, seed)

    def _say(self, new, padded, seed):
        batch = len(self.ids)
        fresh = torch.ones(batch, new, dtype=torch.long)
        if padded:
            fresh = torch.randint(0, 2, (batch, new), generator=torch.Generator().manual_seed(seed))
        ids = prompt(new, batch, seed)
        self.ids, self.mask = torch.cat((self.ids, ids), 1), torch.cat((self.mask, fresh), 1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -new:]
        mask = None if bool(self.mask.all()) else self.mask
        forward(self.ours, ids, self.cache, mask, position_ids=positions)

    @rule(remove=st.integers(0, 30), positive=st.booleans())
    def crop(self, remove, positive):
        positions = self.ids.shape[1]
        remove = grown(remove)
        keep = max(0, positions - remove)
        self.cache.crop(keep if positive and keep else -remove)
        self.ids, self.mask = self.ids[:, :keep], self.mask[:, :keep]

    @rule(data=st.data())
    def reorder(self, data):
        batch = len(self.ids)
        order = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch)))
        self.cache.reorder_cache(order)
        self.ids, self.mask = self.ids[order], self.mask[order]

    @rule(data=st.data(), repeat=st.booleans())
    def change_batch(self, data, repeat):
        batch = len(self.ids)
        if repeat and batch == 1:
            self.cache.batch_repeat_interleave(2)
            order = torch.tensor([0, 0])
        else:
            order = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=3)))
            self.cache.batch_select_indices(order)
        self.ids, self.mask = self.ids[order], self.mask[order]

    @rule(new=st.integers(9, 40), seed=st.integers(0, 1000))
    def say_in_chunks(self, new, seed):
        new, most = grown(new), grown(7)
        for i, part in enumerate(range(0, new, most)):
            self._say(min(most, new - part), False, seed + i)

    @rule(steps=st.integers(1, 10), seed=st.integers(0, 1000))
    def step(self, steps, seed):
        for i in range(steps):
            self._say(1, False, seed + i)

    @rule(how=st.sampled_from(["fork", "copy"]))
    def go_two_ways(self, how):
        self.others.append((self.cache, self.ids, self.mask))
        self.cache = self.cache.fork() if how == "fork" else copy.deepcopy(self.cache)

    @precondition(lambda self: self.others)
    @rule(data=st.data(), keep=st.booleans())
    def turn_to_another(self, data, keep):
        other = self.others.pop(data.draw(st.integers(0, len(self.others) - 1)))
        if keep:
            self.others.append((self.cache, self.ids, self.mask))
        self.cache, self.ids, self.mask = other

    @precondition(lambda self: self.ids.shape[1])
    @rule()
    def save_and_load(self):
        path = Path(self.folder.name) / "cache"
        self.cache.save(self.ours, path)
        self.cache = SelfIndexCache.load(self.ours, path)

    @rule(batch=st.integers(1, 3))
    def reset(self, batch):
        self.cache.reset()
        self.begin(batch)

    @invariant()
    def tokens(self):
        for cache, ids, mask in ((self.cache, self.ids, self.mask), *self.others):
            assert cache.get_seq_length() == ids.shape[1]
            for b in range(len(ids)):
                sequence = ids[b][mask[b].bool()]
                if len(sequence):
                    check_tokens(cache, self.dense, sequence, b)

    @invariant()
    def pages(self):
        held, pools = {}, {}
        for cache in (self.cache, *(other for other, _, _ in self.others)):
            store = cache.layers[0].store
            if store is not None:
                pools[id(store.pool)] = store.pool
                counted = held.setdefault(id(store.pool), Counter())
                counted.update(block for row in store.table.rows for block in row.blocks)
        for key, counted in held.items():
            pool = pools[key]
            assert pool.used == len(counted)
            assert {b: n for b, n in enumerate(pool._references) if n} == counted


def test_any_sequence_of_calls(backend):
    chosen = settings(max_examples=20, stateful_step_count=14, deadline=None, derandomize=True)
    run_state_machine_as_test(CacheMachine, settings=chosen)
    backend.check_ran("encode_into", "dense_attend", "window_attend")
