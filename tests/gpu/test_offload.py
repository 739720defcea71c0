"""A payload plane in pinned host memory gives the bits that one on the GPU gives."""

import copy
import gc

import pytest
import torch
from caches import make_cache, tokens
from tiny_models import VOCAB, forward, generate, make_model, prompt

import selfindex
from selfindex import HostMemoryError, SelfIndexCache, SelfIndexConfig
from selfindex.attention import attend as attention
from selfindex.attention.attend import attend
from selfindex.backends import ops
from selfindex.backends.cuda import recent
from selfindex.backends.cuda.offloaded import prepared
from selfindex.store import LayerStore, host
from selfindex.store.host import HostRows

pytestmark = pytest.mark.gpu

HEADS, GROUPS, DIM = 2, 4, 128


class Pair:
    """A resident and an offloaded store that are treated alike."""

    def __init__(self, batch=2, dtype=torch.bfloat16, **options):
        self.generator = torch.Generator("cuda").manual_seed(0)
        self.dtype, self.scaling = dtype, DIM**-0.5
        like = torch.empty(batch, HEADS, 0, DIM, device="cuda", dtype=dtype)
        settings = {"budget": 100, "dense_below": 0} | options
        self.stores = [
            LayerStore(SelfIndexConfig(offloading=offloading, **settings), like)
            for offloading in (False, True)
        ]

    def random(self, heads, tokens):
        shape = (self.stores[0].batch, heads, tokens, DIM)
        return torch.randn(shape, generator=self.generator, device="cuda").to(self.dtype)

    def append(self, *chunks):
        for new in chunks:
            keys, values = self.random(HEADS, new), self.random(HEADS, new)
            query = self.random(HEADS * GROUPS, new)
            for store in self.stores:
                store.append(keys, values, query, None, self.scaling)

    def check(self, *chunks):
        """Attention of chunks of this many queries is equal, and so are the pages."""
        for new in chunks:
            keys, values = self.random(HEADS, new), self.random(HEADS, new)
            query = self.random(HEADS * GROUPS, new)
            wanted, got = (attend(s, query, keys, values, None, self.scaling)[0] for s in self.stores)
            assert torch.isfinite(wanted).all()
            assert torch.equal(got, wanted), new
        assert self.stores[0].table.rows == self.stores[1].table.rows
        blocks = [block for row in self.stores[0].table.rows for block in row.blocks]
        for device in ("cpu", "cuda"):
            one, other = (store.pool.read(blocks, torch.device(device)) for store in self.stores)
            assert all(torch.equal(*x) for x in zip(one, other, strict=True))


# 128: the kernels; 64: their pages are not served, so PyTorch operators read the host memory.
@pytest.mark.parametrize("page_size", [128, 64])
@pytest.mark.parametrize("options", [{}, {"value_bits": 3}, {"preset": "paper"}], ids=str)
def test_appends_crops_and_forks(page_size, options):
    pair = Pair(page_size=page_size, **options)
    pair.append(3000)
    pair.check(1, 4, 40)
    # Growth by steps and by chunks: several regions of pinned memory.
    pair.append(*[1] * 300, 700, 200)
    pair.check(1, 40)
    if pair.stores[0].config.preset == "balanced":
        for store in pair.stores:
            store.crop([2500, 130])
        pair.append(900)
        pair.check(1, 40)
    for store in pair.stores:
        store.select_rows(torch.tensor([1, 0, 1]))
    pair.append(400)
    pair.check(1, 4, 40)
    kept = pair.stores
    pair.stores = [copy.deepcopy(store) for store in kept]
    pair.append(300)
    pair.check(1, 40)
    pair.stores = kept
    pair.check(1, 40)


def test_everything_is_attended_below_the_limit():
    pair = Pair(dense_below=10000)
    pair.append(3000)
    pair.check(1, 4, 40)


def test_a_long_prefix_is_staged_in_parts(monkeypatch):
    pair = Pair()
    pair.append(5000)
    monkeypatch.setattr(attention, "STAGED_PAGES", 14)
    keys, values = pair.random(HEADS, 40), pair.random(HEADS, 40)
    query = pair.random(HEADS * GROUPS, 40)
    wanted, got = (attend(s, query, keys, values, None, pair.scaling)[0].float() for s in pair.stores)
    assert float((got - wanted).norm() / wanted.norm()) < 5e-3


def offloaded(cache):
    """The payload of a random cache in host memory (rows, tensor), and its cache of recent tokens."""
    rows = HostRows(cache.fmt.payload_bytes, torch.device("cuda"))
    rows.grow(len(cache.payload))
    rows.write(list(range(len(cache.payload))), cache.payload)
    return rows, rows.data, recent.Recent(cache.fmt, torch.device("cuda"))


