"""Random sequences of append, crop, reorder and reset, against a list of tokens per row."""

import backends
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from pages import gaussian
from stores import decoded_pages, new_store, small_config

pytestmark = backends.every

HEADS, DIM = 1, 64
seeds = st.integers(0, 2**31)


def grown(tokens):
    """With larger pages, correspondingly more tokens."""
    return tokens * backends.current.page_size // 8


class Tokens(RuleBasedStateMachine):
    """The model of a row is the list of (key, value) it was given, each [H, d]."""

    @initialize(
        batch=st.integers(1, 3),
        sinks=st.integers(0, 5),
        recent=st.integers(0, 9),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    )
    def start(self, batch, sinks, recent, dtype):
        self.config = small_config(sinks=sinks, recent=recent)
        self.dtype, self.batch = dtype, batch
        self.reset()

    @rule()
    def reset(self):
        self.store = new_store(self.config, self.batch, HEADS, DIM, self.dtype)
        self.rows = [[] for _ in range(self.batch)]

    def append(self, keys, values, valid):
        query = gaussian(self.batch, HEADS * 2, keys.shape[2], DIM, dtype=self.dtype)
        device = backends.current.device
        given = (None if x is None else x.to(device) for x in (keys, values, query, valid))
        self.store.append(*given, 0.125)
        for b, row in enumerate(self.rows):
            for t in range(keys.shape[2]):
                if valid is None or valid[b, t]:
                    row.append((keys[b, :, t], values[b, :, t]))

    @rule(new=st.integers(1, 30), seed=seeds)
    def append_chunk(self, new, seed):
        shape = (self.batch, HEADS, grown(new), DIM)
        self.append(
            gaussian(*shape, seed=seed, dtype=self.dtype),
            gaussian(*shape, seed=seed + 1, dtype=self.dtype),
            None,
        )

    @rule(steps=st.integers(1, 12), seed=seeds)
    def append_steps(self, steps, seed):
        for i in range(steps):
            shape = (self.batch, HEADS, 1, DIM)
            keys, values = (gaussian(*shape, seed=seed + 2 * i + j, dtype=self.dtype) for j in (0, 1))
            self.append(keys, values, None)

    @rule(new=st.integers(1, 12), seed=seeds)
    def append_padded(self, new, seed):
        generator, new = torch.Generator().manual_seed(seed), grown(new)
        valid = torch.rand(self.batch, new, generator=generator) < 0.6
        shape = (self.batch, HEADS, new, DIM)
        keys, values = (gaussian(*shape, seed=seed + j, dtype=self.dtype) for j in (1, 2))
        # Padding must not matter, whatever it holds.
        keys[~valid[:, None].expand(shape[:3])] = torch.nan
        self.append(keys, values, valid)

    @rule(data=st.data())
    def crop(self, data):
        keep = [data.draw(st.integers(max(0, len(row) - grown(20)), len(row))) for row in self.rows]
        self.store.check_crop(keep)
        self.store.crop(keep)
        self.rows = [row[:n] for row, n in zip(self.rows, keep, strict=True)]

    @rule(data=st.data())
    def select_rows(self, data):
        if len(self.rows) == 0:
            return
        order = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=3))
        self.store.select_rows(torch.tensor(order))
        self.rows, self.batch = [list(self.rows[i]) for i in order], len(order)

    @invariant()
    def lengths(self):
        assert self.store.batch == self.batch
        assert [self.store.length(b) for b in range(self.batch)] == [len(row) for row in self.rows]

    @invariant()
    def window(self):
        config, raw = self.config, self.store.window
        for b in range(self.batch):
            assert raw.lengths[b] <= config.sinks + config.recent + config.page_size - 1
            if self.store.encoded(b):
                assert raw.lengths[b] >= config.sinks

    @invariant()
    def tokens(self):
        for b, row in enumerate(self.rows):
            held, encoded = self.store.window.lengths[b], self.store.encoded(b)
            keys = torch.stack([k for k, _ in row], 1) if row else torch.empty(HEADS, 0, DIM)
            values = torch.stack([v for _, v in row], 1) if row else torch.empty(HEADS, 0, DIM)
            sinks = min(self.config.sinks, held)
            places = [*range(sinks), *range(sinks + encoded, len(row))]
            # Sinks and recent tokens are the tokens themselves.
            assert torch.equal(self.store.window.keys[b, :, :held].cpu(), keys[:, places].to(self.dtype))
            assert torch.equal(self.store.window.values[b, :, :held].cpu(), values[:, places].to(self.dtype))
            got_keys, got_values = decoded_pages(self.store, b)
            assert got_keys.shape == (HEADS, encoded, DIM)
            middle = slice(sinks, sinks + encoded)
            for got, wanted in ((got_keys, keys[:, middle]), (got_values, values[:, middle])):
                # Each token is closer to its own original than any other could be.
                error = (got - wanted.float()).norm(dim=-1)
                assert (error < 0.75 * wanted.float().norm(dim=-1)).all()

    @invariant()
    def blocks(self):
        held = {block for row in self.store.table.rows for block in row.blocks}
        assert self.store.pool.used == len(held)


def test_any_sequence_of_changes(backend):
    chosen = settings(max_examples=25, stateful_step_count=12, deadline=None, derandomize=True)
    run_state_machine_as_test(Tokens, settings=chosen)
    backend.check_ran("encode_into")
