"""How rows are spread over a GPU: whatever the sizes, a plan that the kernels can run."""

from hypothesis import given
from hypothesis import strategies as st

from selfindex.backends.cuda import decode, dense

ROOM = {8: 227 * 1024, 16: 227 * 1024}
SMS = 132


def at_once(warps, cluster, shared):
    """Clusters on an H100: whole multiprocessors, 16 of them side by side, shared memory permitting."""
    blocks = max(1, min(2048 // (32 * warps), 228 * 1024 // (shared + 1024)))
    return SMS // 16 * (16 * blocks // cluster)


@given(
    rows=st.integers(1, 4096),
    pages=st.integers(1, 20_000),
    preset=st.sampled_from(["balanced", "paper"]),
    dim=st.sampled_from(decode.HEAD_DIMS),
    groups=st.integers(1, decode.MAX_GROUPS),
    clusters=st.booleans(),
    room=st.sampled_from([99, 163, 227]),
)
def test_plans_cover_every_page_within_the_memory(rows, pages, preset, dim, groups, clusters, room):
    fmt = decode.PageFormat(preset, 8, dim, decode.PAGE_SIZE)
    chunk = decode.chunk_bytes(fmt, groups)
    limits = dict.fromkeys(ROOM, room * 1024)
    found = decode.plan(
        rows, pages, fmt.index.record, chunk, decode.selection_bytes(fmt), limits, clusters, SMS, at_once
    )
    assert found.warps in limits
    assert 1 <= found.cluster <= (16 if clusters else 1)
    assert found.cluster * found.pages >= pages
    assert (found.cluster - 1) * found.pages < pages, "no more blocks than pages"
    assert 0 <= found.resident <= found.pages
    ring = found.shared - found.resident * chunk
    assert found.shared <= limits[found.warps]
    assert ring >= decode.SELECT_BYTES, "the selection lies where the records were"
    assert (found.scratch == 0) == (found.resident == found.pages)
    if found.ring_keys:
        assert (found.pages - found.resident) * 2 * decode.PAGE_SIZE <= ring - decode.SELECT_BYTES


def test_rows_are_spread_until_the_gpu_is_full():
    def cluster(rows, pages):
        return decode.plan(rows, pages, 2320, 528, 0, ROOM, True, SMS, at_once).cluster

    assert cluster(8, 1024) >= 8  # one sequence of 128k
    assert cluster(64, 1024) == 2  # eight of them: 128 blocks for 132 multiprocessors
    assert cluster(128, 256) == 1
    assert cluster(8, 3) == 1  # too short to be shared


def test_the_plans_that_are_remembered_are_bounded():
    class Kernel:
        room = 100_000

        def at_once(self, threads, cluster, shared, sms):
            return sms

    decoders = ((8, Kernel()),)
    for pages in range(1, 1100):
        assert decode._plan_for(decoders, 8, pages, 2048, 528, 0, False, 4).pages == pages
    info = decode._plan_for.cache_info()
    assert info.currsize == info.maxsize < 1100


@given(st.integers(1, 50_000), st.integers(1, 20_000), st.sampled_from([132, 264, 396]), st.integers(0, 5000))
def test_pages_are_split_within_the_memory(tiles, pages, at_once, most):
    """The parts that blocks leave for each other fit, whatever a split would save."""
    splits = dense.splits_for(tiles, pages, at_once, most)
    assert 1 <= splits <= pages
    assert splits == 1 or splits <= most