def arguments_of(cache, budgets, payload, held):
    """Of `sparse_decode`, from host memory."""
    arguments = list(cache.decode_arguments(budgets))
    held.fit(len(budgets) * max(budgets), 128 * len(payload))
    arguments[2] = payload
    return (*arguments, held.tensor)


@pytest.mark.parametrize("selections", [0, 0.2, 1, 4])
@pytest.mark.parametrize(
    ("preset", "dim", "groups", "bits", "shared"),
    [
        ("balanced", 128, 4, 2, False),
        ("balanced", 128, 8, 3, True),
        ("balanced", 64, 1, 3, False),
        ("balanced", 96, 3, 3, True),
        ("balanced", 256, 2, 2, False),
        ("paper", 128, 4, 2, True),
        ("paper", 64, 1, 2, False),
        ("paper", 96, 3, 2, False),
        ("paper", 256, 2, 2, False),
    ],
)
def test_a_cache_of_recent_tokens_changes_no_bit(preset, dim, groups, bits, shared, selections, monkeypatch):
    """Of no room at all, of so little that most tokens find none, of one step, of several."""
    monkeypatch.setattr(recent, "SELECTIONS", selections)
    cache = make_cache([5000, 700, 3000], dim, 2, groups, bits, preset=preset, short=(3,), shared=shared)
    _, payload, held = offloaded(cache)
    budgets = [400, 0, 300]
    for _ in range(12):
        # Neighbouring steps ask for much the same.
        cache.query = (cache.query + 0.2 * torch.randn_like(cache.query)).to(cache.query.dtype)
        wanted = ops.sparse_decode(*cache.decode_arguments(budgets))
        found = ops.sparse_decode(*arguments_of(cache, budgets, payload, held))
        for got, exact in zip(found, wanted, strict=True):
            assert torch.equal(got, exact)
    selected = 12 * 2 * sum(budgets)
    assert held.fetched <= selected
    if selections == 0:
        assert held.sets == held.fetched == 0
    if selections == 4:
        assert 0 < held.fetched < 0.9 * selected


def test_what_was_read_once_is_not_fetched_again():
    cache = make_cache([5000, 700], short=(3,))
    _, payload, held = offloaded(cache)
    call = prepared(*arguments_of(cache, [400, 100], payload, held))
    call.run()
    assert held.fetched == 2 * 500
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run()
    for _ in range(5):
        graph.replay()
    # A set in which more than 8 tokens meet is rare.
    assert held.fetched <= 1.02 * 2 * 500
    before = held.fetched
    held.forget(cache.table[0, :20].tolist())
    graph.replay()
    slots = call.selected[0, :, 0, :400]
    dropped = int((slots < 20 * 128).sum())
    assert dropped <= held.fetched - before <= dropped + 20


def test_a_block_with_new_content_is_not_read_from_the_past():
    cache = make_cache([3000], heads=2)
    rows, payload, held = offloaded(cache)
    arguments = arguments_of(cache, tokens(cache), payload, held)
    ops.sparse_decode(*arguments)
    block = int(cache.table[0, 5])
    cache.payload[block] = cache.payload[int(cache.table[0, 9])]
    held.forget([block])
    rows.write([block], cache.payload[block : block + 1])
    wanted = ops.sparse_decode(*cache.decode_arguments(tokens(cache)))
    for got, exact in zip(ops.sparse_decode(*arguments), wanted, strict=True):
        assert torch.equal(got, exact)


def test_the_payload_takes_no_gpu_memory_and_stays_in_place():
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    like = torch.empty(1, 8, 0, DIM, device="cuda", dtype=torch.bfloat16)
    store = LayerStore(SelfIndexConfig(offloading=True), like)
    fmt, places = store.format, set()
    for pages in (100, 100, 2000):
        index = torch.randint(256, (pages, fmt.index_bytes), device="cuda", dtype=torch.uint8)
        payload = torch.randint(256, (pages, fmt.payload_bytes), device="cuda", dtype=torch.uint8)
        store.table.append(0, store.pool.add(index, payload), [128] * pages)
        places.add(store.pool.payload.data_ptr())
        last = store.table.rows[0].blocks[-pages:]
        assert torch.equal(store.pool.payload[last], payload)
        assert torch.equal(store.pool._host.host[last], payload.cpu())
        del index, payload
    assert len(places) == 1
    assert store.pool.payload.is_cuda
    assert store.pool._host.host.is_pinned()
    memory = store.memory()
    assert memory.host >= 2200 * fmt.payload_bytes
    assert torch.cuda.memory_allocated() - start < memory.total - memory.host + (2 << 20)


def test_host_memory_is_given_back():
    rows = HostRows(1 << 20, torch.device("cuda"))
    rows.grow(2048)
    rows.write([7], torch.full((1, 1 << 20), 7, dtype=torch.uint8, device="cuda"))
    kept = rows.data[7]
    del rows
    gc.collect()
    assert (kept == 7).all(), "a tensor on the memory keeps it"
    before = host.available()
    del kept
    gc.collect()
    assert host.available() > before + (1 << 30)


