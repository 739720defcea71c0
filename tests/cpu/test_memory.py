"""Working memory of the compiled operators: bounded, reported, and an error where there is none."""

import os
import subprocess
import sys

import pytest
import torch
from encoded_cache import make_cache
from threads import at_once

from selfindex.backends.cpu.loader import NativeUnavailable, native
from selfindex.backends.cpu.operators import dense_attend
from selfindex.report import Report

MOST_KEPT = 24 << 20

PROGRAM = """
import os, resource, torch
from encoded_cache import make_cache
from selfindex.backends.cpu.operators import sparse_decode

torch.set_num_threads(2)
cache = make_cache([128], 64, 2, 1, 2, 128, 1)
arguments = list(cache.decode_arguments([500]))
pages = 16384  # the same one: the selection needs 8 MiB of its own, in a thread
arguments[3] = torch.zeros(1, pages, dtype=torch.int32)
arguments[4] = torch.full((1, pages), 128, dtype=torch.int32)
wanted = sparse_decode(*arguments)

def same():
    return all(torch.equal(a, b) for a, b in zip(sparse_decode(*arguments), wanted))

resource.setrlimit(resource.RLIMIT_AS, (0, resource.RLIM_INFINITY))
try:
    sparse_decode(*arguments)
    print("no failure")
except MemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
print(same())
child = os.fork()
if child == 0:
    os._exit(0 if same() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or "ASAN_OPTIONS" in os.environ, reason="needs limits as Linux has"
)
def test_no_memory_in_a_thread_is_an_error_and_a_forked_process_has_threads_too(best):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "SELFINDEX_CPU": "",
        # Nothing is left over from what was freed before.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split("\n")[:3] == ["std::bad_alloc", "True", "0"], done.stderr
    assert done.returncode == 0


@pytest.fixture
def best(monkeypatch):
    """The best instruction set of this processor."""
    try:
        native()
    except NativeUnavailable:
        pytest.skip("no compiled operators here")
    monkeypatch.setenv("SELFINDEX_CPU", "")


def resident():
    """Bytes of anonymous memory of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def test_what_is_kept_is_bounded_and_reported(best):
    cache = make_cache([24000], 128, 4, 4, 2, 128, 48)
    before = resident()
    dense_attend(*cache.dense_arguments())
    at_once(2, lambda _: dense_attend(*cache.dense_arguments()))
    assert 0 < native().kept_bytes() <= MOST_KEPT
    if "ASAN_OPTIONS" not in os.environ:  # which keeps what is freed
        assert resident() - before < MOST_KEPT + (8 << 20)
    assert Report("balanced", []).to_dict()["scratch"] == native().kept_bytes()


def test_heads_done_one_after_another_are_those_done_at_once(best):
    one = make_cache([4000], 128, 2, 4, 2, 128, 48)
    arguments = list(one.dense_arguments())
    alone = dense_attend(*arguments)
    arguments[0], arguments[3], arguments[4] = (arguments[i].repeat_interleave(6, 0) for i in (0, 3, 4))
    for many, wanted in zip(dense_attend(*arguments), alone, strict=True):
        assert torch.equal(many, wanted.expand_as(many))


def test_many_tokens_are_attended_in_larger_shares(best):
    cache = make_cache([40000], 64, 1, 2, 2, 128, 1)
    query, index, payload, table, counts, *rest = cache.dense_arguments()
    half = table.shape[1] // 2
    parts = [
        dense_attend(query, index, payload, table[:, at].contiguous(), counts[:, at].contiguous(), *rest)
        for at in (slice(0, half), slice(half, None))
    ]
    output, lse = dense_attend(query, index, payload, table, counts, *rest)
    wanted = torch.logaddexp(parts[0][1], parts[1][1])
    torch.testing.assert_close(lse, wanted, atol=1e-5, rtol=1e-5)
    merged = sum(part * (own - wanted).exp()[..., None] for part, own in parts)
    torch.testing.assert_close(output, merged, atol=1e-5, rtol=1e-4)
