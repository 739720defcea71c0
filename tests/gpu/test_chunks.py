"""Pages decoded to memory and long chunks over them on the GPU, against the plain operators."""

from types import SimpleNamespace

import backends
import pytest
import torch
from caches import make_cache
from dense_oracle import dense_attention
from pages import PRESETS, relative_error
from stores import CONFIGS, new_store, random_tokens

from selfindex.attention import decoded
from selfindex.attention.attend import attend
from selfindex.attention.parts import Parts
from selfindex.backends import ops, reference
from selfindex.backends.cuda import join, pages

pytestmark = pytest.mark.gpu

LENGTHS = [2500, 0, 41, 1300]
UNIT = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-23}
HALF = (torch.bfloat16, torch.float16)


def served(cache, keys, values):
    pools = cache.index, cache.payload, cache.table
    return pages.supported(*pools, keys, values, cache.fmt)


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("preset", "bits"), PRESETS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_decoded_tokens_agree_with_the_reference(preset, bits, dim, dtype, interleaved):
    """Also where keys and values are halves of the same rows, and with constants of every row."""
    cache = make_cache(LENGTHS, dim, 3, 2, bits, dtype, preset, short=(3, 5))
    constants = torch.cat([cache.constants * factor for factor in (1, 1.5, 2, 1)])
    starts = torch.tensor([5, 2600, 2600, 2650], dtype=torch.int32, device="cuda")
    results = []
    for module in (ops, reference):
        if interleaved:
            room = torch.full((4000, 3, 2 * dim), 7.0, dtype=dtype, device="cuda")
            keys, values = (x.transpose(0, 1) for x in room.chunk(2, -1))
        else:
            keys, values = room = torch.full((2, 3, 4000, dim), 7.0, dtype=dtype, device="cuda")
        assert served(cache, keys, values)
        stored = cache.index, cache.payload, cache.table, cache.counts, starts
        module.decode_pages(*stored, keys, values, constants, cache.fmt.name)
        results.append(room)
    got, wanted = (x.float() for x in results)
    assert ((got - wanted).abs() <= 2 * UNIT[dtype] * wanted.abs() + 1e-5).all()


def test_nothing_is_written_outside():
    cache = make_cache([1000, 700])
    for first in (-300, 600):
        starts = torch.tensor([first, first + 200], dtype=torch.int32, device="cuda")
        results = []
        for module in (ops, reference):
            room = torch.full((2, 2, 3000, 128), 7.0, dtype=torch.bfloat16, device="cuda")
            keys, values = room[:, :, 1000:2000]
            stored = cache.index, cache.payload, cache.table, cache.counts, starts
            module.decode_pages(*stored, keys, values, cache.constants, cache.fmt.name)
            results.append(room)
        assert torch.equal(results[0] == 7, results[1] == 7)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_merged_parts_agree_with_the_reference(dtype, dim, parts, sink):
    torch.manual_seed(0)
    outputs = [torch.randn(2, 37, 6, dim, device="cuda").to(dtype).transpose(1, 2) for _ in range(parts)]
    outputs[-1] = outputs[-1].float().contiguous()  # as from `dense_attend`
    sums = [3 * torch.randn(2, 6, 37, device="cuda") for _ in range(parts)]
    sums[-1][:, 2, 5] = -torch.inf
    logit = torch.randn(6, device="cuda").to(dtype) if sink else None
    for target in {dtype, torch.float32}:
        results = []
        for module in (ops, reference):
            place = torch.full((2, 40, 6, dim), 7.0, dtype=target, device="cuda")
            out = place[:, 2:39].transpose(1, 2)
            assert join.supported(outputs, sums, logit, out)
            results.append((place.float(), module.merge_into(outputs, sums, logit, out)))
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, atol=2 * UNIT[target] + 1e-5, rtol=2 * UNIT[target])


def test_the_place_of_a_part_without_keys_may_hold_anything():
    outputs = [torch.randn(1, 4, 9, 128, device="cuda") for _ in range(2)]
    outputs[1][:] = torch.nan
    sums = [torch.zeros(1, 4, 9, device="cuda"), torch.full((1, 4, 9), -torch.inf, device="cuda")]
    out = torch.empty(1, 4, 9, 128, device="cuda")
    ops.merge_into(outputs, sums, None, out)
    torch.testing.assert_close(out, outputs[0])
    ops.merge_into(outputs[1:], sums[1:], None, out)
    assert not out.any()


def store_of(cache):
    """As much of a store as `decoded_parts` reads."""
    counts = [[n for n in row if n] for row in cache.counts.tolist()]
    table = SimpleNamespace(
        rows=[SimpleNamespace(counts=row) for row in counts], tensors=lambda: (cache.table, cache.counts)
    )
    pool = SimpleNamespace(index=cache.index, payload=cache.payload, offloading=False)
    rest = {"constants": cache.constants, "format": cache.fmt, "batch": len(counts)}
    return SimpleNamespace(table=table, pool=pool, **rest)