def test_a_cache_may_go_while_a_graph_is_captured():
    rows = HostRows(1 << 20, torch.device("cuda"))
    rows.grow(16)
    graph, x = torch.cuda.CUDAGraph(), torch.zeros(4, device="cuda")
    with torch.cuda.graph(graph):
        x += 1
        del rows
        gc.collect()
        x += 1
    graph.replay()
    assert (x == 2).all()
    assert len(host._late) == 1
    HostRows(1 << 20, torch.device("cuda")).grow(1)
    assert not host._late


def test_memory_that_cannot_be_pinned_is_refused_and_nothing_else_fails():
    rows = HostRows(4096, torch.device("cuda"))
    cudart = torch.cuda.cudart()
    assert int(cudart.cudaHostRegister(rows._range.address, 4096, 0)) == 0
    with pytest.raises(HostMemoryError, match="cannot pin"):
        rows.grow(10)
    assert int(cudart.cudaHostUnregister(rows._range.address)) == 0
    assert (torch.zeros(3, device="cuda") + 1).sum() == 3
    rows.grow(10)
    rows.write([3], torch.full((1, 4096), 3, dtype=torch.uint8, device="cuda"))
    assert rows.read([3, 3], torch.device("cpu")).eq(3).all()


def model_on_gpu(dtype=torch.bfloat16):
    return make_model("llama", dtype=dtype, max_position_embeddings=8192).cuda()


def both(model, **options):
    settings = {"budget": 200, "dense_below": 0} | options
    return [SelfIndexCache(model, offloading=offloading, **settings) for offloading in (False, True)]


def test_steps_of_the_graph_fetch_little():
    model, ids = model_on_gpu(), prompt(1500, batch=2).cuda()
    caches = both(model)
    for cache in caches:
        forward(model, ids, cache)
    graphs = set()
    for i, new in enumerate(prompt(300, batch=2, seed=1).cuda().split(1, 1)):
        wanted, got = (forward(model, new, cache) for cache in caches)
        assert torch.equal(got, wanted), i
        graphs |= {id(recording.graph) for recording in caches[1].replay._recordings.values()}
    assert caches[1].replay.steps == 300
    assert len(graphs) == 1, "pages were encoded on the way, and the graph stayed valid"
    for layer in caches[1].compressed_layers:
        assert 0 < layer.store.pool.recent.fetched < 0.9 * 300 * 2 * 2 * 200
        assert layer.store.memory().recent > 2 * 2 * 200 * 64
    for more in (1, 30):
        wanted, got = (forward(model, prompt(more, 2).cuda(), cache) for cache in caches)
        assert torch.equal(got, wanted)


def test_a_fork_that_selects_more_does_not_mislead_the_graph_of_another():
    model, ids = model_on_gpu(), prompt(1500).cuda()
    caches = both(model)
    for cache in caches:
        forward(model, ids, cache)
    forks = [cache.fork() for cache in caches]
    for i, new in enumerate(prompt(20, seed=1).cuda().split(1, 1)):
        wanted, got = (forward(model, new, cache) for cache in caches)
        assert torch.equal(got, wanted), i
        if i == 9:
            # Needs more room for recent tokens, which the forks share.
            before = caches[1].compressed_layers[0].store.pool.recent.address
            for fork in forks:
                fork.set_budget(900)
            wanted, got = (forward(model, new, fork) for fork in forks)
            assert torch.equal(got, wanted)
            assert caches[1].compressed_layers[0].store.pool.recent.address != before


def test_generation():
    model, ids = model_on_gpu(), prompt(700, batch=2).cuda()
    for run in (
        lambda cache: generate(model, ids, cache, max_new_tokens=150),
        lambda cache: generate(model, ids, cache, max_new_tokens=30, num_beams=3),
        lambda cache: generate(model, ids, cache, max_new_tokens=10, prefill_chunk_size=300),
        lambda cache: selfindex.generate(
            model, ids, cache=cache, max_new_tokens=150, eos_token_id=VOCAB, pad_token_id=0
        ),
    ):
        wanted, got = map(run, both(model))
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("offloading", [False, True])
def test_a_file_can_be_loaded_into_either_kind(offloading, tmp_path):
    model, ids = model_on_gpu(), prompt(1500).cuda()
    caches = both(model)
    for i, cache in enumerate(caches):
        forward(model, ids, cache)
        cache.save(model, tmp_path / str(i))
    for i in range(2):
        loaded = SelfIndexCache.load(model, tmp_path / str(i), offloading)
        assert loaded.compressed_layers[0].store.pool.offloading == offloading
        original = copy.deepcopy(caches[0])
        for new in (1, 40, 1):
            ids = prompt(new, seed=new).cuda()
            assert torch.equal(forward(model, ids, loaded), forward(model, ids, original))
