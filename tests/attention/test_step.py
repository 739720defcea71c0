"""Steps are planned once for all layers of a forward pass, and several new tokens are as many steps."""

import pytest
import torch
from decoded_cache import small_cache
from stores import new_store, random_tokens, small_config
from tiny_models import forward, pair, prompt

from selfindex.attention import step as module
from selfindex.attention.attend import attend
from selfindex.attention.step import FixedPlan, StepPlans, attend_step
from selfindex.backends import ops


@pytest.mark.parametrize("rows", [1, 2])
def test_layers_share_a_plan(rows, monkeypatch):
    _, ours = pair("llama")
    cache = small_cache(ours, budget=9)
    ids = prompt(40, rows)
    mask = torch.ones_like(ids)
    mask[1:, :7] = 0
    forward(ours, ids, cache, mask)
    seen, step_attend = [], ops.step_attend

    def recorded(*arguments):
        seen.append(arguments[11])
        return step_attend(*arguments)

    monkeypatch.setattr(module.ops, "step_attend", recorded)
    for _ in range(20):
        held = cache.compressed_layers[0].store.window.lengths
        mask = torch.cat((mask, torch.ones(rows, 1, dtype=torch.long)), 1)
        positions = mask.cumsum(1)[:, -1:] - 1
        forward(ours, prompt(1, rows), cache, mask, position_ids=positions)
        first, second = seen[-2:]
        assert first.data_ptr() == second.data_ptr()
        assert not first.is_inference()
        assert first.tolist() == held
    assert len(seen) == 40
    assert len(cache.plans._known) == 1


@pytest.mark.parametrize("new", [1, 3, 8])
@pytest.mark.parametrize("lengths", [(60,), (60, 47)])
def test_a_fixed_plan_gives_what_a_plan_of_its_step_gives(new, lengths):
    store = new_store(small_config(budget=9), batch=len(lengths))
    store.append(*random_tokens(store, max(lengths)), None, 0.125)
    store.crop(list(lengths))
    keys, values, query = random_tokens(store, new, seed=4)
    wanted, read = attend(store, query, keys, values, None, 0.125)
    fixed = FixedPlan(store, new, {})
    fixed.update(store, max(lengths))
    assert fixed.budgets.tolist() == read
    assert fixed.first == max(lengths)
    got = attend_step(store, query, keys, values, fixed, 0.125).transpose(1, 2)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_a_step_takes_its_tokens_one_behind_the_other():
    config = small_config(budget=1.0)
    one, many = new_store(config), new_store(config)
    for store in (one, many):
        store.append(*random_tokens(store, 60), None, 0.125)
    keys, values, query = random_tokens(one, 4, seed=4)
    got = attend(many, query, keys, values, None, 0.125)[0]
    many.commit(many.plan_step(4))
    for t in range(4):
        k, v, q = (x[:, :, t : t + 1] for x in (keys, values, query))
        wanted = attend(one, q, k, v, None, 0.125)[0]
        one.commit(one.plan_step(1))
        torch.testing.assert_close(got[:, :, t : t + 1], wanted, atol=1e-5, rtol=1e-5)
    assert one.window.lengths == many.window.lengths
    assert torch.equal(one.window.held()[0], many.window.held()[0])


def test_few_new_tokens_select_for_themselves_unless_told_to_read_everything():
    for sparse_queries, read in ((8, [9]), (0, None)):
        store = new_store(small_config(budget=9, sparse_queries=sparse_queries))
        store.append(*random_tokens(store, 60), None, 0.125)
        keys, values, query = random_tokens(store, 1, seed=4)
        assert attend(store, query, keys, values, None, 0.125)[1] == (read or [store.encoded(0)])
        assert StepPlans()(store, 1).everything == (read is None)
