import pytest
import torch
from stores import fill, live_tensors, new_store, paper_config, small_config

from selfindex import SelfIndexConfig
from selfindex.store import Memory


@pytest.mark.parametrize("make_config", [small_config, paper_config])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_accounting_equals_the_live_tensors(make_config, dtype):
    store = new_store(make_config(), batch=2, dtype=dtype)

    def check():
        assert store.memory().total == sum(live_tensors(store).values())

    fill(store, 10)
    check()
    fill(store, 60, *[1] * 20)
    check()
    store.select_rows(torch.tensor([0, 1, 1]))
    check()
    store.crop([85, 82, 80])
    check()
    fill(store, 9)
    check()
    store.crop([0, 0, 0])
    check()
    assert store.memory().index == store.memory().payload == store.memory().full_precision == 0


def test_kinds_of_memory():
    store = new_store(small_config(), heads=3, dim=80, dtype=torch.float16)
    fill(store, 60)
    memory, fmt = store.memory(), store.format
    pages = 48 // 8
    assert memory.index == pages * fmt.index_bytes
    assert memory.payload == pages * fmt.payload_bytes
    assert memory.full_precision == (60 - 48) * 3 * 80 * 2 * 2


def test_shared_pages_count_once():
    store = new_store(small_config())
    fill(store, 60)
    before = store.memory()
    store.select_rows(torch.tensor([0, 0, 0]))
    after = store.memory()
    assert (after.index, after.payload) == (before.index, before.payload)
    assert after.full_precision == 3 * before.full_precision


def test_memories_add_up():
    one, other = Memory(1, 2, 3, 4, 5), Memory(10, 20, 30, 40, 50)
    assert one + other == Memory(11, 22, 33, 44, 55)
    assert (one + other).total == 165


@pytest.mark.parametrize("heads", [2, 4])
def test_eight_thousand_tokens_of_128_channels_take_at_most_a_fifth_of_fp16(heads):
    store = new_store(SelfIndexConfig(), heads=heads, dim=128, dtype=torch.float16)
    # The prompt ends shortly before a page leaves the window, and so do the steps: window and pool
    # are at their largest on the way.
    for new in (7950, *[1] * 80):
        fill(store, new, groups=1)
        store.memory()  # builds the block table
        live = sum(live_tensors(store).values())
        assert live <= store.length(0) * heads * 128 * 2 * 2 / 5


def test_growing_token_by_token_moves_each_token_a_bounded_number_of_times():
    store, copied = new_store(small_config()), 0
    for _ in range(600):
        raw, pool = store.window.keys.data_ptr(), store.pool.index.data_ptr()
        held, pages = sum(store.window.lengths), store.pool.used
        fill(store, 1)
        copied += held * (store.window.keys.data_ptr() != raw)
        copied += 8 * pages * (store.pool.index.data_ptr() != pool)
    # The window is written anew once a page; the pool grows by a sixteenth.
    assert copied < 24 * 600