def both_ways(cache, query):
    """(output, log-sum-exp) of `decoded_parts` and of the reference, for the rows that hold tokens."""
    store, found, sums = store_of(cache), [], []
    for rows in decoded.groups_of(store):
        if store.table.rows[rows.start].counts:
            parts = Parts()
            assert decoded.decoded_parts(store, rows, query[rows], cache.scaling, parts)
            found.append(torch.empty_like(query[rows]))
            sums.append(ops.merge_into(parts._outputs, parts._sums, None, found[-1]))
    pools = cache.index, cache.payload, cache.table, cache.counts, cache.constants
    wanted, total = reference.dense_attend(query, *pools, cache.scaling, cache.fmt.name)
    held = cache.counts.sum(1) > 0
    return (torch.cat(found), torch.cat(sums)), (wanted[held], total[held])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("dim", "heads", "groups"), [(64, 2, 4), (96, 1, 3), (128, 2, 4), (128, 3, 1), (256, 1, 4)]
)
@pytest.mark.parametrize(("preset", "bits"), PRESETS)
@pytest.mark.parametrize(
    ("lengths", "room"), [(LENGTHS, 1 << 28), ([1300, 1300], 1 << 28), ([2500, 700], 1 << 20)]
)
@pytest.mark.parametrize("queries", [decoded.FEWEST_QUERIES, 600, 2048])
def test_long_chunks_agree_with_the_reference(
    preset, bits, dim, heads, groups, dtype, lengths, room, queries, monkeypatch
):
    monkeypatch.setattr(decoded, "MOST_SCRATCH", room)
    cache = make_cache(
        lengths, dim, heads, groups, bits, dtype, preset, short=(3,) if lengths is LENGTHS else ()
    )
    shape = len(lengths), queries, heads * groups, dim
    query = (2 * torch.randn(shape, device="cuda")).to(dtype).transpose(1, 2)
    assert decoded.is_decoded(store_of(cache), query, cache.scaling)
    (got, lse), (wanted, total) = both_ways(cache, query)
    assert relative_error(got, wanted) < (1e-2 if dtype == torch.bfloat16 else 3e-3)
    torch.testing.assert_close(lse, total, atol=3e-2 if dtype == torch.bfloat16 else 1e-2, rtol=0)


LONG = decoded.FEWEST_QUERIES + 16
"""New tokens of a chunk whose prefix is decoded to memory."""


@pytest.mark.parametrize("offloading", [False, True])
@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_long_chunk_of_a_store(preset, padded, offloading, monkeypatch):
    if offloading:
        monkeypatch.setattr(decoded, "STAGED_PAGES", 8)
    with backends.use("cuda", monkeypatch) as backend:
        config = CONFIGS[preset](budget=1.0, offloading=offloading)
        store = new_store(config, batch=2, dim=128, dtype=torch.bfloat16)
        fill_rows(store, 800 if padded else 0)
        tokens = keys, values, query = random_tokens(store, LONG, seed=9)
        valid = None
        if padded:
            valid = torch.ones(2, LONG, dtype=torch.bool)
            valid[0, :20] = False
        placed = [x.cuda() for x in (query, keys, values)]
        sink = torch.linspace(-2, 3, query.shape[1])
        mask = None if valid is None else valid.cuda()
        got, _ = attend(store, *placed, mask, 0.09, sink.cuda())
        wanted = dense_attention(store, query, *tokens[:2], valid, 0.09, sink)
        backend.check_ran("decode_pages", "merge_into")
    got = got.float().cpu()
    real = torch.ones(2, LONG, dtype=torch.bool) if valid is None else valid
    got, wanted = (x.transpose(1, 2)[real] for x in (got, wanted))
    torch.testing.assert_close(got, wanted, atol=2e-2, rtol=2e-2)


def fill_rows(store, padding):
    """1,500 tokens, the first of them padding in the second row."""
    keys, values, query = (x.cuda() for x in random_tokens(store, 1500))
    valid = torch.ones(2, 1500, dtype=torch.bool, device="cuda")
    valid[1, :padding] = False
    store.append(keys, values, query, valid if padding else None, 0.125)


def test_a_refused_kernel_leaves_the_other_way(monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("no engine")

    with backends.use("cuda", monkeypatch) as backend:
        store = new_store(CONFIGS["balanced"](budget=1.0), dtype=torch.bfloat16)
        keys, values, query = (x.cuda() for x in random_tokens(store, 900))
        store.append(keys, values, query, None, 0.125)
        monkeypatch.setattr(decoded, "attend_plain", fails)
        monkeypatch.setattr(decoded, "_refused", set())
        with pytest.warns(RuntimeWarning, match="no engine"):
            attend(store, query[:, :, :LONG], keys[:, :, :LONG], values[:, :, :LONG], None, 0.125)
        backend.check_ran("dense_attend")
