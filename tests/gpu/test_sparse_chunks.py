"""Sparse attention of long chunks to encoded pages on the GPU, against the plain operators."""

import pytest
import torch
from dense_oracle import TOLERANCE
from stores import CONFIGS, new_store, random_tokens

from selfindex.attention import chunk, decoded
from selfindex.attention.attend import attend
from selfindex.attention.chunk import FEWEST_QUERIES
from selfindex.backends import fallback, ops, reference

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", ["cuda"], indirect=True)]

ALL = {"budget": 1.0, "prefill": "sparse", "prefill_mass": 1.0}
FEW = ALL | {"prefill_density": 0.3}
NEW = FEWEST_QUERIES + 361


def store_and_chunk(config, before=3001, new=NEW, heads=2, groups=4, dim=128, dtype=torch.bfloat16, batch=1):
    store = new_store(config, batch=batch, heads=heads, dim=dim, dtype=dtype)
    keys, values, query = (x.cuda() for x in random_tokens(store, before, groups))
    store.append(keys, values, query, None, dim**-0.5)
    keys, values, query = (x.cuda() for x in random_tokens(store, new, groups, seed=1))
    return store, query, keys, values, None, dim**-0.5


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "groups", "dim"), [(2, 4, 128), (1, 7, 64), (1, 6, 96), (2, 1, 256)])
def test_it_is_what_the_plain_operators_give(preset, dtype, heads, groups, dim, monkeypatch, backend):
    call = store_and_chunk(CONFIGS[preset](**FEW), heads=heads, groups=groups, dim=dim, dtype=dtype)
    sink = torch.linspace(-2, 3, heads * groups, device="cuda")
    selections, select = [], ops.select_blocks

    def kept(*arguments):
        selections.append(select(*arguments))
        return selections[-1]

    # Rounding may decide between blocks: both read the same ones.
    monkeypatch.setattr(ops, "select_blocks", kept)
    got = attend(*call, sink)[0]
    assert torch.equal(attend(*call, sink)[0], got)
    backend.check_ran("block_attend", "decode_pages", "merge_into")
    monkeypatch.setattr(ops, "select_blocks", lambda *arguments: selections[0])
    for name in ("block_attend", "decode_pages", "merge_into"):
        monkeypatch.setattr(ops, name, getattr(reference, name))
    wanted = attend(*call, sink)[0]
    tolerance = 2 * TOLERANCE[dtype] if dtype != torch.float32 else 3e-3
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("before", [3001, 40])
def test_all_blocks_are_exact(preset, before):
    call = store_and_chunk(CONFIGS[preset](**ALL), before)
    got = attend(*call)[0]
    call[0].config = CONFIGS[preset](budget=1.0)
    wanted = attend(*call)[0]
    torch.testing.assert_close(got, wanted, atol=2e-2, rtol=2e-2)


def test_the_last_queries_are_split(monkeypatch):
    """Among more blocks than there are queries for, and joined again."""
    call = store_and_chunk(CONFIGS["balanced"](**FEW), 20000, groups=1, heads=1)
    calls, own = [], decoded.attend_plain

    def seen(query, *rest, **more):
        calls.append(query.shape[0])
        return own(query, *rest, **more)

    monkeypatch.setattr(decoded, "attend_plain", seen)
    got = attend(*call)[0]
    assert max(calls) > 1
    monkeypatch.setattr(decoded, "splits_for", lambda query, tokens: 1)
    torch.testing.assert_close(attend(*call)[0], got, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("offloading", [False, True])
def test_scratch_is_bounded(offloading, monkeypatch):
    call = store_and_chunk(CONFIGS["balanced"](**FEW, offloading=offloading), 20000, heads=4, batch=2)
    wanted = attend(*call)[0]
    monkeypatch.setattr(chunk, "STAGED_PAGES", 50)
    monkeypatch.setattr(decoded, "MOST_SCRATCH", 16 << 20)
    for most in (2 * 2 * (20000 + NEW) * 256, 0):  # two heads, and one
        monkeypatch.setattr(chunk, "MOST_SCRATCH", most)
        torch.testing.assert_close(attend(*call)[0], wanted, atol=2e-2, rtol=2e-2)


def test_it_can_be_recorded():
    """Nothing waits for the GPU, so that the host stays ahead of it."""
    call = store_and_chunk(CONFIGS["balanced"](**FEW), groups=4)
    with torch.inference_mode():
        wanted = attend(*call)[0]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            attend(*call)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = attend(*call)[0]
        graph.replay()
    torch.testing.assert_close(got, wanted, atol=1e-2, rtol=1e-2)


def test_nothing_falls_back():
    slow = []
    call = store_and_chunk(CONFIGS["balanced"](**FEW))
    with fallback.observed(lambda name, fast, arguments: None if fast else slow.append(name)):
        attend(*call)
    assert not slow
